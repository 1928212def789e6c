"""What a folder holds, and what is opened in it, for tests of commands that must leave it alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder below: when it was last changed, and its bytes."""
    found = {str(path.relative_to(folder)): path for path in [folder, *folder.rglob("*")]}
    return {
        name: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for name, path in found.items()
    }


@contextmanager
def opened_for_writing() -> Iterator[list[str]]:
    """The paths that this process opens for writing meanwhile."""
    seen: list[str] = []
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


_watching: list[list[str]] = []


def _heard(event: str, args: tuple[Any, ...]) -> None:
    if _watching and event == "open" and isinstance(args[2], int) and args[2] & WRITING:
        for seen in _watching:
            seen.append(str(args[0]))


sys.addaudithook(_heard)  # stays as long as the process, and is silent while nobody watches
