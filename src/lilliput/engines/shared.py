"""Memory that two processes share and nobody has to clean up.

A segment is an unlinked file in memory.  It has no name, so it disappears when the last process that holds it ends, in
whatever way.  Bodies are encoded directly into it, and decoded on the other side without a copy.
"""

from __future__ import annotations

import mmap
import os
import socket
import tempfile

from lilliput import wire
from lilliput.core.tree import Body


class Segment:
    """A growing piece of memory to which this process writes bodies for others to read."""

    def __init__(self) -> None:
        self.fd = -1
        self.number = 0  # rises with every growth, so that readers know to map again
        self._map: mmap.mmap | None = None

    def write(self, body: Body) -> int:
        """Encode the body at the segment's start; returns its length in bytes."""
        size = wire.nbytes(body)
        length = size.payload + size.overhead
        if self._map is None or len(self._map) < length:
            self._grow(length)
        assert self._map is not None
        return len(wire.encode(body, memoryview(self._map)))

    def _grow(self, length: int) -> None:
        self.close()
        self.fd = _anonymous_file()
        os.ftruncate(self.fd, max(length + length // 4, mmap.PAGESIZE))
        self._map = mmap.mmap(self.fd, 0)
        self.number += 1

    def close(self) -> None:
        if self._map is not None:
            os.close(self.fd)
            # The map itself is freed with its last view.
            self._map, self.fd = None, -1


class View:
    """The reading end of a segment."""

    def __init__(self) -> None:
        self.number = 0
        self._map: mmap.mmap | None = None

    def map(self, fd: int, number: int) -> None:
        """Read from this file from now on; takes ownership of the descriptor."""
        self._map = mmap.mmap(fd, 0)
        os.close(fd)
        self.number = number

    def read(self, length: int, copy: bool) -> Body:
        """The body of this length; without `copy` it is valid only until the writer writes again."""
        assert self._map is not None
        data = memoryview(self._map)[:length]
        return wire.decode(data, copy)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("lilliput")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def send_fd(channel: socket.socket, fd: int) -> None:
    """Send a file descriptor to the process at the other end of a Unix socket."""
    socket.send_fds(channel, [b"f"], [fd])


def receive_fd(channel: socket.socket) -> int:
    """The descriptor that `send_fd` sent.  Raises EOFError if the other process has ended."""
    descriptors = socket.recv_fds(channel, 1, 1)[1]
    if not descriptors:
        raise EOFError("the process that should send a descriptor has ended")
    return descriptors[0]
