"""Batches of token sequences of different lengths for language models, padded to the longest in each batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lilliput.core.labels import IGNORED
from lilliput.data.batches import Batch


class TokenBatches:
    """Token sequences, shuffled each epoch and cut into batches.

    A batch is a dict of int64 (examples, longest - 1): `input_ids`; `attention_mask`, 1 for real tokens; and `labels`,
    the next token at every position, or -100 if that token does not count.

    columns: tokens (N, L), and spans (N, 2): the index of the first token that counts, and the number of tokens.
    index:   the rows to use, None for all.
    bucket:  how many batches are sorted by length together; 1 does not sort.
    """

    def __init__(self, columns: Sequence[Tensor], batch_size: int, *, index: Tensor | None = None, bucket: int = 1):
        for name, value in (("batch_size", batch_size), ("bucket", bucket)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        # Rows are gathered per batch, because a client's share of the columns may not fit in memory.
        self._columns, self._index = tuple(columns), torch.arange(len(columns[0])) if index is None else index
        self._size, self._bucket = batch_size, bucket
        self.examples = len(self._index)

    def joined(self, others: Sequence[TokenBatches]) -> TokenBatches:
        """The examples of this and the others as one."""
        parts, index = (self, *others), None
        columns = list(self._columns)
        if all(x is y for part in others for x, y in zip(columns, part._columns, strict=True)):
            index = torch.cat([part._index for part in parts])
        else:
            columns = [torch.cat([part._columns[i][part._index] for part in parts]) for i in range(len(columns))]
        return TokenBatches(columns, self._size, index=index, bucket=self._bucket)

    def counted(self) -> int:
        first, length = self._columns[1][self._index].unbind(1)
        return int((length - first.clamp(min=1)).clamp(min=0).sum())

    def cut(self) -> tuple[Any, ...]:
        """How the data are cut: the batch size, and how many batches are sorted by length together."""
        return self._size, self._bucket

    def __len__(self) -> int:
        return -(-self.examples // self._size)

    def epoch(self, generator: torch.Generator | None) -> Iterator[Batch]:
        for rows in self._rows(generator):
            yield self._batch(rows)

    def _rows(self, generator: torch.Generator | None) -> list[Tensor]:
        """The rows of each batch."""
        if generator is None:
            order = torch.arange(self.examples)
        else:
            order = torch.randperm(self.examples, generator=generator)
        if self._bucket == 1:
            return list(order.split(self._size))
        lengths = self._columns[1][self._index, 1]
        pools = order.split(self._bucket * self._size)
        sorted_pools = [pool[lengths[pool].argsort(stable=True)] for pool in pools]
        batches = [rows for pool in sorted_pools for rows in pool.split(self._size)]
        turns = range(len(batches)) if generator is None else torch.randperm(len(batches), generator=generator).tolist()
        return [batches[i] for i in turns]

    def _batch(self, rows: Tensor) -> Batch:
        tokens, spans = (x[self._index[rows]] for x in self._columns)
        first, length = spans[:, :1], spans[:, 1:]
        longest = int(length.max())
        place = torch.arange(1, longest)  # of the label
        real = place < length
        inputs, labels = tokens[:, : longest - 1].long(), tokens[:, 1:longest].long()
        return {
            "input_ids": inputs.masked_fill(~real, 0),
            "attention_mask": real.long(),
            "labels": labels.masked_fill(~(real & (place >= first)), IGNORED),
        }
