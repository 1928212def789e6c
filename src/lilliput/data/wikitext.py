"""WikiText-2 (Merity et al., 2016): two million tokens of good Wikipedia articles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from lilliput.data.corpus import SUFFIXES, Corpus, Files, Hub, Source
from lilliput.data.datasets import Dataset, existing
from lilliput.data.tokenised import from_corpora

Split = Literal["train", "valid", "test"]
TITLE = re.compile(r" = [^=].* = $")  # an article's title; section titles have more equals signs
WORDS = {"train": {"train"}, "valid": {"valid", "validation"}, "test": {"test"}}  # in the names of a split's files


@dataclass(frozen=True)
class Articles:
    """The articles of a source whose documents are lines, or pieces cut at the ends of lines."""

    source: Source

    def documents(self, skip: int = 0) -> Iterator[str]:
        return islice(self._articles(), skip, None)

    def _articles(self) -> Iterator[str]:
        lines: list[str] = []
        for piece in self.source.documents():
            for line in re.split(r"(?<=\n)", piece):
                if TITLE.match(line.rstrip("\n")) and lines:
                    yield "".join(lines)
                    lines = []
                lines.append(line)
        yield "".join(lines)

    def fingerprint(self) -> str:
        return f"articles of {self.source.fingerprint()}"


def wikitext2(
    folder: str | None = None, tokenizer: str = "gpt2", length: int = 512, packing: bool = True,
    train: Split = "train", test: Split = "test",
) -> Dataset:  # fmt: skip
    """WikiText-2 as tokens: good Wikipedia articles, from the files of either release, from Parquet, or from the hub.

    folder: has wiki.train.tokens, wiki.train.raw, Parquet files, or train.txt, and their siblings; by default the raw
            release comes from the hub
    tokenizer: a folder, a tokenizer.json, a name on the hub, or bytes
    length: tokens of a sequence
    packing: joins articles end to end; false pads or cuts each to one sequence
    train: the split to train on
    test: the split to test on
    Perplexity is per token of the tokenizer, not per word as in the tables of word-level models.
    """
    if train == test:
        raise ValueError(f"wikitext2: train and test are both {train}; choose two of train, valid and test")
    sides = ({"": Corpus(Articles(_source(folder, split, side)))} for side, split in (("train", train), ("test", test)))
    return from_corpora("wikitext2", *sides, tokenizer=tokenizer, length=length, packing=packing)


def _source(folder: str | None, split: Split, side: str) -> Source:
    if folder is None:
        return Hub("Salesforce/wikitext", "wikitext-2-raw-v1", "validation" if split == "valid" else split)
    files = sorted(p for p in existing(folder).iterdir() if p.name.lower().endswith(SUFFIXES))
    matches = [path for path in files if _words(path) & WORDS[split]]
    if len(matches) != 1:
        has = ", ".join(path.name for path in matches or files) or "no text"
        raise ValueError(
            f"{folder} should have one file of the split {split}, and has {has}; "
            f"add it, or name another split: wikitext2.{side}={'valid' if split != 'valid' else 'test'}"
        )
    return Files((matches[0],))


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", path.name.lower()))
