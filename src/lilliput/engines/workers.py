"""Many clients at a time on one machine: long-lived worker processes of one thread each.

Messages, states and replies go through shared memory in the wire's format; what all clients of a call are sent is
written once.  Within a round a client stays with its worker, which holds its staged state.  Sums happen in this
process, in the order of client ids, so that the number of workers changes no bit.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from lilliput.engines.shared import Segment, View, receive_fd, send_fd
from lilliput.engines.tuning import tuned
from lilliput.fleet import Device, Job, Request, Response
from lilliput.tree import Body


@dataclass(eq=False)
class Worker:
    """The parent's end of one worker process."""

    process: Any
    control: Connection
    channel: socket.socket
    outbox: Segment = field(default_factory=Segment)  # messages and states, to the worker
    inbox: View = field(default_factory=View)  # replies and states, from it
    common: int = -1  # the segment number and call of the common body that the worker has mapped
    busy: Request | None = None
    since: float = 0.0


class Workers:
    """Worker processes, forked where that is safe and spawned for CUDA.

    workers: how many; one per core by default, and per GPU `slots_per_gpu` when device names GPUs.
    device:  cpu, cuda, cuda:0,1 (several GPUs) or mps.
    threads: intra-op threads of each worker; bits are the same for any number of workers with one.
    """

    def __init__(self, workers: int | None = None, device: str = "cpu", threads: int = 1, slots_per_gpu: int = 1):
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1")
        self._devices = devices(device, slots_per_gpu, workers or cores())
        self.slots = len(self._devices)
        self.threads = threads
        # Elsewhere than on Linux system libraries start threads of their own, and CUDA does everywhere.
        self._method = "fork" if device == "cpu" and sys.platform == "linux" else "spawn"
        self._workers: list[Worker] = []
        self._queue: deque[Request] = deque()
        self._ready: deque[Response] = deque()
        self._home: dict[int, Worker] = {}
        self._common = Segment()
        self._common_of: tuple[Any, int] | None = None  # (tag, length) of the body in the common segment
        self._written = 0

    def __repr__(self) -> str:
        return f"Workers({self.slots})"

    def open(self, job: Job) -> None:
        self._job = job
        self._workers = [self._start(device) for device in self._devices]

    def _start(self, device: str) -> Worker:
        context: Any = mp.get_context(self._method)
        control, theirs = context.Pipe()
        channel, their_channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        inherited = [w.control for w in self._workers] + [w.channel for w in self._workers] + [control, channel]
        close = [x.fileno() for x in inherited] if self._method == "fork" else []
        process = context.Process(
            target=_serve, args=(self._job, device, self.threads, theirs, their_channel, close), daemon=True
        )
        process.start()
        theirs.close()
        their_channel.close()
        return Worker(process, control, channel)

    def send(self, request: Request) -> None:
        self._queue.append(request)
        self._dispatch()

    def _dispatch(self) -> None:
        """Give waiting requests to idle workers: a client's own in this round, else any."""
        for request in list(self._queue):
            home = self._home.get(request.client)
            if home is not None and home not in self._workers:
                self._queue.remove(request)
                self._ready.append(Response(request.client, error="its worker process died earlier in the round"))
                continue
            idle = [w for w in ([home] if home else self._workers) if w.busy is None]
            if idle:
                self._queue.remove(request)
                self._give(idle[0], request)

    def _give(self, worker: Worker, request: Request) -> None:
        self._home[request.client] = worker
        worker.busy, worker.since = request, time.monotonic()
        if self._common_of is None or self._common_of[0] != request.tag:
            self._common_of = (request.tag, self._common.write(request.common))
            self._written += 1
        number = worker.outbox.number
        length = worker.outbox.write({"own": request.own, "state": request.state})
        try:
            new_common = worker.common != self._common.number
            worker.control.send(
                ("call", request.tag, request.client, request.handler, length, bool(request.state),
                 worker.outbox.number != number, self._common_of[1], new_common, self._written)
            )  # fmt: skip
            if worker.outbox.number != number:
                send_fd(worker.channel, worker.outbox.fd)
            if new_common:
                send_fd(worker.channel, self._common.fd)
                worker.common = self._common.number
        except OSError:
            self._bury(worker)

    def receive(self, timeout: float | None) -> Response:
        while not self._ready:
            busy = [w for w in self._workers if w.busy is not None]
            if not busy:
                raise RuntimeError("no worker is busy, so no response can come")
            left = None
            if timeout is not None:
                left = max(0.0, min(w.since for w in busy) + timeout - time.monotonic())
            done = wait([w.control for w in busy], left)
            for worker in busy:
                if worker.control in done:
                    self._collect(worker)
                elif timeout is not None and time.monotonic() - worker.since >= timeout:
                    self._bury(worker, f"did not answer within {timeout:g} seconds")
            self._dispatch()
        return self._ready.popleft()

    def _collect(self, worker: Worker) -> None:
        try:
            response, length, grown, number = worker.control.recv()
            if grown:
                worker.inbox.map(receive_fd(worker.channel), number)
        except (EOFError, OSError, IndexError):
            self._bury(worker)
            return
        if length is not None:
            response.body = worker.inbox.read(length, copy=True)
        worker.busy = None
        self._ready.append(response)

    def _bury(self, worker: Worker, why: str = "its worker process died") -> None:
        """A worker that died or hangs fails the client it was on; a new one takes its place."""
        place = self._workers.index(worker)
        worker.process.kill()
        worker.process.join()
        worker.control.close()
        worker.channel.close()
        if worker.busy is not None:
            self._ready.append(Response(worker.busy.client, error=why))
        self._workers.pop(place)
        self._workers.insert(place, self._start(self._devices[place]))

    def commit(self, clients: Sequence[int]) -> dict[int, Body]:
        states: dict[int, Body] = {}
        for worker in list(self._workers):
            mine = [c for c in clients if self._home.get(c) is worker]
            try:
                worker.control.send(("commit", mine))
                length, grown, number = worker.control.recv()
                if grown:
                    worker.inbox.map(receive_fd(worker.channel), number)
                states |= {int(c): body for c, body in worker.inbox.read(length, copy=True).items()}
            except (EOFError, OSError):
                self._bury(worker)
        self._home.clear()
        self._queue.clear()
        self._ready.clear()
        return states

    def close(self) -> None:
        for worker in self._workers:
            worker.control.close()
            worker.channel.close()
        for worker in self._workers:
            worker.process.join(2.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.outbox.close()
        self._workers.clear()
        self._common.close()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(names: str, slots: int, on_cpu: int) -> list[str]:
    """The device of each worker: `cuda:0,1` with two slots is cuda:0, cuda:0, cuda:1, cuda:1."""
    if names in ("cpu", "mps"):
        return [names] * (on_cpu if names == "cpu" else slots)
    kind, _, listed = names.partition(":")
    if kind != "cuda" or not all(part.isdigit() for part in (listed or "0").split(",")):
        raise ValueError(f"device {names!r} is not one of cpu, mps, cuda, cuda:0 or cuda:0,1")
    numbers = listed.split(",") if listed else [str(i) for i in range(max(1, torch.cuda.device_count()))]
    return [f"cuda:{n}" for n in numbers for _ in range(slots)]


def _serve(job: Job, device: str, threads: int, control: Connection, channel: socket.socket, close: list[int]) -> None:
    """The worker process: answer calls until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle; its end is then ours
    for fd in close:  # inherited ends of other workers' pipes would keep those alive
        os.close(fd)
    with tuned(job.task, threads):
        loop = _Loop(job, device, control, channel)
        try:
            while True:
                loop.answer(control.recv())
        except (EOFError, OSError):
            pass
    os._exit(0)  # a forked child must not run the parent's exit handlers


class _Loop:
    def __init__(self, job: Job, device: str, control: Connection, channel: socket.socket):
        self.device = Device(job, device, clone=True)
        self.control, self.channel = control, channel
        self.messages, self.commons, self.replies = View(), View(), Segment()
        self.common: tuple[int, Body] = (0, {})

    def answer(self, order: tuple) -> None:
        if order[0] == "commit":
            states = {str(c): body for c, body in self.device.commit(order[1]).items()}
            self._reply(states)
            return
        _, tag, client, handler, length, stateful, grown, common_length, new_common, written = order
        if grown:
            self.messages.map(receive_fd(self.channel), 0)
        if new_common:
            self.commons.map(receive_fd(self.channel), 0)
        if self.common[0] != written:
            self.common = (written, self.commons.read(common_length, copy=False))
        # A state outlives its message, whose memory the next one takes.
        body: Any = self.messages.read(length, copy=stateful)
        response = self.device.handle(Request(tag, client, handler, self.common[1], body["own"], body["state"]))
        response.cause = None  # exceptions of a user's own need not survive a pipe
        self._reply(response.body, response)

    def _reply(self, body: Body | None, response: Response | None = None) -> None:
        number = self.replies.number
        length = self.replies.write(body) if body is not None else None
        grown = self.replies.number != number
        sent = (length, grown, self.replies.number)
        if response is not None:
            self.control.send((replace(response, body=None), *sent))
        else:
            self.control.send(sent)
        if grown:
            send_fd(self.channel, self.replies.fd)
