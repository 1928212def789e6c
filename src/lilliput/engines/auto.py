"""The engine that chooses: sequential for short rounds, workers for long ones."""

from __future__ import annotations

from collections.abc import Sequence

from lilliput.core.tree import Body
from lilliput.engines.base import Engine
from lilliput.engines.device import Job, Request, Response
from lilliput.engines.sequential import Sequential
from lilliput.engines.workers import Workers, cores

WORTHWHILE_SECONDS = 0.05  # of a round; in shorter rounds, processes cost more than they save


class Auto:
    """Runs the first round in this process, then switches to workers if rounds are long enough: the right default.

    All engines give the same bits, so the switch affects nothing but time.
    """

    interrupts = True  # with a timeout it uses workers from the first round

    def __init__(self, workers: int | None = None, device: str = "cpu", threads: int = 1):
        self.threads = threads
        self._workers, self._device = workers, device
        self._engine: Engine = Sequential(device=device, threads=threads)

    def __repr__(self) -> str:
        return "Auto()"

    @property
    def slots(self) -> int:
        """The slots of the current engine."""
        return self._engine.slots

    def open(self, job: Job) -> None:
        self._job = job
        if job.timeout is not None:
            self._engine = Workers(self._workers, self._device, self.threads)
        self._engine.open(job)

    def grow(self, seconds: float) -> Engine:
        """The engine for the next rounds, given the seconds of the last one."""
        if isinstance(self._engine, Workers):
            return self._engine
        alone = cores() < 2 or len(self._job.data) < 2 or getattr(self._job.algorithm, "ordered", False)
        if alone or seconds < WORTHWHILE_SECONDS or self._device != "cpu":
            return self._engine
        self._engine.close()
        workers = Workers(self._workers, threads=self.threads)
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
