"""Documents as token sequences of one length: padded or cut one by one, or packed end to end; resumable to the token.

The order of documents is fixed by the seed: they are shuffled in blocks, each epoch anew, so that going on from a
position re-reads one block at most.  Process `rank` of `world` takes every world-th document that has text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lilliput.core import random
from lilliput.core.labels import IGNORED
from lilliput.data.corpus import Corpus

CHUNK = 16  # documents that are tokenised at a time when packing

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Position:
    """Where a process stands in its stream.

    epoch: passes over the text before this one
    document: documents read in this epoch, with text or without
    kept: documents with text read in all epochs, by all processes
    waiting: token ids that are read and not used yet, when packing
    """

    epoch: int = 0
    document: int = 0
    kept: int = 0
    waiting: tuple[int, ...] = ()


class Sequences:
    """An endless stream of batches, or, without `repeat`, of one epoch whose last batch may be short.

    tokenizer: as `lilliput.data.tokenizer` gives it
    length: tokens of a sequence
    packing: documents end to end, an end-of-text token after each; else each document alone, cut or padded to `length`
    shuffle: documents of a block; 0 keeps their order
    A batch is {input_ids, labels}, both (n, length) int64; the label of a token is the one after it, -100 for none.
    Sequences are padded on the right, where a causal model needs no mask.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Any, length: int, *, packing: bool, seed: int = 0, shuffle: int = 10_000,
        rank: int = 0, world: int = 1, repeat: bool = True, position: Position | None = None,
    ):  # fmt: skip
        self.corpus, self.tokenizer, self.length, self.packing = corpus, tokenizer, length, packing
        self.seed, self.shuffle, self.rank, self.world, self.repeat = seed, shuffle, rank, world, repeat
        self.position = position or Position()
        self._waiting = list(self.position.waiting)
        self._texts = self._documents()

    def batch(self, n: int) -> Batch | None:
        """The next n sequences; fewer at the end of one epoch, None after it.  `position` then stands behind them."""
        ids = self._packed(n) if self.packing else self._padded(n)
        self.position = replace(self.position, waiting=tuple(self._waiting))
        if not len(ids):
            return None
        return {"input_ids": ids[:, :-1].clamp_min(0), "labels": ids[:, 1:]}

    def _packed(self, n: int) -> Tensor:
        """(n, length + 1) ids; windows overlap by one token, so that each is predicted once."""
        while len(self._waiting) <= n * self.length and (texts := list(islice(self._texts, CHUNK))):
            for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                self._waiting += [*ids, *self._end()]
        n = min(n, max(0, len(self._waiting) - 1) // self.length)
        used = torch.tensor(self._waiting[: n * self.length + 1])
        del self._waiting[: n * self.length]
        return used.unfold(0, self.length + 1, self.length) if n else used.new_empty(0, self.length + 1)

    def _padded(self, n: int) -> Tensor:
        """(n, length + 1) ids; what is padding, and the label of each last token, is -100."""
        texts = list(islice(self._texts, n))
        out = torch.full((len(texts), self.length + 1), IGNORED)
        if texts:
            rows = self.tokenizer(texts, truncation=True, max_length=self.length)["input_ids"]
            for place, ids in zip(out, rows, strict=True):
                place[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return out

    def _end(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]

    def _documents(self) -> Iterator[str]:
        """The documents of this process from its position on, which moves along."""
        while True:
            before = self.position
            for text in self._epoch(self.position.epoch, self.position.document):
                at, has = self.position, self.corpus.has(text)
                self.position = replace(at, document=at.document + 1, kept=at.kept + has)
                if has and at.kept % self.world == self.rank:
                    yield text
            if not self.repeat:
                return
            if before.document == 0 and self.position.kept == before.kept:
                raise ValueError("the corpus has no document with text")
            self.position = replace(self.position, epoch=self.position.epoch + 1, document=0)

    def _epoch(self, epoch: int, skip: int) -> Iterator[str]:
        """All documents of an epoch in its order but the first `skip`."""
        if not self.shuffle:
            yield from self.corpus.source.documents(skip)
            return
        number, within = divmod(skip, self.shuffle)
        source = self.corpus.source.documents(number * self.shuffle)
        while block := list(islice(source, self.shuffle)):
            order = torch.randperm(len(block), generator=random.generator(self.seed, "documents", epoch, number))
            yield from (block[i] for i in order[within:].tolist())
            number, within = number + 1, 0
