"""Data-to-text sets: the prompt is a meaning representation, and the completion is a sentence that expresses it.

A sequence is: tokens of the prompt, end of text, tokens of " " and the completion, end of text.  As in the LoRA paper's
experiments, only the tokens after the prompt count in the loss.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch

from lilliput.data.cache import Arrays, cached
from lilliput.data.datasets import Dataset, existing
from lilliput.data.tokenizer import definition
from lilliput.data.tokenizer import tokenizer as load_tokenizer

Loss = Literal["completion", "all"]


class Pair(NamedTuple):
    """A prompt, one completion of it, and the owner."""

    prompt: str
    completion: str
    owner: str


def from_pairs(
    name: str, train: Sequence[Pair], test: Sequence[Pair], *, tokenizer: str = "gpt2", length: int = 512,
    loss: Loss = "completion", bucket: int = 1,
) -> Dataset:  # fmt: skip
    """The data set of prompts and completions, with one client per owner.

    length: most tokens of a sequence; longer ones are cut at the end.
    loss:   the tokens that count: those of the completion (and the end of text), or all.
    bucket: how many batches are sorted by length together.
    Raises ValueError for a tokenizer without an end of text, and for prompts that leave no room for a completion.
    """
    library = load_tokenizer(tokenizer)
    if library.eos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer!r} has no end of text; choose that of a causal model, such as gpt2")
    if not train or not test:
        raise ValueError(f"{name} has {len(train)} training and {len(test)} test examples; it needs both")
    arrays = _tokenised(name, {"train": train, "test": test}, library, length, loss)
    (train_x, train_y), (test_x, test_y) = (
        [torch.from_numpy(arrays[f"{side}_{what}"]) for what in ("tokens", "spans")] for side in ("train", "test")
    )
    trained = sorted({pair.owner for pair in train})
    names = [*trained, *sorted({pair.owner for pair in test} - {*trained})]  # owners without training data come last
    place = {owner: i for i, owner in enumerate(names)}
    owners, test_owners = (torch.tensor([place[pair.owner] for pair in side]) for side in (train, test))
    longest = int(max(train_y[:, 1].max(), test_y[:, 1].max()))
    return Dataset(
        name, (train_x, train_y), (test_x, test_y), len(library), (longest - 1,), "tokens", owners=owners,
        test_owners=test_owners, owner_names=tuple(names), tokenizer=tokenizer, bucket=bucket,
        prompts=_references(test, library),
    )  # fmt: skip


def _tokenised(name: str, sides: Mapping[str, Sequence[Pair]], library: Any, length: int, loss: Loss) -> Arrays:
    """Tokens and spans of both sides, cached because they take seconds to make."""
    content = hashlib.blake2b(definition(library).encode(), digest_size=16)
    for side, pairs in sides.items():
        content.update(json.dumps([side, length, loss, pairs]).encode())

    def build() -> Arrays:
        made = {side: _columns(name, pairs, library, length, loss) for side, pairs in sides.items()}
        return {
            f"{side}_{what}": x for side, xs in made.items() for what, x in zip(("tokens", "spans"), xs, strict=True)
        }

    return cached(name, content.hexdigest(), build)


def _columns(name: str, pairs: Sequence[Pair], library: Any, length: int, loss: Loss) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (N, L) int32, padded with 0, and spans (N, 2) int32 of these pairs."""
    prompts = _prompts(pairs, library)
    completions = _ids([f" {pair.completion}" for pair in pairs], library)
    rows = [[*prompts[p.prompt], *c, library.eos_token_id][:length] for p, c in zip(pairs, completions, strict=True)]
    firsts = [len(prompts[pair.prompt]) for pair in pairs]
    if max(firsts) >= length:
        raise ValueError(f"{name} has prompts of {max(firsts)} tokens; set a length of more than that, not {length}")
    tokens = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    starts = firsts if loss == "completion" else [1] * len(rows)
    spans = np.array([starts, [len(row) for row in rows]], dtype=np.int32).T
    return tokens, np.ascontiguousarray(spans)


def _prompts(pairs: Iterable[Pair], library: Any) -> dict[str, list[int]]:
    """The tokens of each distinct prompt, followed by the end of text."""
    distinct = list(dict.fromkeys(pair.prompt for pair in pairs))
    return {p: [*ids, library.eos_token_id] for p, ids in zip(distinct, _ids(distinct, library), strict=True)}


def _ids(texts: Sequence[str], library: Any) -> list[list[int]]:
    return library(list(texts), add_special_tokens=False, verbose=False).input_ids


def _references(pairs: Sequence[Pair], library: Any) -> tuple[tuple[tuple[int, ...], tuple[str, ...]], ...]:
    prompts, texts = _prompts(pairs, library), dict[str, list[str]]()
    for pair in pairs:
        texts.setdefault(pair.prompt, []).append(pair.completion)
    return tuple((tuple(prompts[prompt]), tuple(said)) for prompt, said in texts.items())


