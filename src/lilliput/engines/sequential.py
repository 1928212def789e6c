"""The reference engine: runs one client after another in this process and passes everything by reference.

With `wire=True` it encodes and decodes every message, reply and state, as between machines.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from lilliput import wire
from lilliput.core.tree import Body
from lilliput.engines.device import Device, Job, Request, Response


class Sequential:
    """Runs one client after another in this process, on one device: the simplest engine, best to debug with.

    wire:    encodes and decodes every message, as between machines.
    device:  cpu, cuda, cuda:1 or mps.
    threads: intra-op threads; with one, the bits are those of every other engine.
    """

    slots = 1
    interrupts = False  # a handler that hangs would hang this process

    def __init__(self, wire: bool = False, device: torch.device | str = "cpu", threads: int = 1):
        self.wire = wire
        self.device = device
        self.threads = threads
        self._queue: deque[Request] = deque()

    def __repr__(self) -> str:
        return "Sequential(wire=True)" if self.wire else "Sequential()"

    def open(self, job: Job) -> None:
        self._device = Device(job, self.device)

    def send(self, request: Request) -> None:
        self._queue.append(request)

    def receive(self, timeout: float | None) -> Response:
        request = self._queue.popleft()
        if not self.wire:
            return self._device.handle(request)
        started = time.perf_counter()
        request.common, request.own = copied(request.common), copied(request.own)
        request.state = copied(request.state) if request.state is not None else None
        transfer = time.perf_counter() - started
        response = self._device.handle(request)
        if response.body is not None:
            started = time.perf_counter()
            response.body = copied(response.body)
            response.seconds["transfer"] = transfer + time.perf_counter() - started
        return response

    def commit(self, clients: Sequence[int]) -> dict[int, Body]:
        states = self._device.commit(clients)
        return {c: copied(state) for c, state in states.items()} if self.wire else states

    def close(self) -> None:
        self._queue.clear()


def copied(body: Body) -> Body:
    """The body, encoded and decoded."""
    return wire.decode(wire.encode(body))
