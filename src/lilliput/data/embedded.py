"""Data without a download: scikit-learn's handwritten digits, and the source text of Python's standard library."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lilliput.core.random import generator
from lilliput.data.datasets import Dataset
from lilliput.data.text import ASCII, from_texts, parted

# Packages of every Python from 3.10 to 3.13; those that a distribution lacks are skipped.
PACKAGES = (
    "asyncio", "collections", "concurrent", "ctypes", "curses", "dbm", "email", "html", "http", "importlib",
    "json", "logging", "multiprocessing", "sqlite3", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zoneinfo",
)  # fmt: skip


def digits() -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels from scikit-learn, a fifth of them for testing; no download."""
    table = _digits()
    images, labels = table[:, :64].float().div_(16).view(-1, 1, 8, 8), table[:, 64].long()
    order = torch.randperm(len(labels), generator=generator("digits", "split"))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return Dataset("digits", (images[train], labels[train]), (images[test], labels[test]), 10, (1, 8, 8), "image")


def _digits() -> Tensor:
    """scikit-learn's table (1797, 65): 64 pixels from 0 to 16, then the digit."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the data set digits needs scikit-learn; pip install 'lilliput[run]'")
    # We read its file directly: importing scikit-learn takes a second, most of a first run.
    file = Path(next(iter(spec.submodule_search_locations)), "datasets", "data", "digits.csv.gz")
    if not file.is_file():
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return torch.from_numpy(np.column_stack([bunch.data, bunch.target]))
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return torch.from_numpy(np.loadtxt(lines, delimiter=","))


def stdlib(length: int = 80, test_share: float = 0.1) -> Dataset:
    """The source of twenty packages of Python's standard library as characters, one client per package; no download.

    length: characters of a window
    test_share: the last part of each package, kept for testing
    The text is that of the running Python; its fingerprint tells versions apart.
    """
    texts = {package: parted(text, test_share) for package in PACKAGES if (text := source(package))}
    if not texts:
        raise ValueError("this Python has no source files of its standard library; use one installed as files")
    return from_texts("stdlib", texts, length=length, vocabulary=ASCII)


def source(package: str) -> str:
    """The text of all files of a package except its tests, in the order of their paths; "" without such a package."""
    return "".join(files_of(package))


def files_of(package: str) -> Iterator[str]:
    """The text of each file of a package except its tests, in the order of their paths."""
    spec = importlib.util.find_spec(package)  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        return
    root = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py"))
    sources = [file for file in files if not {"test", "tests"} & set(Path(file).parts)]
    yield from ((root / file).read_text(encoding="utf-8", errors="replace") for file in sources)
