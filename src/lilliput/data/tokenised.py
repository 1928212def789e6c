"""Any text as a data set of token sequences, to train language models on: local files, the standard library, or C4.

Documents, tokens and sequences are those of `lilliput pretrain` (`corpus`, `sequences`).  The sequences are stored on
disk and read when a batch needs them, so they may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lilliput.core.labels import IGNORED
from lilliput.data.cache import Arrays, streamed
from lilliput.data.corpus import Corpus, Files, Library, Source, corpora, count, read
from lilliput.data.datasets import Dataset
from lilliput.data.sequences import Sequences
from lilliput.data.tokenizer import definition
from lilliput.data.tokenizer import tokenizer as load_tokenizer

ROWS = 1024  # sequences made at a time
PROMPTS = 64  # test sequences whose second half a model writes for `lilliput evaluate --generate`

# owner -> corpus.  The owner "" stands for text without owners.
Owned = Mapping[str, Corpus]
Sides = Mapping[str, tuple[Owned, int | None]]  # side -> its text, and the most tokens to use


@dataclass(frozen=True)
class Texts:
    """Documents in memory."""

    texts: tuple[str, ...]

    def documents(self, skip: int = 0) -> Iterator[str]:
        return iter(self.texts[skip:])

    def fingerprint(self) -> str:
        return hashlib.blake2b(json.dumps(self.texts).encode(), digest_size=12).hexdigest()


def from_corpora(
    name: str, train: Owned, test: Owned, *, tokenizer: str, length: int, packing: bool, tokens: int | None = None,
    test_tokens: int | None = None,
) -> Dataset:  # fmt: skip
    """The data set of each owner's training text and test text.

    length:  tokens of a sequence.
    packing: joins documents, an end of text after each; else each document is cut or padded to one sequence.
    tokens, test_tokens: the most tokens to use, an equal number from every owner; None for all.
    Leaves out owners whose text makes no training sequence.  Raises ValueError if a side has no sequence.
    """
    if length < 2:
        raise ValueError(f"{name}: length is {length}; a sequence has at least 2 tokens")
    library = load_tokenizer(tokenizer)
    sides: Sides = {"train": (train, tokens), "test": (test, test_tokens)}
    words = hashlib.blake2b(definition(library).encode(), digest_size=16).hexdigest()
    key = [length, packing, words, *(_key(owned, most) for owned, most in sides.values())]
    made = streamed(name, json.dumps(key), lambda: _parts(sides, library, length, packing))
    arrays = {what: torch.from_numpy(array) for what, array in made.items()}
    for side, remedy in (("train", "a shorter length"), ("test", "a shorter length, or name validation text")):
        if f"{side}_tokens" not in arrays:
            raise ValueError(f"{name} has no {side} sequence of length={length}; choose {remedy}")
    columns = {side: (arrays[f"{side}_tokens"], arrays[f"{side}_spans"]) for side in sides}
    return Dataset(
        name, columns["train"], columns["test"], len(library), (length,), "tokens", tokenizer=tokenizer,
        prompts=_prompts(arrays, library), **_owners(arrays, [*train], [*test]),
    )  # fmt: skip


def _parts(sides: Sides, library: Any, length: int, packing: bool) -> Iterator[Arrays]:
    """Tokens, spans and owners of both sides, a block of rows at a time."""
    for side, (owned, most) in sides.items():
        each = None if most is None else -(-most // len(owned))
        for place, one in enumerate(owned.values()):
            for rows in _rows(one, library, length, packing, each):
                rows["owners"] = np.full(len(rows["tokens"]), place, dtype=np.int64)
                yield {f"{side}_{what}": array for what, array in rows.items()}


def _rows(corpus: Corpus, library: Any, length: int, packing: bool, most: int | None) -> Iterator[Arrays]:
    """Tokens (n, length + 1) int32 and spans (n, 2) int32 of the sequences that start in the first `most` tokens."""
    stream = Sequences(corpus, library, length, packing=packing, shuffle=0, repeat=False)
    seen = 0
    while (most is None or seen < most) and (batch := stream.batch(ROWS)) is not None:
        labels = batch["labels"]
        lengths = (labels != IGNORED).sum(1) + 1
        before = seen + lengths.cumsum(0) - lengths
        usable = lengths > 1 if most is None else (lengths > 1) & (before < most)
        seen = int(before[-1] + lengths[-1])
        tokens = torch.cat([batch["input_ids"], labels[:, -1:].clamp_min(0)], 1)[usable]
        spans = torch.stack([torch.ones_like(lengths), lengths], 1)[usable]
        if len(tokens):
            yield {"tokens": tokens.int().numpy(), "spans": spans.int().numpy()}


def _owners(arrays: Mapping[str, Tensor], train: Sequence[str], test: Sequence[str]) -> dict[str, Any]:
    """The owner of each sequence, renumbered so that owners without training sequences come last; {} without owners.

    Test sequences have owners only if both sides have the same ones.
    """
    if [*train] == [""]:
        return {}
    present = arrays["train_owners"].unique().tolist()
    order = [*present, *sorted({*range(len(train))} - {*present})]
    place = torch.tensor(order).argsort()
    owners = {"owners": place[arrays["train_owners"]], "owner_names": tuple(train[i] for i in order)}
    return owners | ({"test_owners": place[arrays["test_owners"]]} if [*test] == [*train] else {})


def _prompts(arrays: Mapping[str, Tensor], library: Any) -> tuple[tuple[tuple[int, ...], tuple[str, ...]], ...]:
    """The first halves of test sequences and the texts that follow; none if the tokenizer has no end of text."""
    if library.eos_token_id is None:
        return ()
    references: dict[tuple[int, ...], list[str]] = {}
    for row, (_, length) in zip(arrays["test_tokens"][:PROMPTS].tolist(), arrays["test_spans"].tolist(), strict=False):
        text = library.decode(row[length // 2 : length], skip_special_tokens=True)
        references.setdefault(tuple(row[: length // 2]), []).append(text)
    return tuple((prompt, tuple(texts)) for prompt, texts in references.items())


def _key(owned: Owned, most: int | None) -> list[Any]:
    return [most, [(name, corpus.fingerprint()) for name, corpus in owned.items()]]


def corpus(
    folder: str | None = None, source: str | list[str] | None = None, validation: str | list[str] | None = None,
    held_out: float = 0.05, key: str = "text", owner: str | None = None, tokenizer: str = "bytes", length: int = 256,
    packing: bool = True, tokens: str | int | float | None = None, validation_tokens: str | int | float = "1M",
) -> Dataset:  # fmt: skip
    """Your own text as tokens (one client per file or author), the standard library (one per package), or C4.

    folder: a file, or a folder of .txt, .jsonl, .json.gz, .parquet or .tokens files
    source: instead of folder: c4 (streamed from the hub), stdlib, or several files and folders
    validation: text to test on; by default C4's own, or files named so, or a share held out
    held_out: the share of documents held out if there is no other validation text
    key: the field or column that holds the text
    owner: the field or column that names the owner
    tokenizer: a folder, a tokenizer.json, a name on the hub, or bytes
    length: tokens of a sequence
    packing: joins documents end to end; false pads or cuts each to one sequence, as published
    tokens: the most tokens to train on, such as 100M, an equal number from every owner; all by default
    validation_tokens: the most tokens to test on
    """
    if (folder is None) == (source is None):
        raise ValueError("corpus needs one of dataset.source (c4, stdlib, files) and dataset.folder (a file or folder)")
    named = folder if source is None else source
    if named in ("c4", ["c4"]) and tokens is None:
        raise ValueError("c4 has 156 billion tokens; choose how many to use, such as dataset.tokens=100M")
    train, test, _ = corpora(named, validation, held_out, key)  # type: ignore[arg-type]
    return from_corpora(
        "corpus", _owned(train, owner), {"": test} if test.source != train.source else _owned(test, owner),
        tokenizer=tokenizer, length=length, packing=packing, tokens=None if tokens is None else count(tokens, "tokens"),
        test_tokens=count(validation_tokens, "validation_tokens"),
    )  # fmt: skip


def _owned(corpus: Corpus, owner: str | None) -> Owned:
    """The corpus by owner: the values of a field, the library's packages, or the files if there are several."""
    source, sources = corpus.source, dict[str, Source]()
    if owner is not None:
        sources = _authors(source, owner)
    elif isinstance(source, Library):
        sources = {package: Library((package,)) for package in source.packages}
    elif isinstance(source, Files) and len(source.paths) > 1:
        root = os.path.commonpath([path.parent for path in source.paths])
        sources = {path.relative_to(root).as_posix(): Files((path,), source.key) for path in source.paths}
    return {name: replace(corpus, source=one) for name, one in sources.items()} or {"": corpus}


def _authors(source: Source, owner: str) -> dict[str, Source]:
    """The documents of each author, all in memory."""
    if not isinstance(source, Files) or any(path.name.endswith((".txt", ".tokens", ".raw")) for path in source.paths):
        raise ValueError(f"owner={owner} is a field of .jsonl, .json.gz or .parquet files; leave it out")
    texts: dict[str, list[str]] = {}
    for path in source.paths:
        for text, author in zip(read(path, source.key), read(path, owner), strict=True):
            texts.setdefault(str(author), []).append(text)
    return {author: Texts(tuple(written)) for author, written in sorted(texts.items())}
