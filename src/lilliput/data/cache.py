"""A cache of decoded images and tokens on disk, as .npy files below ~/.cache/lilliput.

The environment variable LILLIPUT_CACHE names another folder; empty (LILLIPUT_CACHE=) turns the cache off.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
VERSION = 1  # to raise when the same files decode differently


def folder() -> Path | None:
    """The cache's folder, or None if the cache is off."""
    place = os.environ.get("LILLIPUT_CACHE", "~/.cache/lilliput")
    return Path(place).expanduser() if place else None


def files_key(files: Iterable[Path]) -> str:
    """A hash of the files' names, sizes and contents."""
    content = hashlib.blake2b(digest_size=16)
    for file in files:
        content.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
    return content.hexdigest()


def _home(root: Path, name: str, key: str) -> Path:
    return root / f"{name}-{hashlib.blake2b(f'{VERSION}/{key}'.encode(), digest_size=8).hexdigest()}"


def cached(name: str, key: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays cached under this key, or those that `build` makes, which are then cached.

    Rebuilds a damaged entry.  If the folder cannot be written to, the arrays are returned without being cached.
    """
    root = folder()
    if root is None:
        return build()
    home = _home(root, name, key)
    with contextlib.suppress(OSError, ValueError, EOFError):
        if arrays := {file.stem: np.load(file, allow_pickle=False) for file in sorted(home.glob("*.npy"))}:
            return arrays
    arrays = build()
    with contextlib.suppress(OSError), _entry(home) as beside:
        for name, array in arrays.items():
            np.save(beside / f"{name}.npy", array, allow_pickle=False)
    return arrays


def streamed(name: str, key: str, parts: Callable[[], Iterable[Arrays]]) -> Arrays:
    """Arrays that may be larger than memory: memory-mapped from disk, and written there from `parts` the first time.

    A part holds rows of any of the arrays.  If the cache is off, the arrays are joined in memory.
    Raises ValueError if the cache's folder cannot be written to.
    """
    root = folder()
    if root is None:
        return _joined(parts())
    home = _home(root, name, key)
    if not any(home.glob("*.npy")):
        try:
            with _entry(home) as beside:
                _append(beside, parts())
        except OSError as error:
            raise ValueError(
                f"{name} cannot be kept in {root}: {error}; set LILLIPUT_CACHE to another folder"
            ) from error
    # Copy on write: torch wants writable arrays, and the file must not change.
    return {file.stem: np.load(file, mmap_mode="c", allow_pickle=False) for file in sorted(home.glob("*.npy"))}


def _joined(parts: Iterable[Arrays]) -> Arrays:
    rows: dict[str, list[np.ndarray]] = {}
    for part in parts:
        for name, array in part.items():
            rows.setdefault(name, []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in rows.items()}


def _append(place: Path, parts: Iterable[Arrays]) -> None:
    """Write the arrays of all parts as .npy.  Rows go to a file of their own first, since the header counts them."""
    firsts, rows = Arrays(), dict[str, int]()
    with contextlib.ExitStack() as stack:
        files = {}
        for part in parts:
            for name, array in part.items():
                if name not in files:
                    files[name], firsts[name] = stack.enter_context((place / f"{name}.rows").open("wb+")), array
                files[name].write(np.ascontiguousarray(array).data)
                rows[name] = rows.get(name, 0) + len(array)
        for name, first in firsts.items():
            header = {"descr": first.dtype.str, "fortran_order": False, "shape": (rows[name], *first.shape[1:])}
            with (place / f"{name}.npy").open("wb") as whole:
                np.lib.format.write_array_header_1_0(whole, header)
                files[name].seek(0)
                shutil.copyfileobj(files[name], whole)
            (place / f"{name}.rows").unlink()


@contextlib.contextmanager
def _entry(home: Path) -> Iterator[Path]:
    """A temporary folder to write an entry into, renamed to `home` at the end: all or nothing."""
    home.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".new-", dir=home.parent))
    try:
        yield beside
        shutil.rmtree(home, ignore_errors=True)  # a damaged entry, or a whole one that another process has just made
        beside.rename(home)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
