"""Whether a layer is linear, and how its weight is laid out: the one place that answers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix: nn.Linear, GPT-2's Conv1D, and what `lean` makes of them."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def sides(linear: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear module."""
    rows, columns = linear.weight.shape  # type: ignore[misc, union-attr]
    return (rows, columns) if is_transposed(linear) else (columns, rows)  # type: ignore[return-value]


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear module's weight is (in, out), like transformers' Conv1D; does not import transformers."""
    kinds = type(module).__mro__
    return any(kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in kinds)


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """A layer's weight if it is a parameter of the layer, else None.

    Under a parametrization, reading `module.weight` runs a forward, which may change the module (spectral norm).
    """
    return module._parameters.get("weight")


class StridedPointwise(nn.Conv2d):
    """A strided 1 x 1 convolution that first drops the pixels it skips.

    On CPUs without AVX-512, torch 2.13 writes past the end of the gradient of such a convolution if it has fewer than
    8 input channels and its images are in channels_last, and the process dies.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(input[..., ::rows, ::columns], weight, bias, groups=self.groups)


def make_safe(model: nn.Module) -> None:
    """Make a model's strided 1 x 1 convolutions of few channels safe in channels_last, with the same parameters."""
    for module in model.modules():
        if (
            type(module) is nn.Conv2d and module.kernel_size == (1, 1) and max(module.stride) > 1
            and module.padding == (0, 0) and module.in_channels < 8
        ):  # fmt: skip
            module.__class__ = StridedPointwise
