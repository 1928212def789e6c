"""Runs many clients at a time on one machine, in long-lived worker processes of one thread each.

Messages, states and replies go through shared memory in the wire's format; the part of a message that all clients
receive is written once.  Within a round a client stays with its worker, which holds its staged state.  This process
computes sums, in the order of client ids, so that the number of workers changes no bit.

If a worker ends, its staged states are lost: all workers are restarted, and WorkerLost asks to repeat the round.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from lilliput.core.tree import Body
from lilliput.engines.attempts import WorkerLost
from lilliput.engines.device import Job, Request, Response
from lilliput.engines.serving import interrupts_deferred, serve
from lilliput.engines.shared import Segment, View, receive_fd, send_fd

SECONDS_TO_END = 2.0  # for all idle workers together, when the engine closes


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

    def descriptors(self) -> list[int]:
        """The parent's open files that a fork inherits."""
        ours = [self.control.fileno(), self.channel.fileno(), self.process.sentinel]
        return ours if self.outbox.fd < 0 else [*ours, self.outbox.fd]

    def hear(self) -> tuple[Response | None, Body | None]:
        """The worker's answer.  Raises EOFError or OSError if it has ended."""
        response, length, grown, number = self.control.recv()
        if grown:
            self.inbox.map(receive_fd(self.channel), number)
        return response, self.inbox.read(length, copy=True) if length is not None else None

    def release(self) -> None:
        """Free the resources of a worker that has ended."""
        self.process.join()
        self.process.close()
        self.outbox.close()


class Workers:
    """Runs clients at the same time in worker processes on all cores or GPUs: for long rounds, and for timeouts.

    workers: how many; by default one per core, or `slots_per_gpu` per GPU.
    device:  cpu, cuda, cuda:0,1 (several GPUs) or mps.
    threads: intra-op threads of each worker; with one, the bits are the same for any number of workers.
    slots_per_gpu: workers that share a GPU.
    """

    interrupts = True

    def __init__(self, workers: int | None = None, device: str = "cpu", threads: int = 1, slots_per_gpu: int = 1):
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1")
        self._devices = devices(device, slots_per_gpu, workers or cores())
        self.slots = len(self._devices)
        self.threads = threads
        # Forking is unsafe with threads, which CUDA starts everywhere, and system libraries start outside Linux.
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
        for device in self._devices:
            self._workers.append(self._start(device))

    def _start(self, device: str) -> Worker:
        context: Any = mp.get_context(self._method)
        control, theirs = context.Pipe()
        channel, their_channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        inherited = [fd for w in self._workers for fd in w.descriptors()] + [control.fileno(), channel.fileno()]
        close = inherited if self._method == "fork" else []
        process = context.Process(
            target=serve,
            args=(self._job, device, self.threads, os.getpid(), theirs, their_channel, close),
            daemon=True,
        )
        with interrupts_deferred():
            process.start()
            theirs.close()
            their_channel.close()
            return Worker(process, control, channel)

    def send(self, request: Request) -> None:
        self._queue.append(request)
        self._dispatch()

    def _dispatch(self) -> None:
        """Give waiting requests to idle workers: to the client's worker in this round, else to any."""
        for request in list(self._queue):
            home = self._home.get(request.client)
            idle = [w for w in ([home] if home else self._workers) if w.busy is None]
            if idle:
                self._queue.remove(request)
                self._give(idle[0], request)

    def _give(self, worker: Worker, request: Request) -> None:
        self._home[request.client] = worker
        worker.busy, worker.since = request, time.monotonic()
        if self._common_of is None or self._common_of[0] is not request.tag:  # an equal tag may have another body
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
            raise self._lost() from None  # the worker ended before it had this request

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
                    raise self._lost(f"did not answer within {timeout:g} seconds", worker.busy, late=True)
            self._dispatch()
        return self._ready.popleft()

    def _collect(self, worker: Worker) -> None:
        try:
            response, body = worker.hear()
        except (EOFError, OSError):
            raise self._lost(busy=worker.busy) from None
        assert response is not None
        response.body, worker.busy = body, None
        self._ready.append(response)

    def _lost(
        self, why: str = "its worker process died", busy: Request | None = None, late: bool = False
    ) -> WorkerLost:
        """Restart every worker, which drops all staged states; returns the error to raise."""
        self.close()
        self.open(self._job)
        return WorkerLost(why, None if busy is None else busy.client, late)

    def commit(self, clients: Sequence[int]) -> dict[int, Body]:
        try:
            states = dict(self._states(clients))
        except (EOFError, OSError):
            raise self._lost() from None
        self._forget()
        return states

    def _states(self, clients: Sequence[int]) -> Iterator[tuple[int, Body]]:
        """The changed states, one body each, because together they may exceed the limits of a body."""
        for worker in self._workers:
            worker.control.send(("commit", [c for c in clients if self._home.get(c) is worker]))
            for c in worker.control.recv():
                worker.control.send(("state", c))
                _, state = worker.hear()
                yield c, state or {}

    def _forget(self) -> None:
        self._home.clear()
        self._queue.clear()
        self._ready.clear()

    def close(self) -> None:
        """End all workers: idle workers end by themselves, and busy ones, whose answers nobody needs, are killed."""
        for worker in self._workers:
            worker.control.close()
            worker.channel.close()
            if worker.busy is not None:
                worker.process.kill()
        ends = {worker.process.sentinel: worker for worker in self._workers}
        until = time.monotonic() + SECONDS_TO_END
        while ends and (left := until - time.monotonic()) > 0:
            for sentinel in wait(list(ends), left):
                del ends[sentinel]  # type: ignore[arg-type]
        for worker in ends.values():
            worker.process.kill()
        for worker in self._workers:
            worker.release()
        self._workers.clear()
        self._common.close()
        self._common_of = None
        self._forget()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(names: str, slots: int, on_cpu: int) -> list[str]:
    """The device of each worker: `cuda:0,1` with two slots is cuda:0, cuda:0, cuda:1, cuda:1.

    Raises ValueError if `names` is not a device.
    """
    if names in ("cpu", "mps"):
        return [names] * (on_cpu if names == "cpu" else slots)
    kind, _, listed = names.partition(":")
    if kind != "cuda" or not all(part.isdigit() for part in (listed or "0").split(",")):
        raise ValueError(f"device {names!r} is not one of cpu, mps, cuda, cuda:0 or cuda:0,1")
    numbers = listed.split(",") if listed else [str(i) for i in range(max(1, torch.cuda.device_count()))]
    return [f"cuda:{n}" for n in numbers for _ in range(slots)]
