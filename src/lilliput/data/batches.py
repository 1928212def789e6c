"""A client's data cut into batches, in an order that depends only on a generator.

A batch is a tuple or dict of tensors whose dimension 0 is the example.  Clients hold contiguous tensors.  An epoch
gathers them once by a permutation, and its batches are views of the result; without a permutation they are copies.
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
    """The data of a client or of a test set.

    An optional method `counted()` returns how many of its labels count (see `lilliput.core.labels`); without it every
    example counts as one.
    """

    examples: int

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, generator: torch.Generator | None) -> Iterator[Batch]:
        """One pass, in an order that the generator draws; None keeps the order and does not augment.

        A model may change its input, so batches share no memory with those of the next epoch.
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
        """How the data are cut: the length of each batch."""
        return tuple(map(count, self._batches))

    def epoch(self, generator: torch.Generator | None) -> Iterator[Batch]:
        return map(cloned, self._batches)


class ArrayBatches:
    """Columns of tensors, shuffled each epoch and cut into batches; `transform` changes a batch's first column.

    columns: tensors of equal length; index: the rows to use, None for all.
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
        """The same batches with `change` applied to each column."""
        columns = [change(x) for x in self._columns]
        return ArrayBatches(columns, self._size, transform=self._transform, drop_last=self._drop_last)

    def cut(self) -> tuple[Any, ...]:
        """How the data are cut and changed: the batch size, whether a last short batch is dropped, the transform."""
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
    """The data of several owners as one; a generator draws the order of their batches."""

    def __init__(self, parts: Sequence[Batches]):
        self._parts = list(parts)
        self.examples = sum(part.examples for part in self._parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def counted(self) -> int:
        return sum(counted_in(part) for part in self._parts)

    def cut(self) -> tuple[Any, ...]:
        """How each owner's data are cut."""
        return tuple(part.cut() if hasattr(part, "cut") else len(part) for part in self._parts)

    def epoch(self, generator: torch.Generator | None) -> Iterator[Batch]:
        streams = [part.epoch(generator) for part in self._parts]
        turns = torch.tensor([i for i, part in enumerate(self._parts) for _ in range(len(part))])
        if generator is not None:
            turns = turns[torch.randperm(len(turns), generator=generator)]
        for i in turns.tolist():
            yield next(streams[i])


def pooled(parts: Sequence[Batches]) -> Batches:
    """All parts as one: shuffled example by example if they are tensors, else batch by batch."""
    first = parts[0]
    if all(isinstance(p, ArrayBatches) for p in parts):
        columns = [torch.cat(xs) for xs in zip(*(p._columns for p in parts), strict=True)]  # type: ignore[attr-defined]
        return ArrayBatches(columns, first._size, transform=first._transform)  # type: ignore[attr-defined]
    if hasattr(first, "joined") and all(type(p) is type(first) for p in parts):
        return first.joined(parts[1:])
    return Pooled(parts)


def as_batches(data: Batches | Sequence[Batch]) -> Batches:
    """Return `Batches` unchanged, and wrap a sequence of explicit batches, which keep their order."""
    return data if hasattr(data, "epoch") else ListBatches(data)  # type: ignore[return-value, arg-type]
