"""Text as characters: an alphabet, and windows of it with the next character at every position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lilliput.data.datasets import Dataset

UNKNOWN = "\ufffd"
ASCII = "\n" + "".join(map(chr, range(32, 127))) + UNKNOWN


def encode(text: str, vocabulary: str = ASCII) -> Tensor:
    """Places (len(text),) int64 of the characters in `vocabulary`, whose last place is that of all others."""
    known = np.array([ord(c) for c in vocabulary], dtype=np.uint32)
    order = known.argsort()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    places = order[np.searchsorted(known[order], codes).clip(max=len(known) - 1)]
    return torch.from_numpy(np.where(known[places] == codes, places, len(known) - 1).astype(np.int64))


def decode(ids: Tensor, vocabulary: str = ASCII) -> str:
    """The text of places in `vocabulary`."""
    return "".join(vocabulary[i] for i in ids.flatten().tolist())


def vocabulary_of(texts: Sequence[str]) -> str:
    """The characters that occur, sorted, and the symbol for all others."""
    return "".join(sorted(set().union(*map(set, texts)) - {UNKNOWN})) + UNKNOWN


def windows(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Windows (n, length) one after another, and at every position the character that follows; the rest is left out."""
    n = max(len(ids) - 1, 0) // length
    return ids[: n * length].view(n, length), ids[1 : n * length + 1].view(n, length)


def from_texts(
    name: str, texts: Mapping[str, tuple[str, str]], *, length: int = 80, vocabulary: str | None = None
) -> Dataset:
    """The data set of each owner's (training text, test text).

    Owners without a whole training window are left out.  `vocabulary` defaults to the characters of the training texts.
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
