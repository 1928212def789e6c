"""What a layer is, asked in one place: linear or not, and how its weight lies."""

from __future__ import annotations

from torch import nn


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix: nn.Linear, GPT-2's Conv1D, and what was made of these (`lean`)."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def sides(linear: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear module."""
    rows, columns = linear.weight.shape  # type: ignore[misc, union-attr]
    return (rows, columns) if is_transposed(linear) else (columns, rows)  # type: ignore[return-value]


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear module's weight is (in, out), as in the Conv1D of transformers, which is not imported for it."""
    kinds = type(module).__mro__
    return any(kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in kinds)


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """A layer's weight, if it is a parameter of its own: under a parametrization `module.weight` is made by a forward,
    which may change what the module remembers (spectral norm)."""
    return module._parameters.get("weight")
