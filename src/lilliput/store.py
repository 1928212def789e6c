"""Where state lives between rounds: each client's, and what the server keeps per client.

A store holds bodies by key within a limit of memory; what was used longest ago spills to disk, one file per body and
version, in the wire's format.  A checkpoint takes over those files: a round writes only what it changed.
"""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput import tree, wire
from lilliput.tree import Body


@dataclass(frozen=True)
class File:
    """A body on disk: the file's name within its folder, its size, and the CRC-32 of its bytes."""

    name: str
    bytes: int
    crc: int

    def read(self, folder: Path) -> Body:
        """The body; raises OSError or ValueError that names the file if it is missing or damaged."""
        path = folder / self.name
        data = bytearray(path.read_bytes())
        if len(data) != self.bytes or checksum(data) != self.crc:
            raise ValueError(f"{path} is damaged: its size or checksum is not the recorded one")
        return wire.decode(data, copy=True)  # into memory of torch's, which is aligned


def checksum(data: Any) -> int:
    """CRC-32, which tells damage (not malice)."""
    import zlib

    return zlib.crc32(data)


def write(folder: Path, name: str, body: Body) -> File:
    """Write a body so that the file is there whole or not at all: temporary name, sync, rename."""
    data = wire.encode(body)
    replace(folder / name, data)
    return File(name, len(data), checksum(data))


def replace(path: Path, data: Any) -> None:
    """Put data in a file in one step: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


class Store:
    """Bodies by key (a kind and a client), in memory up to `limit_bytes`, on disk beyond."""

    def __init__(self, folder: Path | None = None, limit_bytes: int = 1 << 30):
        self.limit_bytes = limit_bytes
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._folder = folder
        self._memory: OrderedDict[str, Body] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._files: dict[str, File] = {}  # what is on disk and current
        self._serial = 0

    def get(self, key: str) -> Body:
        """The body of a key; an empty one if there is none."""
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        if key in self._files:
            body = self._files[key].read(self.folder)
            self._keep(key, body)
            return body
        return {}

    def put(self, key: str, body: Body) -> None:
        """Replace a key's body."""
        self._files.pop(key, None)
        self._keep(key, body)

    def __iter__(self) -> Iterator[str]:
        return iter(self._memory.keys() | self._files.keys())

    @property
    def folder(self) -> Path:
        """Where files go; a temporary folder, removed with the store, unless one was given."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="lilliput-")
            self._folder = Path(self._temporary.name)
        return self._folder

    def flush(self, prefix: str) -> dict[str, File]:
        """Write what is not on disk yet to files whose names start with `prefix`; every key's file."""
        for key in self._memory:
            if key not in self._files:
                self._spill(key, prefix)
        return dict(self._files)

    def restore(self, files: dict[str, File]) -> None:
        """Forget everything and go on from these files."""
        self._memory.clear()
        self._bytes = 0
        self._files = dict(files)

    def _keep(self, key: str, body: Body) -> None:
        self._bytes -= tree.size(self._memory.pop(key, {}))
        self._memory[key] = body
        self._bytes += tree.size(body)
        while self._bytes > self.limit_bytes and len(self._memory) > 1:
            oldest, spilled = next(iter(self._memory.items()))
            if oldest not in self._files:
                self._spill(oldest, "spill")
            del self._memory[oldest]
            self._bytes -= tree.size(spilled)

    def _spill(self, key: str, prefix: str) -> None:
        self._serial += 1
        # A name is never used twice by a process, so a file that a checkpoint counts on is never overwritten.
        name = f"{prefix}-{key.replace('/', '-')}-{os.getpid()}-{self._serial}.safetensors"
        self._files[key] = write(self.folder, name, self._memory[key])
