"""What a layer is, asked in one place: linear or not, and how its weight lies."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


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


class StridedPointwise(nn.Conv2d):
    """A 1 x 1 convolution with a stride that first leaves out the pixels it does not look at.

    torch 2.13 on CPUs without AVX-512 writes beyond the gradient of such a convolution of fewer than 8 channels if its
    images are in channels_last, and the process dies.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(input[..., ::rows, ::columns], weight, bias, groups=self.groups)


def make_safe(model: nn.Module) -> None:
    """Let a model's strided 1 x 1 convolutions of few channels work in channels_last; parameters stay as they are."""
    for module in model.modules():
        if (
            type(module) is nn.Conv2d and module.kernel_size == (1, 1) and max(module.stride) > 1
            and module.padding == (0, 0) and module.in_channels < 8
        ):  # fmt: skip
            module.__class__ = StridedPointwise
