"""Where state lives between rounds: each client's, and what the server keeps per client.

A store holds bodies by key within a limit of memory; what was used longest ago spills to disk.  A file holds many
bodies, one behind another in the wire's format.  A checkpoint takes over those files and puts what is not on disk yet
into one more: it writes what changed, with one wait for the disk.  A file of which less than half still counts is
given up, and what counts of it is written again.
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
    """A body on disk: its file's name in the folder, its size and CRC-32, and where in the file it begins."""

    name: str
    bytes: int
    crc: int
    offset: int = 0

    def read(self, folder: Path) -> Body:
        """The body; raises OSError or ValueError that names the file if it is missing or damaged."""
        return wire.decode(self.raw(folder), copy=True)  # into memory of torch's, which is aligned

    def raw(self, folder: Path) -> bytearray:
        """The body's bytes, once their checksum has been checked."""
        path = folder / self.name
        with open(path, "rb") as file:
            file.seek(self.offset)
            data = bytearray(file.read(self.bytes))
        if len(data) != self.bytes or checksum(data) != self.crc:
            raise ValueError(f"{path} is damaged: its size or checksum is not the recorded one")
        return data


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
    with replacing(path) as out:
        out.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into that takes its name, whole and on the disk, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as out:
        yield out
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
        self._live: Counter[str] = Counter()  # bytes of each file that are current
        self._sizes: dict[str, int] = {}  # of each file with something current in it
        self._counted: set[str] = set()  # files that a checkpoint counts on
        # Process ids repeat, in containers at every start: only what is drawn tells the files of two stores apart.
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
        """Where files go; a temporary folder, removed with the store, unless one was given."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="lilliput-")
            self._folder = Path(self._temporary.name)
        return self._folder

    @property
    def sizes(self) -> dict[str, int]:
        """The files that hold something current, and their bytes."""
        return dict(self._sizes)

    def flush(self, prefix: str) -> dict[str, File]:
        """Write what is not on disk yet into one file whose name starts with `prefix`; where every key's body lies.

        What lies in a file of which less than half is current moves there too.
        """
        sparse = {name for name, size in self._sizes.items() if 2 * self._live[name] < size}
        moving = {key: file for key, file in self._files.items() if file.name in sparse}
        fresh = [key for key in self._memory if key not in self._files]
        self._write(prefix, fresh, moving)
        self._counted |= self._sizes.keys()
        return dict(self._files)

    def settle(self) -> None:
        """Note that a checkpoint counts on what the last flush gave, and none on anything else."""
        self._counted = set(self._sizes)

    def restore(self, files: Mapping[str, File], sizes: Mapping[str, int]) -> None:
        """Forget everything and go on from these bodies, in files of these sizes, which a checkpoint counts on."""
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
        """Make room for a quarter of the limit: a file for each body would be a wait for the disk each."""
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
        """Put bodies of the memory, and others that are on disk, into a new file."""
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
        """Let go of what is on disk of a key, and of its file when nothing else in it is current."""
        file = self._files.pop(key, None)
        if file is None:
            return
        self._live[file.name] -= file.bytes
        if self._live[file.name] <= 0:
            del self._live[file.name], self._sizes[file.name]
            if file.name not in self._counted:
                (self.folder / file.name).unlink(missing_ok=True)
