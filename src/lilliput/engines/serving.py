"""The worker's end of the worker engine: a process that answers its parent's orders, and ends with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from lilliput.core.tree import Body
from lilliput.engines.device import Device, Job, Request, Response
from lilliput.engines.shared import Segment, View, receive_fd, send_fd
from lilliput.engines.tuning import tuned

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def serve(
    job: Job, device: str, threads: int, parent: int, control: Connection, channel: socket.socket, close: Sequence[int]
) -> None:
    """The worker process: answer orders until the parent, with process id `parent`, has ended.

    close: the parent's descriptors that a fork has inherited; they would keep other workers' pipes open.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts, and the worker ends with it
    end_with(parent)
    for fd in close:
        os.close(fd)
    with tuned(job.task, threads):
        loop = _Loop(job, device, control, channel)
        try:
            while True:
                loop.answer(control.recv())
        except (EOFError, OSError):
            pass
    os._exit(0)  # a forked child must not run the parent's exit handlers


def end_with(parent: int) -> None:
    """Make the kernel kill this process when its parent ends, even in the middle of a handler.

    On systems other than Linux, a worker ends when it next reads from the pipe and finds the other end closed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before this call
        os._exit(0)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Delay an interrupt until the block ends, because Python silently drops one that is raised within os.fork."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if seen:
            signal.raise_signal(signal.SIGINT)


class _Loop:
    def __init__(self, job: Job, device: str, control: Connection, channel: socket.socket):
        self.device = Device(job, device, clone=True)
        self.control, self.channel = control, channel
        self.messages, self.commons, self.replies = View(), View(), Segment()
        self.common: tuple[int, Body] = (0, {})
        self.staged: dict[int, Body] = {}  # of a round that is being committed

    def answer(self, order: tuple) -> None:
        """Execute one order: "call", "commit" (answers with the clients whose states changed) or "state" (of one)."""
        if order[0] == "commit":
            self.staged = self.device.commit(order[1])
            self.control.send(list(self.staged))
        elif order[0] == "state":
            self._reply(self.staged.pop(order[1]))
        else:
            self._call(*order[1:])

    def _call(
        self, tag: Any, client: int, handler: str, length: int, stateful: bool, grown: bool, common_length: int,
        new_common: bool, written: int,
    ) -> None:  # fmt: skip
        if grown:
            self.messages.map(receive_fd(self.channel), 0)
        if new_common:
            self.commons.map(receive_fd(self.channel), 0)
        if self.common[0] != written:
            self.common = (written, self.commons.read(common_length, copy=False))
        # A state outlives its message, and the next message reuses the memory.
        body: Any = self.messages.read(length, copy=stateful)
        response = self.device.handle(Request(tag, client, handler, self.common[1], body["own"], body["state"]))
        response.cause = None  # a user's exception may not survive pickling
        self._reply(response.body, response)

    def _reply(self, body: Body | None, response: Response | None = None) -> None:
        number = self.replies.number
        length = self.replies.write(body) if body is not None else None
        grown = self.replies.number != number
        self.control.send((None if response is None else replace(response, body=None), length, grown, number + grown))
        if grown:
            send_fd(self.channel, self.replies.fd)
