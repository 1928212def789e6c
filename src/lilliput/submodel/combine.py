"""Combines replies: streaming sums over trees of any slice, in the memory of one model.

Each coordinate is averaged over the clients that hold it; a coordinate that nobody holds stays (HeteroFL, eq. 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lilliput.core import tree
from lilliput.core.fleet import Reply
from lilliput.core.tree import Tree
from lilliput.submodel.slices import WHOLE, Slice

Weight = Literal["labels", "uniform"]


class Accumulator(Protocol):
    """A running sum over one key of the replies."""

    def add(self, reply: Reply, value: Any, held: Slice) -> None: ...

    def result(self) -> Any: ...


class Combine(Protocol):
    """How the deltas of a round become one delta."""

    def over(self, x: Tree | None) -> Accumulator:
        """An accumulator for deltas of x or of its slices; for None, of plain numbers with the same weights."""

    def finished(self, delta: Tree) -> Tree:
        """What is added to the global model, given the change that the accumulators and the method made."""


class _TreeSum:
    """sum_i w_i d_i and, with slices, the total weight of each coordinate.

    Weights are relative to the first reply's, so that the mean of a single client is its delta to the last bit.  Sums
    are in float32 at least: in bfloat16, 256 + 1 is 256.  If all weights are 0, x stays as it is.

    Raises ValueError if an entry of x has no mean.
    """

    def __init__(self, x: Tree, weigh: Callable[[Reply], float], divide: bool):
        for name, entry in x.items():
            if entry.dtype == torch.bool:
                raise ValueError(f"{name} is true or false, which has no mean; use buffers=local, or make it a number")
        self._x = x
        self._weigh = weigh
        self._divide = divide
        self._unit = 0.0
        self._mass = 0.0
        self._replied = False
        self._total: Tree = {}
        self._coverage: Tree | None = None

    def add(self, reply: Reply, value: Tree, held: Slice) -> None:
        self._replied = True
        if not self._weigh(reply):  # its weight is 0, so it changes nothing
            return
        self._unit = self._unit or self._weigh(reply)
        weight = self._weigh(reply) / self._unit
        if not held.is_full and self._divide and self._coverage is None:
            self._coverage = {n: torch.full_like(x, self._mass, dtype=_counted(x)) for n, x in self._x.items()}
        first = not self._total
        if first and not (held.is_full and value.keys() == self._x.keys()):
            self._total = {n: torch.zeros_like(x, dtype=_summed(x)) for n, x in self._x.items()}
            first = False
        if first:  # its weight is 1, so a copy saves a pass over zeros
            self._total = {n: value[n].to(_summed(x), copy=True) for n, x in self._x.items()}
        else:
            wide = {n: d.to(_summed(self._x[n])) for n, d in value.items()}
            if held.is_full:
                tree.add_(self._total, wide, weight)
            else:
                held.scatter_add(wide, self._total, weight)
        if self._coverage is not None:
            held.scatter_add({n: torch.ones(()).expand(d.shape) for n, d in value.items()}, self._coverage, weight)
        self._mass += weight

    def result(self) -> Tree:
        if not self._replied:
            raise ValueError("no client replied, so there is nothing to combine")
        if not self._mass:
            return tree.zeros_like(self._x)
        if self._divide and self._coverage is not None:
            for name, total in self._total.items():
                total.div_(self._coverage[name].masked_fill_(self._coverage[name] == 0, 1.0))
        elif self._divide and self._total:
            torch._foreach_div_(list(self._total.values()), self._mass)
        elif self._total:
            torch._foreach_mul_(list(self._total.values()), self._unit)
        return {n: _cast(d, self._x[n].dtype) for n, d in self._total.items()}


def _summed(x: Tensor) -> torch.dtype:
    if x.is_complex():
        return torch.promote_types(x.dtype, torch.complex64)
    return torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.double


def _counted(x: Tensor) -> torch.dtype:
    return torch.double if _summed(x) in (torch.double, torch.complex128) else torch.float32


def _cast(d: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a mean to an entry's dtype.  Truncates for integers (BatchNorm's counters), but not rounding errors."""
    if not (dtype.is_floating_point or dtype.is_complex):
        near = d.round()
        d = torch.where((d - near).abs() <= 1e-9 * near.abs(), near, d)
    return d.to(dtype)


class _NumberSum:
    def __init__(self, weigh: Callable[[Reply], float], divide: bool):
        self._weigh, self._divide = weigh, divide
        self._total = self._mass = 0.0
        self._replied = False

    def add(self, reply: Reply, value: float, held: Slice) -> None:
        self._replied = True
        self._total += self._weigh(reply) * value
        self._mass += self._weigh(reply)

    def result(self) -> float:
        if not self._replied:
            raise ValueError("no client replied, so there is nothing to combine")
        return self._total / (self._mass or 1.0) if self._divide else self._total


@dataclass(frozen=True)
class Mean:
    """The mean over the clients that hold a coordinate, weighted by their labels that count, or equally."""

    weight: Weight = "labels"

    def over(self, x: Tree | None) -> Any:
        """An accumulator of trees shaped like x or its slices; for None, of plain numbers."""
        weigh = _WEIGHTS[self.weight]
        return _NumberSum(weigh, divide=True) if x is None else _TreeSum(x, weigh, divide=True)

    def finished(self, delta: Tree) -> Tree:
        return delta

    def __call__(self, x: Tree, replies: Iterable[Reply], held: Mapping[int, Slice]) -> Tree:
        """x plus the mean of the replies' `delta`, finished."""
        return tree.add(x, self.finished(reduce(replies, held, delta=self.over(x))["delta"]))


@dataclass(frozen=True)
class Sum:
    """The sum over the clients that hold a coordinate: plain, or weighted by their labels that count."""

    weight: Weight = "uniform"

    def over(self, x: Tree | None) -> Any:
        weigh = _WEIGHTS[self.weight]
        return _NumberSum(weigh, divide=False) if x is None else _TreeSum(x, weigh, divide=False)

    def finished(self, delta: Tree) -> Tree:
        return delta


def _one(reply: Reply) -> float:
    return 1.0


def _labels(reply: Reply) -> float:
    return float(reply.weight)


_WEIGHTS: dict[str, Callable[[Reply], float]] = {"labels": _labels, "uniform": _one}


def weighted_mean() -> Mean:
    """The mean weighted by each client's labels that count, so by its examples for classification (FedAvg)."""
    return Mean("labels")


def uniform_mean() -> Mean:
    """The mean in which every client has the same weight, whatever its amount of data (SCAFFOLD)."""
    return Mean("uniform")


def reduce(replies: Iterable[Reply], held: Mapping[int, Slice] | None = None, /, **sums: Accumulator) -> dict[str, Any]:
    """Add each key of the replies to its accumulator, in one pass; returns the results by key.

    held: client -> slice; a client that it does not name holds the whole model.
    Raises ValueError if no client replied.
    """
    for reply in replies:
        for key, accumulator in sums.items():
            accumulator.add(reply, reply.body[key], held.get(reply.client, WHOLE) if held else WHOLE)
    return {key: accumulator.result() for key, accumulator in sums.items()}