def e2e(
    folder: str | None = None, tokenizer: str = "gpt2", length: int = 512, loss: Loss = "completion", bucket: int = 1
) -> Dataset:
    """E2E NLG challenge (Novikova et al., 2017): describe restaurants from their attributes; one client per restaurant.

    folder: has train.txt and test.txt of the LoRA paper's experiments, or the challenge's own trainset.csv and
            testset_w_refs.csv
    tokenizer: a folder, a tokenizer.json or a name on the hub
    length: most tokens of a sequence
    loss: the tokens that count: those of the completion, or all
    bucket: how many batches are sorted by length together
    """
    if folder is None:
        raise ValueError("e2e needs dataset.folder with train.txt and test.txt, or trainset.csv and testset_w_refs.csv")
    root = existing(folder)
    read = _lines if (root / "train.txt").is_file() else _table
    files = ("train.txt", "test.txt") if read is _lines else ("trainset.csv", "testset_w_refs.csv")
    train, test = (list(read(_file(root, file))) for file in files)
    return from_pairs("e2e", train, test, tokenizer=tokenizer, length=length, loss=loss, bucket=bucket)


def webnlg(
    folder: str | None = None, tokenizer: str = "gpt2", length: int = 512, loss: Loss = "completion", bucket: int = 1
) -> Dataset:
    """WebNLG challenge (Gardent et al., 2017): express DBpedia triples in sentences; one client per category.

    folder: has train.json and test.json, or the folders train and test with the challenge's XML
    tokenizer: a folder, a tokenizer.json or a name on the hub
    length: most tokens of a sequence
    loss: the tokens that count: those of the completion, or all
    bucket: how many batches are sorted by length together
    """
    if folder is None:
        raise ValueError("webnlg needs dataset.folder with train.json and test.json, or folders train and test of XML")
    root = existing(folder)
    if (root / "train.json").is_file():
        train, test = (list(_entries(_file(root, file))) for file in ("train.json", "test.json"))
    else:
        train, test = (list(_benchmark(root / side)) for side in ("train", "test"))
    return from_pairs("webnlg", train, test, tokenizer=tokenizer, length=length, loss=loss, bucket=bucket)


def _file(root: Path, name: str) -> Path:
    if not (root / name).is_file():
        raise ValueError(f"there is no {name} in {root}")
    return root / name


def _lines(file: Path) -> Iterator[Pair]:
    """`meaning||reference` lines."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        meaning, bars, said = line.partition("||")
        if not bars or not said.strip():
            raise ValueError(f"{file}:{number} is not a line of a meaning, two bars and a reference")
        yield Pair(meaning.strip(), said.strip(), _restaurant(meaning))


def _table(file: Path) -> Iterator[Pair]:
    """A csv file of columns mr and ref."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        for row in csv.DictReader(stream):
            if not row.get("mr") or not row.get("ref"):
                raise ValueError(f"{file} is not a table of mr and ref; it has {', '.join(map(str, row))}")
            yield Pair(row["mr"].strip(), row["ref"].strip(), _restaurant(row["mr"]))


def _restaurant(meaning: str) -> str:
    found = re.search(r"\bname\s*[:\[]\s*([^|\]]+)", meaning)
    return found[1].strip() if found else ""


def _entries(file: Path) -> Iterator[Pair]:
    """The challenge as JSON: {entries: [{id: {category, modifiedtripleset, lexicalisations}}]}."""
    try:
        for numbered in json.loads(file.read_text(encoding="utf-8"))["entries"]:
            for entry in numbered.values():
                triples = [(t["subject"], t["property"], t["object"]) for t in entry["modifiedtripleset"]]
                for said in entry["lexicalisations"]:
                    yield _said(triples, said["lex"], entry["category"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not WebNLG JSON: {error!r}") from error


def _benchmark(folder: Path) -> Iterator[Pair]:
    """The challenge's own XML: entries of modified triples and English lexicalisations."""
    files = sorted(folder.rglob("*.xml"))
    if not files:
        raise ValueError(f"there are no .xml files in {folder}; unpack the challenge's release there")
    for file in files:
        try:
            entries = ElementTree.parse(file).iter("entry")
            for entry in entries:
                lines = [(t.text or "").split(" | ") for t in entry.findall("modifiedtripleset/mtriple")]
                triples = [(subject.strip(), name.strip(), value.strip()) for subject, name, value in lines]
                for said in entry.findall("lex"):
                    if said.text and said.get("lang", "en") in ("", "en"):
                        yield _said(triples, said.text, entry.get("category", ""))
        except (ElementTree.ParseError, ValueError) as error:
            raise ValueError(f"{file} is not WebNLG XML: {error}") from error


def _said(triples: Iterable[tuple[str, str, str]], text: str, category: str) -> Pair:
    return Pair(" | ".join(" : ".join(triple) for triple in triples), " ".join(text.split()), category)
