"""Slices: the part of a model that a client holds, as indices along each axis.

An axis is a direction in which a model can be cut: the width of a stage, its heads, its depth.  Gathering by a slice
extracts the sub-model; scattering by the same slice puts its values back in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lilliput.core.tree import Body, Tree

Layout = Mapping[str, Sequence[tuple[str, int]]]


@dataclass(frozen=True, eq=False)
class Slice:
    """The sorted global indices that a client holds along each axis.

    axes:   axis name -> int64 indices [held], ascending.  The client holds all of an axis that is not named.
    layout: axis name -> the (parameter, dimension) pairs it runs along.  An axis that the layout does not name is one
            dimension of one parameter, written "<parameter>:<dimension>".
    A parameter with an axis without indices is not part of the sub-model.
    """

    axes: dict[str, Tensor] = field(default_factory=dict)
    layout: Layout = field(default_factory=dict)
    _cuts: dict[str, dict[int, Tensor]] = field(init=False, repr=False)  # parameter -> dimension -> indices

    def __post_init__(self) -> None:
        cuts: dict[str, dict[int, Tensor]] = {}
        for axis, index in self.axes.items():
            if index.dtype != torch.int64 or index.dim() != 1 or bool((index[1:] <= index[:-1]).any()):
                raise ValueError(f"axis {axis!r} of a slice needs one int64 vector of ascending, distinct indices")
            for name, dim in self.layout.get(axis) or [_parse(axis)]:
                if dim in cuts.setdefault(name, {}):
                    raise ValueError(f"dimension {dim} of {name!r} is cut by two axes, one of them {axis!r}")
                cuts[name][dim] = index
        object.__setattr__(self, "_cuts", cuts)

    @property
    def is_full(self) -> bool:
        """Whether the slice is the whole model."""
        return not self.axes

    def body(self) -> Body:
        """The slice as part of a message; empty for the whole model."""
        layout = {axis: "\n".join(f"{name}:{dim}" for name, dim in self.layout.get(axis, ())) for axis in self.axes}
        return {"axes": self.axes, "layout": layout} if self.axes else {}

    @staticmethod
    def of(body: Body) -> Slice:
        """The slice of a `body()`."""
        if not body:
            return WHOLE
        layout = {axis: [_parse(line) for line in text.split("\n")] for axis, text in body["layout"].items() if text}
        return Slice(body["axes"], layout)

    def _cut(self, name: str) -> dict[int, Tensor]:
        return self._cuts.get(name, {})

    def gather(self, tree: Tree) -> Tree:
        """The sub-model's tree.  Does not copy a tensor that the client holds whole."""
        if self.is_full:
            return tree
        out = {}
        for name, x in tree.items():
            cut = self._cut(name)
            if any(index.numel() == 0 for index in cut.values()):
                continue
            for dim, index in cut.items():
                if int(index[-1]) >= x.shape[dim]:
                    raise ValueError(f"slice holds index {int(index[-1])} of {name!r}:{dim}, which has {x.shape[dim]}")
                x = x.index_select(dim, index)
            out[name] = x
        return out

    def scatter(self, tree: Tree, into: Tree) -> Tree:
        """Write the sub-model's tensors into the full model's tree `into`, in place; returns it."""
        for name, x in tree.items():
            into[name][self.index(name, into[name])] = x
        return into

    def scatter_add(self, tree: Tree, into: Tree, alpha: float = 1.0) -> Tree:
        """into += alpha * tree on the slice's coordinates, in place; returns it."""
        for name, x in tree.items():
            if self._cut(name):
                into[name][self.index(name, into[name])] += alpha * x
            else:
                into[name].add_(x, alpha=alpha)
        return into

    def index(self, name: str, full: Tensor) -> Any:
        """The index of the slice's coordinates in the full tensor (an open mesh of the cut dimensions)."""
        cut = self._cut(name)
        if not cut:
            return Ellipsis
        indices = [cut.get(d, torch.arange(full.shape[d])) for d in range(full.dim())]
        return tuple(index.view([-1 if i == d else 1 for i in range(full.dim())]) for d, index in enumerate(indices))


def _parse(axis: str) -> tuple[str, int]:
    name, _, dim = axis.rpartition(":")
    if not name or not dim.isdigit():
        raise ValueError(f"axis {axis!r} is not in the layout and not written '<parameter>:<dimension>'")
    return name, int(dim)


SliceRule = Callable[[Any, int], Slice]  # (fleet, client) -> the slice that the client holds in this round


@runtime_checkable
class Tiered(Protocol):
    """A slice rule whose slices are those of a few tiers of clients."""

    def tiers(self, model: nn.Module) -> list[Slice]: ...


@dataclass(frozen=True)
class full:
    """Every client holds and trains the whole model."""

    def __call__(self, fleet: Any, client: int) -> Slice:
        return WHOLE


WHOLE = Slice()
