"""The engine that finds out: sequential for short rounds, workers for long ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lilliput.engines.base import Engine
from lilliput.engines.sequential import Sequential
from lilliput.engines.workers import Workers
from lilliput.fleet import Job, Request, Response
from lilliput.tree import Body

WORTHWHILE_SECONDS = 0.05  # of a round; below this, processes cost more than they bring


class Auto:
    """Runs the first round in this process and goes over to workers if it took long enough to be worth it.

    All engines give the same bits, so the change shows in nothing but time.
    """

    slots = 1

    def __init__(self, **options: Any):
        self._options = options
        self._engine: Engine = Sequential(device=options.get("device", "cpu"))

    def __repr__(self) -> str:
        return "Auto()"

    def open(self, job: Job) -> None:
        self._job = job
        self._engine.open(job)

    def grow(self, seconds: float) -> Engine:
        """The engine for the rounds that follow one of this many seconds."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        alone = cores < 2 or len(self._job.data) < 2 or getattr(self._job.algorithm, "ordered", False)
        if alone or seconds < WORTHWHILE_SECONDS or str(self._options.get("device", "cpu")) != "cpu":
            return self._engine
        self._engine.close()
        workers = Workers(**{k: v for k, v in self._options.items() if k in ("workers", "threads")})
        workers.open(self._job)
        return workers

    def send(self, request: Request) -> None:
        self._engine.send(request)

    def receive(self, timeout: float | None) -> Response:
        return self._engine.receive(timeout)

    def commit(self, clients: Sequence[int]) -> dict[int, Body]:
        return self._engine.commit(clients)

    def close(self) -> None:
        self._engine.close()
