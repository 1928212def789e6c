"""Stores state between rounds: each client's own, and the server's state per client.

A store holds bodies by key within a memory limit, and spills the least recently used to disk.  A file holds many
bodies, one after another in the wire's format.  A checkpoint takes over those files and writes all bodies that are not
on disk yet into one more file, so it writes only changes and waits for the disk once.  If less than half of a file is
current, its current bodies are written again and the file is removed.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lilliput import wire
from lilliput.core import tree
from lilliput.core.tree import Body


@dataclass(frozen=True)
class File:
    """A body on disk: its file's name in the folder, its size and CRC-32, and its offset in the file."""

    name: str
    bytes: int
    crc: int
    offset: int = 0

    def read(self, folder: Path) -> Body:
        """The body.  Raises OSError or ValueError, with the file's name, if it is missing or damaged."""
        return wire.decode(self.raw(folder), copy=True)  # copied into torch's memory, which is aligned

    def raw(self, folder: Path) -> bytearray:
        """The body's bytes.  Raises ValueError if size or checksum are wrong."""
        path = folder / self.name
        with open(path, "rb") as file:
            file.seek(self.offset)
            data = bytearray(file.read(self.bytes))
        if len(data) != self.bytes or checksum(data) != self.crc:
            raise ValueError(f"{path} is damaged: its size or checksum is not the recorded one")
        return data


def checksum(data: Any) -> int:
    """CRC-32, which detects damage but not malice."""
    import zlib

    return zlib.crc32(data)


def write(folder: Path, name: str, body: Body) -> File:
    """Write a body so that the file exists whole or not at all: temporary name, sync, rename."""
    data = wire.encode(body)
    replace(folder / name, data)
    return File(name, len(data), checksum(data))


def replace(path: Path, data: Any) -> None:
    """Replace a file's content in one step: a crash leaves the old file or the new one."""
    with replacing(path) as out:
        out.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file to write to; when the block ends without an error, it is synced and renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as out:
        yield out
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


class Store:
    """Bodies by key ("kind/client"), in memory up to `limit_bytes`, the rest on disk."""

    def __init__(self, folder: Path | None = None, limit_bytes: int = 1 << 30):
        self.limit_bytes = limit_bytes
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._folder = folder
        self._memory: OrderedDict[str, Body] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._files: dict[str, File] = {}  # current bodies on disk
        self._live: Counter[str] = Counter()  # file name -> bytes that are current
        self._sizes: dict[str, int] = {}  # name -> bytes, of each file with a current body
        self._counted: set[str] = set()  # files that a checkpoint needs
        # Process ids repeat (in containers, at every start), so a random token tells the files of two stores apart.
        self._token, self._serial = secrets.token_hex(6), 0

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
        self._forget(key)
        self._keep(key, body)

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._memory.keys() | self._files.keys())

    @property
    def folder(self) -> Path:
        """The folder of files: the given one, or a temporary folder that is removed with the store."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="lilliput-")
            self._folder = Path(self._temporary.name)
        return self._folder

    @property
    def sizes(self) -> dict[str, int]:
        """The files that hold a current body, and their sizes in bytes."""
        return dict(self._sizes)

    def flush(self, prefix: str) -> dict[str, File]:
        """Write all bodies that are not on disk into one file named `prefix`-...; returns the place of every body.

        Also moves the current bodies of files of which less than half is current.
        """
        sparse = {name for name, size in self._sizes.items() if 2 * self._live[name] < size}
        moving = {key: file for key, file in self._files.items() if file.name in sparse}
        fresh = [key for key in self._memory if key not in self._files]
        self._write(prefix, fresh, moving)
        self._counted |= self._sizes.keys()
        return dict(self._files)

    def settle(self) -> None:
        """Record that a checkpoint needs the files of the last flush, and no others."""
        self._counted = set(self._sizes)

    def restore(self, files: Mapping[str, File], sizes: Mapping[str, int]) -> None:
        """Replace the content with these bodies, in files of these sizes, which a checkpoint needs."""
        self._memory.clear()
        self._bytes = 0
        self._files, self._sizes = dict(files), dict(sizes)
        self._live = Counter()
        for file in self._files.values():
            self._live[file.name] += file.bytes
        self.settle()

    def _keep(self, key: str, body: Body) -> None:
        self._bytes -= tree.size(self._memory.pop(key, {}))
        self._memory[key] = body
        self._bytes += tree.size(body)
        if self._bytes > self.limit_bytes:
            self._spill()

    def _spill(self) -> None:
        """Free a quarter of the limit at once, because one file per body would wait for the disk each time."""
        leaving, left = [], self._bytes
        for key in list(self._memory)[:-1]:
            if left <= 0.75 * self.limit_bytes:
                break
            leaving.append(key)
            left -= tree.size(self._memory[key])
        self._write("spill", [key for key in leaving if key not in self._files], {})
        for key in leaving:
            del self._memory[key]
        self._bytes = left

    def _write(self, prefix: str, keys: Iterable[str], moving: Mapping[str, File]) -> None:
        """Write bodies in memory (`keys`) and on disk (`moving`) into a new file."""
        keys = list(keys)
        if not keys and not moving:
            return
        self._serial += 1
        name = f"{prefix}-{self._token}-{self._serial}.states"
        written, offset = {}, 0
        with replacing(self.folder / name) as out:
            for key in (*keys, *moving):
                data = moving[key].raw(self.folder) if key in moving else wire.encode(self._memory[key])
                out.write(data)
                written[key] = File(name, len(data), checksum(data), offset)
                offset += len(data)
        for key in moving:
            self._forget(key)
        self._files |= written
        self._live[name] = self._sizes[name] = offset

    def _forget(self, key: str) -> None:
        """Drop a key's body on disk, and its file if nothing else in it is current and no checkpoint needs it."""
        file = self._files.pop(key, None)
        if file is None:
            return
        self._live[file.name] -= file.bytes
        if self._live[file.name] <= 0:
            del self._live[file.name], self._sizes[file.name]
            if file.name not in self._counted:
                (self.folder / file.name).unlink(missing_ok=True)
