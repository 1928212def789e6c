"""Placeholders: tensors in place of values that only the other side of a cut has.

Operations on them only work out shapes, and whatever they touch becomes a placeholder too.  A part of a model is the
original with placeholders for all that is the other part's: its code runs unchanged, what it can compute by itself
(masks, positions, rotary tables) comes out real, and a placeholder says what depends on anything private.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lilliput.fake.tensors import meta, normalised

aten = torch.ops.aten
# What Python reads of a placeholder decides as zeros would: the same on every batch.
READS = {aten._local_scalar_dense.default: 0, aten.equal.default: False}
NORMS = (aten.native_batch_norm.default, aten.native_layer_norm.default, aten.native_group_norm.default)


class Placeholder(Tensor):
    """A tensor with a shape, a dtype and a device, and neither memory nor values.

    meta:    a meta tensor of its shape, strides and dtype.
    sources: what it depends on: names of inputs, parameters and outputs of modules that only the other side has.
    """

    meta: Tensor
    sources: frozenset[str]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device, sources: frozenset[str]) -> Placeholder:
        return Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device, storage_size=0
        )

    def __init__(self, meta: Tensor, device: torch.device, sources: frozenset[str]):
        self.meta, self.sources = meta, sources

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *sources: str) -> Placeholder:
        """A contiguous one."""
        return cls(meta(shape, dtype), device, frozenset(sources))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Placeholder({tuple(self.shape)}, {self.dtype}, {sorted(self.sources)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Placeholder:
        return memo.setdefault(id(self), Placeholder(self.meta, self.device, self.sources))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Placeholder.of, (tuple(self.shape), self.dtype, self.device, *self.sources)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in READS:
            return READS[func]
        inputs = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        own = [x for x in inputs if isinstance(x, Placeholder)]
        sources = frozenset().union(*(x.sources for x in own))
        if func._schema.is_mutable and not isinstance(inputs[0], Placeholder):
            raise ValueError(f"what the server computes depends on {listed(sources)}")
        args, kwargs = tree_map_only(Tensor, _as_meta, (args, kwargs or {}))
        # A part that was cut on the meta device and then given weights has placeholders that stay there.
        devices = [x.device for x in own if x.device.type != "meta"]
        device = kwargs.get("device") or (devices[0] if devices else own[0].device)
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        with torch._C._DisableTorchDispatch():  # no mode that counts or fakes operations sees these
            out = normalised(args[0]) if func in NORMS else func(*args, **kwargs)
        if func._schema.is_mutable and isinstance(out, Tensor):
            return inputs[0]
        return tree_map_only(Tensor, lambda x: Placeholder(x, device, sources), out)


def _as_meta(x: Tensor) -> Tensor:
    return x.meta if isinstance(x, Placeholder) else meta(x.shape, x.dtype, x.stride())


def listed(sources: frozenset[str]) -> str:
    """What something depends on, for a message."""
    first = sorted(sources)[:4]
    return f"{', '.join(first)}{' and more' if len(sources) > len(first) else ''}, which the client has"
