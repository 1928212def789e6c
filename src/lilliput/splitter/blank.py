"""Tensors that stand for values which the other side has: a shape, a type and a device, but no memory and no values.

Operations on them only work out shapes, and whatever they touch becomes blank too.  A part of a model is the original
with blank tensors for all that is the other part's: its code runs unchanged, what it can compute by itself (masks,
positions, rotary tables) comes out real, and what depends on anything private is known by being blank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default: 0, aten.equal.default: False}
REMEMBERED = 256  # shapes of a call
NORMS = (aten.native_batch_norm.default, aten.native_layer_norm.default, aten.native_group_norm.default)


class Blank(Tensor):
    """A tensor without values.

    outline: a meta tensor of its shape, strides and type.
    origin:  what it depends on: names of inputs, parameters and outputs of modules that only the other side has.
    """

    outline: Tensor
    origin: frozenset[str]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, outline: Tensor, device: torch.device, origin: frozenset[str]) -> Blank:
        return Tensor._make_wrapper_subclass(
            cls, outline.shape, strides=outline.stride(), dtype=outline.dtype, device=device, storage_size=0
        )

    def __init__(self, outline: Tensor, device: torch.device, origin: frozenset[str]):
        self.outline, self.origin = outline, origin

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Blank({tuple(self.shape)}, {self.dtype}, {sorted(self.origin)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Blank:
        return memo.setdefault(id(self), Blank(self.outline, self.device, self.origin))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return blank, (tuple(self.shape), self.dtype, self.device, tuple(self.origin))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in READS:  # a decision in Python: blank tensors decide as zeros, the same on every batch
            return READS[func]
        inputs = [x for x in _leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        blanks = [x for x in inputs if isinstance(x, Blank)]
        origin = frozenset().union(*(x.origin for x in blanks))
        if func._schema.is_mutable and not isinstance(inputs[0], Blank):
            raise ValueError(f"what the server computes depends on {listed(origin)}")
        args, kwargs = tree_map(_outline, (args, kwargs or {}))
        # A part that was cut on the meta device and then given weights has blank parameters that stay there.
        places = [x.device for x in blanks if x.device.type != "meta"]
        device = kwargs.get("device") or (places[0] if places else blanks[0].device)
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        with torch._C._DisableTorchDispatch():  # whoever counts or fakes operations: these are none
            out = normalised(args[0]) if func in NORMS else func(*args, **kwargs)
        if func._schema.is_mutable and isinstance(out, Tensor):
            return inputs[0]
        return tree_map(lambda x: Blank(x, device, origin) if isinstance(x, Tensor) else x, out)


def normalised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a norm makes of a meta tensor, and its statistics.  torch would import its compiler to find that out."""
    statistics = x.new_empty(x.shape[1:2])
    return torch.empty_like(x), statistics, statistics.clone()


def _outline(x: Any) -> Any:
    if isinstance(x, Blank):
        return x.outline
    return _meta(x.shape, x.dtype, x.stride()) if isinstance(x, Tensor) else x


def _meta(shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> Tensor:
    with torch._C._DisableTorchDispatch():
        if stride is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def listed(origin: frozenset[str]) -> str:
    """What something depends on, for a message."""
    first = sorted(origin)[:4]
    return f"{', '.join(first)}{' and more' if len(origin) > len(first) else ''}, which the client has"


def blank(shape: Any, dtype: torch.dtype, device: torch.device, origin: Any) -> Blank:
    """A blank tensor of this shape."""
    return Blank(_meta(shape, dtype), device, frozenset(origin))


def blanked(x: Tensor, *origin: str) -> Blank:
    """A blank tensor like x."""
    return blank(x.shape, x.dtype, x.device, origin)


def _leaves(values: Any) -> Iterator[Any]:
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        yield values
        return
    for value in values:
        yield from _leaves(value)


class Outline:
    """The forward of a module whose parameters are elsewhere: shapes of what it returns, by those of what it takes.

    The module's own code finds them out once and they are remembered.  Given tensors with values, or if some of what
    it returns has values, the module just runs.
    """

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        self.known: dict[Any, Any] = {}

    def __reduce__(self) -> Any:
        return Outline, (self.module, self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward: Callable[..., Any] = type(self.module).forward
        taken = list(_leaves((args, kwargs)))
        if not any(isinstance(x, Blank) for x in taken):
            return forward(self.module, *args, **kwargs)
        kinds = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else _constant(x) for x in taken)
        autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        key = (kinds, tuple(kwargs), self.module.training, autocast)
        if key in self.known:
            return tree_map(self._fresh, self.known[key])
        with _disable_current_modes():  # nothing is computed here, and nobody is to count it
            out = tree_map(self._fresh, forward(self.module, *args, **kwargs))
        if all(isinstance(x, Blank) or not isinstance(x, Tensor) for x in _leaves(out)):
            if len(self.known) == REMEMBERED:
                self.known.clear()
            self.known[key] = out
        return out

    def _fresh(self, x: Any) -> Any:
        return Blank(x.outline, x.device, frozenset([f"the output of {self.name}"])) if isinstance(x, Blank) else x


def _constant(x: Any) -> Any:
    return x if isinstance(x, bool | int | float | str | None) else type(x)
