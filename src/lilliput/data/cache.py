"""Decoded images kept on disk, so that compressed ones are decoded once: .npy files below ~/.cache/lilliput.

The environment variable LILLIPUT_CACHE names another folder; an empty one (LILLIPUT_CACHE=) keeps nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
VERSION = 1  # raised when the same files are to be decoded differently


def folder() -> Path | None:
    """Where decoded data are kept; None for nowhere."""
    place = os.environ.get("LILLIPUT_CACHE", "~/.cache/lilliput")
    return Path(place).expanduser() if place else None


def files_key(files: Iterable[Path]) -> str:
    """What tells files from others: their names, sizes and contents."""
    content = hashlib.blake2b(digest_size=16)
    for file in files:
        content.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
    return content.hexdigest()


def cached(name: str, key: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays that were kept under this key, else those that `build` makes, kept for the next time.

    A damaged entry is made anew; where nothing can be written the arrays are just not kept.
    """
    root = folder()
    if root is None:
        return build()
    home = root / f"{name}-{hashlib.blake2b(f'{VERSION}/{key}'.encode(), digest_size=8).hexdigest()}"
    with contextlib.suppress(OSError, ValueError, EOFError):
        if kept := {file.stem: np.load(file, allow_pickle=False) for file in sorted(home.glob("*.npy"))}:
            return kept
    arrays = build()
    with contextlib.suppress(OSError):
        _write(home, arrays)
    return arrays


def _write(home: Path, arrays: Arrays) -> None:
    """All or nothing: the entry is written beside its place and renamed."""
    home.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".new-", dir=home.parent))
    try:
        for name, array in arrays.items():
            np.save(beside / f"{name}.npy", array, allow_pickle=False)
        shutil.rmtree(home, ignore_errors=True)  # a damaged one; another process may have put a whole one there since
        beside.rename(home)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
