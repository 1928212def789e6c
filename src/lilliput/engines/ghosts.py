"""Ghosts: tensors of any size without memory, that have a shape, a dtype and a place, and no values.

They are torch's fake tensors, on the CPU.  What is computed with a ghost is a ghost; what is computed from real
tensors alone (the draw of a cohort, the indices of a slice) stays real.  Whoever asks a ghost for its value is told
one, or true: finite, due, all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

T = TypeVar("T")
aten = torch.ops.aten


class Ghosts(FakeTensorMode):
    """Makes ghosts and, while it is entered, computes with them.

    drew: whether a random number was drawn that is no ghost.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.haunts = self.drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (self.haunts or _has_ghost(args) or _has_ghost(kwargs.values())):
            if func is aten._to_copy.default and args[0].is_meta:
                return self.of(args[0])
            self.drew |= torch.Tag.nondeterministic_seeded in func.tags
            return func(*args, **kwargs)
        answer = _ANSWERS.get(func)
        out = NotImplemented if answer is None else answer(self, *args, **kwargs)
        if out is not NotImplemented:
            return out
        with self.haunting():  # an operation that is made of others makes ghosts on its way
            return super().__torch_dispatch__(func, types, args, kwargs)

    @contextmanager
    def haunting(self) -> Iterator[None]:
        """Whatever is made inside is a ghost."""
        before, self.haunts = self.haunts, True
        try:
            yield
        finally:
            self.haunts = before

    def new(self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> Tensor:
        """A ghost; contiguous without a stride."""
        where: dict[str, Any] = {"dtype": dtype, "device": "meta"}
        with torch._C._DisableTorchDispatch():
            empty = torch.empty_strided(shape, stride, **where) if stride else torch.empty(shape, **where)
        return FakeTensor(self, empty, torch.device("cpu"))

    def of(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A ghost of x's shape, dtype (or another) and order of memory; of a parameter, a parameter."""
        dense = x.untyped_storage().nbytes() == x.numel() * x.element_size()
        ghost = self.new(x.shape, dtype or x.dtype, x.stride() if dense else None)
        return nn.Parameter(ghost, x.requires_grad) if isinstance(x, nn.Parameter) else ghost


class Copies(TorchFunctionMode):
    """While it is entered, deep copies of ghosts are ghosts; with `real`, those of real tensors too.

    A ghost's memory lies at the address 0.
    """

    def __init__(self, ghosts: Ghosts, real: bool = False):
        super().__init__()
        self._ghosts, self._real = ghosts, real

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and (self._real or is_ghost(args[0])):
            x, memo = args
            return memo[id(x)] if id(x) in memo else memo.setdefault(id(x), self._ghosts.of(x))
        if func is Tensor.data_ptr and is_ghost(args[0]):
            return 0
        if func is Tensor.clone and self._real:  # what a parameter's own deep copy calls
            return self._ghosts.of(args[0])
        return func(*args, **(kwargs or {}))


def copied(value: T, ghosts: Ghosts) -> T:
    """A deep copy of anything, its tensors turned into ghosts."""
    with Copies(ghosts, real=True):
        return copy.deepcopy(value)


def is_ghost(x: Any) -> bool:
    """Whether this is a tensor without values."""
    return isinstance(x, FakeTensor)


def _has_ghost(values: Iterable[Any]) -> bool:
    return any(is_ghost(x) or (isinstance(x, list | tuple) and _has_ghost(x)) for x in values)


# What takes fake tensors long, for its operands one by one, and what they do not answer at all.


def _value(ghosts: Ghosts, x: Tensor) -> Any:
    return torch.ones((), dtype=x.dtype).item() if is_ghost(x) else NotImplemented


def _all_places(ghosts: Ghosts, x: Tensor) -> Tensor:
    return ghosts.new((x.numel(), x.dim()), torch.int64)


def _all_values(ghosts: Ghosts, x: Tensor, mask: Tensor) -> Tensor:
    return ghosts.new((torch.broadcast_shapes(x.shape, mask.shape).numel(),), x.dtype)


def _same(ghosts: Ghosts, x: Tensor, *more: Any, **options: Any) -> Any:
    return ghosts.of(x) if not options and is_ghost(x) else NotImplemented


def _moved(ghosts: Ghosts, x: Tensor, *, dtype: Any = None, memory_format: Any = None, **where: Any) -> Any:
    if not is_ghost(x):
        return NotImplemented
    if memory_format in (None, torch.preserve_format):
        return ghosts.of(x, dtype)
    return ghosts.new(x.shape, dtype or x.dtype) if memory_format is torch.contiguous_format else NotImplemented


def _detached(ghosts: Ghosts, x: Tensor) -> Tensor:
    # Torch's own may leave a weak reference to it behind, with which a module's parameter cannot be moved.
    with torch._C._DisableTorchDispatch():
        empty = torch.empty(0, dtype=x.dtype, device="meta")
        seen = empty.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())
    return FakeTensor(ghosts, seen, torch.device("cpu"))


def _overwritten(ghosts: Ghosts, x: Tensor, *more: Any, **options: Any) -> Tensor:
    return x


def _nothing(ghosts: Ghosts, xs: Sequence[Tensor], *more: Any, **options: Any) -> None:
    return None


def _each(ghosts: Ghosts, xs: Sequence[Tensor], *more: Any, **options: Any) -> Any:
    others = [y for ys in more if isinstance(ys, list | tuple) for y in ys if isinstance(y, Tensor)]
    plain = all(x.is_floating_point() for x in xs) and all(y.dtype == x.dtype for x, y in zip(xs, others, strict=False))
    return [ghosts.new(x.shape, x.dtype, x.stride()) for x in xs] if plain else NotImplemented


def _norms(ghosts: Ghosts, xs: Sequence[Tensor], *more: Any, **options: Any) -> list[Tensor]:
    return [ghosts.new((), x.dtype) for x in xs]


def _answers() -> dict[Any, Callable[..., Any]]:
    found: dict[Any, Callable[..., Any]] = {
        aten._local_scalar_dense.default: _value,
        aten.equal.default: lambda ghosts, x, y: True,
        aten.nonzero.default: _all_places,
        aten.masked_select.default: _all_values,
        aten._to_copy.default: _moved,
        aten.clone.default: _moved,
        aten.copy_.default: _overwritten,
        aten.detach.default: _detached,
    }
    for name in ("add", "sub", "mul", "div", "copy"):
        for packet, answer in ((f"_foreach_{name}", _each), (f"_foreach_{name}_", _nothing)):
            overloads = getattr(aten, packet)
            found |= {getattr(overloads, overload): answer for overload in overloads.overloads()}
    return found | {aten._foreach_norm.Scalar: _norms}


_ANSWERS = _answers()
