"""Documents as token sequences of one length, padded or cut one by one, or packed end to end; resumes at any token.

The seed fixes the order of documents.  Each epoch shuffles them within blocks, so that resuming from a position reads
at most one block again.  Process `rank` of `world` uses every world-th document that has text.
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

CHUNK = 16  # documents tokenised at a time when packing

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Position:
    """Where a process is in its stream.

    epoch: complete passes over the text
    document: documents read in this epoch, with text or without
    kept: documents with text read in all epochs, by all processes
    waiting: token ids read but not yet used, when packing
    """

    epoch: int = 0
    document: int = 0
    kept: int = 0
    waiting: tuple[int, ...] = ()


class Sequences:
    """An endless stream of batches; without `repeat`, one epoch whose last batch may be short.

    tokenizer: as `lilliput.data.tokenizer` returns it
    length: tokens of a sequence
    packing: joins documents, an end-of-text token after each; else each document is cut or padded to `length`
    shuffle: documents in a block; 0 keeps their order
    A batch is {input_ids, labels}, both (n, length) int64; a token's label is the next token, -100 if there is none.
    Padding is on the right, where a causal model needs no mask.
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
        """The next n sequences: fewer at the end of a single epoch, None after it.  Moves `position` past them."""
        ids = self._packed(n) if self.packing else self._padded(n)
        self.position = replace(self.position, waiting=tuple(self._waiting))
        if not len(ids):
            return None
        return {"input_ids": ids[:, :-1].clamp_min(0), "labels": ids[:, 1:]}

    def _packed(self, n: int) -> Tensor:
        """Ids (n, length + 1); windows overlap by one token, so that every token is predicted once."""
        while len(self._waiting) <= n * self.length and (texts := list(islice(self._texts, CHUNK))):
            for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                self._waiting += [*ids, *self._end()]
        n = min(n, max(0, len(self._waiting) - 1) // self.length)
        used = torch.tensor(self._waiting[: n * self.length + 1])
        del self._waiting[: n * self.length]
        return used.unfold(0, self.length + 1, self.length) if n else used.new_empty(0, self.length + 1)

    def _padded(self, n: int) -> Tensor:
        """Ids (n, length + 1), -100 for padding and after each document's last token."""
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
        """The documents of this process from `position` on; moves `position`."""
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
        """All documents of an epoch, in its order, except the first `skip`."""
        if not self.shuffle:
            yield from self.corpus.source.documents(skip)
            return
        number, within = divmod(skip, self.shuffle)
        source = self.corpus.source.documents(number * self.shuffle)
        while block := list(islice(source, self.shuffle)):
            order = torch.randperm(len(block), generator=random.generator(self.seed, "documents", epoch, number))
            yield from (block[i] for i in order[within:].tolist())
            number, within = number + 1, 0
