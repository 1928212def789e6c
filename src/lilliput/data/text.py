"""Text as characters: an alphabet, and windows whose labels are the next character at every position."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lilliput.data.datasets import Dataset, existing

UNKNOWN = "\ufffd"
ASCII = "\n" + "".join(map(chr, range(32, 127))) + UNKNOWN


def encode(text: str, vocabulary: str = ASCII) -> Tensor:
    """Ids (len(text),) int64 of the characters in `vocabulary`; its last id stands for all others."""
    letters = np.array([ord(c) for c in vocabulary], dtype=np.uint32)
    order = letters.argsort()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    ids = order[np.searchsorted(letters[order], codes).clip(max=len(letters) - 1)]
    return torch.from_numpy(np.where(letters[ids] == codes, ids, len(letters) - 1).astype(np.int64))


def decode(ids: Tensor, vocabulary: str = ASCII) -> str:
    """The text of ids in `vocabulary`."""
    return "".join(vocabulary[i] for i in ids.flatten().tolist())


def vocabulary_of(texts: Sequence[str]) -> str:
    """The characters that occur in the texts, sorted, and then the symbol for all others."""
    return "".join(sorted(set().union(*map(set, texts)) - {UNKNOWN})) + UNKNOWN


def windows(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Consecutive windows (n, length) and their labels, the next character at every position; drops the remainder."""
    n = max(len(ids) - 1, 0) // length
    return ids[: n * length].view(n, length), ids[1 : n * length + 1].view(n, length)


def from_texts(
    name: str, texts: Mapping[str, tuple[str, str]], *, length: int = 80, vocabulary: str | None = None
) -> Dataset:
    """The data set of each owner's (training text, test text).

    Leaves out owners without a whole training window.  `vocabulary` defaults to the characters of the training texts.
    Raises ValueError if no owner has a window.
    """
    if length < 1:
        raise ValueError(f"length is {length}; a window has at least 1 character")
    vocabulary = vocabulary or vocabulary_of([train for train, _ in texts.values()])
    cut = {o: [windows(encode(t, vocabulary), length) for t in pair] for o, pair in texts.items()}
    cut = {owner: parts for owner, parts in cut.items() if len(parts[0][0])}
    if not cut:
        raise ValueError(f"{name}: no text is longer than length={length} characters; choose a shorter length")
    sides = []
    for side in (0, 1):
        x, y = (torch.cat([parts[side][column] for parts in cut.values()]) for column in (0, 1))
        sizes = torch.tensor([len(parts[side][0]) for parts in cut.values()])
        sides.append(((x, y), torch.repeat_interleave(torch.arange(len(cut)), sizes)))
    (train, owners), (test, test_owners) = sides
    return Dataset(
        name, train, test, len(vocabulary), (length,), "text", vocabulary=vocabulary,
        owners=owners, test_owners=test_owners, owner_names=tuple(cut),
    )  # fmt: skip


def text(folder: str | None = None, length: int = 80, test_share: float = 0.1) -> Dataset:
    """Your own text as characters: a file, or a folder of .txt files with one client per file.

    folder: the file or the folder
    length: characters of a window
    test_share: the last part of each file, kept for testing
    """
    if folder is None:
        raise ValueError("text needs dataset.folder: a text file, or a folder of .txt files")
    return _of_files(existing(folder), length, test_share)


def tinyshakespeare(folder: str | None = None, length: int = 80, test_share: float = 0.1) -> Dataset:
    """40,000 lines of Shakespeare as characters (Karpathy's char-rnn), in one file without clients of its own.

    folder: where input.txt is
    length: characters of a window
    test_share: the last part, kept for testing
    """
    if folder is None:
        raise ValueError("tinyshakespeare needs dataset.folder with input.txt of github.com/karpathy/char-rnn")
    path = existing(folder)
    file = path / "input.txt" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"there is no input.txt in {folder}; it is in github.com/karpathy/char-rnn")
    return replace(_of_files(file, length, test_share), name="tinyshakespeare")


def shakespeare_roles(folder: str | None = None, length: int = 80, min_chars: int = 1000) -> Dataset:
    """Shakespeare's plays as characters, one client per speaking role, from JSON lines of {client_id, train, test}.

    folder: the .jsonl file or its folder
    length: characters of a window
    min_chars: leaves out clients with fewer characters of training text
    """
    if folder is None:
        raise ValueError("shakespeare_roles needs dataset.folder: a .jsonl file of {client_id, train, test}")
    path = existing(folder)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"there is no .jsonl file in {folder}; it has lines of {{client_id, train, test}}")
    texts = {owner: pair for file in files for owner, pair in _lines(file) if len(pair[0]) >= min_chars}
    if not texts:
        raise ValueError(f"no client of {folder} has min_chars={min_chars} characters; choose a lower min_chars")
    return from_texts("shakespeare_roles", texts, length=length)


def _lines(file: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    with file.open("rb") as stream:  # bytes, so that the error for a line that is not text has its number
        for number, line in enumerate(stream, 1):
            try:
                row = json.loads(line)
                train, test = row["train"], row["test"]
                if not isinstance(train, str) or not isinstance(test, str):
                    raise TypeError("train and test must be text")
                yield str(row["client_id"]), (train, test)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}:{number} is not a line of client_id, train and test: {error!r}") from error


def _of_files(path: Path, length: int, test_share: float) -> Dataset:
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"there is no .txt file in {path}")
    texts = {}
    for file in files:
        owner = file.relative_to(path).as_posix() if path.is_dir() else file.name
        texts[owner] = parted(file.read_text(encoding="utf-8", errors="replace"), test_share)
    made = from_texts(path.stem, texts, length=length)
    # The text of a single file has no owners.
    return made if path.is_dir() else replace(made, owners=None, test_owners=None, owner_names=())


def parted(text: str, test_share: float) -> tuple[str, str]:
    """The first part of a text, for training, and the last, for testing."""
    if not 0 < test_share < 1:
        raise ValueError(f"test_share is {test_share}; it must lie between 0 and 1")
    cut = round(len(text) * (1 - test_share))
    return text[:cut], text[cut:]
