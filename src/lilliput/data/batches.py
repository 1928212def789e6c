"""Batches: a client's data, cut into batches, in an order that depends on a generator alone.

A batch is a tuple or dict of tensors whose dimension 0 is the example.  Clients hold contiguous tensors; an epoch is
one gather by a permutation and its batches are views of the result, or copies of what is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from lilliput.core.labels import cloned, count, counted, counted_in, labels

Batch = Any
Transform = Callable[[Tensor, "torch.Generator | None"], Tensor]


class Batches(Protocol):
    """A client's or a test set's data.

    It may say by `counted()` how many of its labels count (see `lilliput.core.labels`); else every example counts as
    one.
    """

    examples: int

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, generator: torch.Generator | None) -> Iterator[Batch]:
        """One pass: in an order the generator draws, or in the given order and without augmentation for None.

        A model may change what it is given, so batches share no memory with what the next epoch gives.
        """


class ListBatches:
    """Explicit batches, always in the order given."""

    def __init__(self, batches: Sequence[Batch]):
        self._batches = list(batches)
        self.examples = sum(count(batch) for batch in self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def counted(self) -> int:
        return sum(counted(labels(batch)) for batch in self._batches)

    def cut(self) -> tuple[Any, ...]:
        """How the data is cut: the length of each batch."""
        return tuple(map(count, self._batches))

    def epoch(self, generator: torch.Generator | None) -> Iterator[Batch]:
        return map(cloned, self._batches)


class ArrayBatches:
    """Columns of tensors, shuffled per epoch and cut into batches; `transform` is applied to a batch's first column.

    columns: tensors of equal length; index: which of their rows are meant, all for None.
    """

    def __init__(
        self, columns: Sequence[Tensor], batch_size: int, *, index: Tensor | None = None,
        transform: Transform | None = None, drop_last: bool = False,
    ):  # fmt: skip
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self._columns = tuple(x if index is None else x[index] for x in columns)
        self._size, self._transform, self._drop_last = batch_size, transform, drop_last
        self.examples = len(self._columns[0])

    def like(self, change: Callable[[Tensor], Tensor]) -> ArrayBatches:
        """The same batches of other columns."""
        columns = [change(x) for x in self._columns]
        return ArrayBatches(columns, self._size, transform=self._transform, drop_last=self._drop_last)

    def cut(self) -> tuple[Any, ...]:
        """How the data is cut and changed: examples of a batch, whether a rest is left out, the transform."""
        return self._size, self._drop_last, self._transform

    def counted(self) -> int:
        return counted(labels(self._columns))

    def __len__(self) -> int:
        whole, rest = divmod(self.examples, self._size)
        return whole + (rest > 0 and not (self._drop_last and whole))

    def epoch(self, generator: torch.Generator | None) -> Iterator[Batch]:
        columns = self._columns
        if generator is not None:
            order = torch.randperm(self.examples, generator=generator)
            columns = tuple(x.index_select(0, order) for x in columns)
        for batch in islice(zip(*(x.split(self._size) for x in columns), strict=True), len(self)):
            if generator is None:
                batch = cloned(batch)
            if self._transform is not None:
                batch = (self._transform(batch[0], generator), *batch[1:])
            yield batch


class Pooled:
    """The data of several owners as one: with a generator their batches come in an order it draws."""

    def __init__(self, parts: Sequence[Batches]):
        self._parts = list(parts)
        self.examples = sum(part.examples for part in self._parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def counted(self) -> int:
        return sum(counted_in(part) for part in self._parts)

    def cut(self) -> tuple[Any, ...]:
        """How each owner's data is cut."""
        return tuple(part.cut() if hasattr(part, "cut") else len(part) for part in self._parts)

    def epoch(self, generator: torch.Generator | None) -> Iterator[Batch]:
        streams = [part.epoch(generator) for part in self._parts]
        turns = torch.tensor([i for i, part in enumerate(self._parts) for _ in range(len(part))])
        if generator is not None:
            turns = turns[torch.randperm(len(turns), generator=generator)]
        for i in turns.tolist():
            yield next(streams[i])


def pooled(parts: Sequence[Batches]) -> Batches:
    """All parts' data in one place: shuffled together where they are tensors, batch by batch otherwise."""
    first = parts[0]
    if all(isinstance(p, ArrayBatches) for p in parts):
        columns = [torch.cat(xs) for xs in zip(*(p._columns for p in parts), strict=True)]  # type: ignore[attr-defined]
        return ArrayBatches(columns, first._size, transform=first._transform)  # type: ignore[attr-defined]
    if hasattr(first, "joined") and all(type(p) is type(first) for p in parts):
        return first.joined(parts[1:])
    return Pooled(parts)


def as_batches(data: Batches | Sequence[Batch]) -> Batches:
    """Batches as they are; a sequence of explicit batches as batches in that order."""
    return data if hasattr(data, "epoch") else ListBatches(data)  # type: ignore[return-value, arg-type]
