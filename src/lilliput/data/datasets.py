"""A data set: columns of tensors, their meaning, and the owners of the examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

KINDS = ("image", "tabular", "text", "tokens")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test examples as columns of equal length: the input first, then its label.

    Images are (N, C, H, W), uint8 in [0, 255] or float; tables (N, features) float; texts (N, length) int64 characters
    with labels (N, length), the next character at every position.  Other labels are (N,) int64 in [0, classes).
    Tokens (N, L) have spans (N, 2) as their second column, as in `TokenBatches`.
    By default `shape` is that of one input, and `kind` follows from it.
    """

    name: str
    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    classes: int
    shape: tuple[int, ...] = ()  # of one input: (C, H, W), (features,) or (length,)
    kind: str = ""  # image, tabular, text (characters) or tokens
    mean: tuple[float, ...] | None = None  # per channel, of images scaled to [0, 1]
    std: tuple[float, ...] | None = None
    owners: Tensor | None = None  # the natural client of each training example, from 0
    test_owners: Tensor | None = None
    owner_names: tuple[str, ...] = ()
    vocabulary: str | None = None  # of texts: character i is that of id i; the last id stands for all others
    augment: tuple[str, ...] = ()  # of images: how training batches are augmented unless a run says otherwise
    tokenizer: str = ""  # of tokens: where their tokenizer comes from; `classes` is the size of its vocabulary
    bucket: int = 1  # of tokens: how many batches are sorted by length together
    prompts: tuple[tuple[tuple[int, ...], tuple[str, ...]], ...] = ()  # distinct test prompts and their references

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", tuple(self.train))
        object.__setattr__(self, "test", tuple(self.test))
        object.__setattr__(self, "shape", tuple(self.shape) or tuple(self.train[0].shape[1:]))
        object.__setattr__(self, "kind", self.kind or self._kind())
        self._check()

    def _kind(self) -> str:
        if len(self.shape) == 3:
            return "image"
        return "text" if self.vocabulary is not None or not self.train[0].is_floating_point() else "tabular"

    def _check(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if len(self.train) != len(self.test):
            raise ValueError(
                f"{self.name}: train has {len(self.train)} columns and test {len(self.test)}; both need input and label"
            )
        if self.kind == "image" and len(self.shape) != 3:
            raise ValueError(f"{self.name}: images are (N, C, H, W), not {tuple(self.train[0].shape)}")
        for part, columns in (("train", self.train), ("test", self.test)):
            if len({len(column) for column in columns}) > 1:
                sizes = ", ".join(str(len(column)) for column in columns)
                raise ValueError(f"{self.name}: the columns of {part} have {sizes} rows; the numbers must be equal")
        for owners, columns in ((self.owners, self.train), (self.test_owners, self.test)):
            if owners is not None and len(owners) != len(columns[0]):
                raise ValueError(f"{self.name}: there are {len(owners)} owners for {len(columns[0])} examples")

        for column in (*self.train[1:2], *self.test[1:2]):
            if column.dim() == 1 and not column.is_floating_point() and len(column):
                self._check_labels(int(column.min()), int(column.max()))

    def _check_labels(self, low: int, high: int) -> None:
        if low < 0 or high >= self.classes:
            raise ValueError(
                f"{self.name}: labels go from {low} to {high}; {self.classes} classes are 0 to {self.classes - 1}"
            )

    @property
    def tokens_per_example(self) -> int | None:
        """Characters, or tokens on average, of one text; None if the data are not text."""
        if self.kind == "tokens":
            return round(float(self.train[1][:, 1].double().mean())) - 1
        return self.shape[0] if self.kind == "text" else None

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that identify the data, whatever format or folder they came from."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        owners = [x for x in (self.owners, self.test_owners) if x is not None]
        return digest([*self.train, *self.test, *owners], str((self.classes, self.vocabulary)))


def existing(folder: str) -> Path:
    """The folder or file as a path; raises ValueError if there is none."""
    path = Path(folder).expanduser()
    if not path.exists():
        raise ValueError(f"there is no data folder {folder!r}; set dataset.folder to where the files are")
    return path


def digest(tensors: Iterable[Tensor], label: str = "") -> str:
    """Sixteen hexadecimal digits that hash tensors: their dtypes, shapes and values in order."""
    content = hashlib.blake2b(label.encode(), digest_size=8)
    for tensor in tensors:
        content.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        content.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()
