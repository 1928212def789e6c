"""The mode under which real code computes with fake tensors, and what they answer where torch's own do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lilliput.fake.tensors import is_fake, meta, normalised

aten = torch.ops.aten


class Fake(FakeTensorMode):
    """Computes with fake tensors, in shapes alone, and lets tensors on the meta device pass where torch would stop.

    everything: whatever is made is fake.  Otherwise only what is computed from a fake tensor is: the draw of a cohort
                and the indices of a slice stay real.
    value:      what code is told that reads a number: 1 means yes, finite, due, all of them; 0 means no to all of it.
    drew:       whether a real random number was drawn.
    """

    def __init__(self, everything: bool = False, value: Literal[0, 1] = 1) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.everything, self.value, self.drew = everything, value, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.everything or _any_fake(args) or _any_fake(kwargs.values()):
            answer = _ANSWERS.get(func)
        else:
            answer = _ANSWERS_ON_META.get(func) if args and _on_meta(args[0]) else None
            if answer is None:
                self.drew |= torch.Tag.nondeterministic_seeded in func.tags
                return func(*args, **kwargs)
        out = NotImplemented if answer is None else answer(self, *args, **kwargs)
        if out is not NotImplemented:
            return out
        with self.making():  # an operation that is made of others makes fake tensors on its way
            return super().__torch_dispatch__(func, types, args, kwargs)

    @contextmanager
    def making(self) -> Iterator[None]:
        """Within it, whatever is made is fake."""
        before, self.everything = self.everything, True
        try:
            yield
        finally:
            self.everything = before

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:  # fmt: skip
        """A fake tensor, contiguous without a stride.  No mode sees that it is made."""
        return FakeTensor(self, meta(shape, dtype, stride), torch.device(device))

    def like(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A fake tensor of x's shape, dtype (or another) and order of memory; of a parameter, a parameter.

        It is where x is if x is fake, and on the CPU otherwise.
        """
        made = self._plain(x, dtype)
        return nn.Parameter(made, x.requires_grad) if isinstance(x, nn.Parameter) else made

    def _plain(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        dense = x.untyped_storage().nbytes() == x.numel() * x.element_size()
        return self.empty(x.shape, dtype or x.dtype, x.stride() if dense else None, x.device if is_fake(x) else "cpu")


def _any_fake(values: Iterable[Any]) -> bool:
    return any(is_fake(x) or (isinstance(x, list | tuple) and _any_fake(x)) for x in values)


def _on_meta(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.is_meta


# Answers of the mode to an operation's arguments; NotImplemented leaves it to torch.  Fake tensors either have no
# answer of their own, or take long to find it.


def _value(mode: Fake, x: Tensor) -> Any:
    with torch._C._DisableTorchDispatch():
        return torch.full((), mode.value, dtype=x.dtype).item()


def _equal(mode: Fake, x: Tensor, y: Tensor) -> bool:
    return bool(mode.value)


def _nonzero(mode: Fake, x: Tensor) -> Tensor:
    """All places: the most there can be."""
    return mode.empty((x.numel(), x.dim()), torch.int64, device=x.device)


def _masked_select(mode: Fake, x: Tensor, mask: Tensor) -> Tensor:
    return mode.empty((torch.broadcast_shapes(x.shape, mask.shape).numel(),), x.dtype, device=x.device)


def _copied(
    mode: Fake, x: Tensor, *, dtype: Any = None, device: Any = None, memory_format: Any = None, **options: Any
) -> Any:
    if not is_fake(x) or (device is not None and torch.device(device) != x.device):
        return NotImplemented
    if memory_format in (None, torch.preserve_format):
        return mode._plain(x, dtype)
    if memory_format is torch.contiguous_format:
        return mode.empty(x.shape, dtype or x.dtype, device=x.device)
    return NotImplemented


def _detached(mode: Fake, x: Tensor) -> Tensor:
    if not is_fake(x):
        return NotImplemented
    # Torch's own may leave a weak reference to it behind, with which a module's parameter cannot be moved.
    with torch._C._DisableTorchDispatch():
        empty = torch.empty(0, dtype=x.dtype, device="meta")
        view = empty.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())
    return FakeTensor(mode, view, x.device)


def _overwritten(mode: Fake, x: Tensor, *more: Any, **options: Any) -> Tensor:
    return x


def _foreach(mode: Fake, xs: Sequence[Tensor], *more: Any, **options: Any) -> Any:
    others = [y for ys in more if isinstance(ys, list | tuple) for y in ys if isinstance(y, Tensor)]
    plain = all(x.is_floating_point() for x in xs) and all(y.dtype == x.dtype for x, y in zip(xs, others, strict=False))
    return [mode.empty(x.shape, x.dtype, x.stride(), x.device) for x in xs] if plain else NotImplemented


def _foreach_in_place(mode: Fake, xs: Sequence[Tensor], *more: Any, **options: Any) -> None:
    return None


def _foreach_norm(mode: Fake, xs: Sequence[Tensor], *more: Any, **options: Any) -> list[Tensor]:
    return [mode.empty((), x.dtype, device=x.device) for x in xs]


def _answers() -> dict[Any, Callable[..., Any]]:
    answers: dict[Any, Callable[..., Any]] = {
        aten._local_scalar_dense.default: _value,
        aten.equal.default: _equal,
        aten.nonzero.default: _nonzero,
        aten.masked_select.default: _masked_select,
        aten._to_copy.default: _copied,
        aten.clone.default: _copied,
        aten.copy_.default: _overwritten,
        aten.detach.default: _detached,
        aten._foreach_norm.Scalar: _foreach_norm,
    }
    for name in ("add", "sub", "mul", "div", "copy"):
        for packet, answer in ((f"_foreach_{name}", _foreach), (f"_foreach_{name}_", _foreach_in_place)):
            overloads = getattr(aten, packet)
            answers |= {getattr(overloads, overload): answer for overload in overloads.overloads()}
    return answers


def _from_meta(mode: Fake, x: Tensor, *, device: Any = None, **options: Any) -> Any:
    """A tensor that leaves the meta device becomes fake, as it has no values to take along."""
    there = device is None or torch.device(device).type == "meta"
    return aten._to_copy.default(x, device=device, **options) if there else mode._plain(x, options.get("dtype"))


def _batch_norm_on_meta(mode: Fake, x: Tensor, *more: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return normalised(x)


_ANSWERS = _answers()
_ANSWERS_ON_META: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _value,
    aten.equal.default: _equal,
    aten.native_batch_norm.default: _batch_norm_on_meta,
    aten._to_copy.default: _from_meta,
}
