"""Making tensors without values, and copies of models and batches whose tensors have none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

T = TypeVar("T")


def meta(shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> Tensor:
    """A tensor on the meta device, contiguous without a stride.  No mode sees that it is made."""
    with torch._C._DisableTorchDispatch():
        if stride is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def like(x: Tensor, device: torch.device | str = "meta") -> Tensor:
    """An empty tensor of x's shape, dtype and order of memory on a device; of a parameter, a parameter.

    Modes see that it is made: under `Fake(everything=True)` it is fake on any device, and `Instrument` counts it.
    """
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return nn.Parameter(made, x.requires_grad) if isinstance(x, nn.Parameter) else made


def normalised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a norm makes of a meta tensor, and its statistics.  torch would import its compiler to find that out."""
    statistics = x.new_empty(x.shape[1:2])
    return torch.empty_like(x), statistics, statistics.clone()


def is_fake(x: Any) -> bool:
    """Whether this is a fake tensor."""
    return isinstance(x, FakeTensor)


class Copies(TorchFunctionMode):
    """Within it, `make` makes the deep copies of fake tensors, and with `real=True` those of real tensors too.

    The address of a fake tensor's memory is 0.
    """

    def __init__(self, make: Callable[[Tensor], Tensor], real: bool = False):
        super().__init__()
        self._make, self._real = make, real

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and (self._real or is_fake(args[0])):
            x, memo = args
            return memo[id(x)] if id(x) in memo else memo.setdefault(id(x), self._make(x))
        if func is Tensor.data_ptr and is_fake(args[0]):
            return 0
        if func is Tensor.clone and self._real:  # a real parameter's deep copy calls it
            return self._make(args[0])
        return func(*args, **(kwargs or {}))


def copied(value: T, make: Callable[[Tensor], Tensor] = like) -> T:
    """A deep copy of anything (a model, a task) in which `make` has made every tensor; on the meta device by default.

    Tensors that are tied stay tied.
    """
    with Copies(make, real=True):
        return copy.deepcopy(value)
