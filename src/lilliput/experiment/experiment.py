"""An experiment: a method, a task, everyone's data, and all that decides a run's numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from lilliput.core.fleet import Model, Profile
from lilliput.core.tree import Body, Tree
from lilliput.data.batches import as_batches, pooled
from lilliput.engines import Dry, Engine, resolve
from lilliput.engines.device import Job
from lilliput.engines.dry import predict
from lilliput.engines.tuning import tuned
from lilliput.experiment import evaluation
from lilliput.experiment.identity import identity
from lilliput.experiment.loop import Run
from lilliput.experiment.stop import Row, Stop
from lilliput.optim.factory import check_projects


class Reporter(Protocol):
    """Told of a run as it goes: a live table, TensorBoard, a tracking service."""

    def start(self, experiment: Experiment, rows: list[Row]) -> None: ...

    def progress(self, round: int, done: int, total: int) -> None: ...

    def row(self, row: Row) -> None: ...

    def end(self, rows: list[Row]) -> None: ...


@dataclass(frozen=True)
class History:
    """What a run leaves: one row per round, the server's last state, and the models that would be evaluated."""

    rows: list[Row]
    state: Body
    models: dict[Any, Model]
    stopped: str = ""
    tuning: dict[str, Any] = field(default_factory=dict)


@dataclass
class Experiment:
    """Everything that decides a run's numbers.

    algorithm:   the method; task: model, loss and metrics; data: client -> batches (or explicit lists of batches).
    init:        parameters (and buffers) to start from, by name; the task's own for None.
    cohorts:     the clients of each round, instead of sampling.
    test:        the server's test set; client_test: what each client tests on.
    evaluate:    where models are evaluated, every `evaluate_every` rounds and after the last.
    profiles:    what each device has; one for all, or by client.
    quorum:      the share of a round's clients that must answer.
    timeout:     seconds that a client may take; for engines that can end one: auto and workers.
    reply_limit: bytes that a device may answer with.
    folder:      where metrics, ledger and checkpoints go; nothing is written without one.
    checkpoint_every: rounds between checkpoints; by default as often as it costs less than a twentieth of the time.
    """

    algorithm: Any
    task: Any
    data: Mapping[int, Any]
    rounds: int
    init: Tree | None = None
    cohorts: Sequence[Sequence[int]] | None = None
    seed: int = 0
    test: Any = None
    client_test: Mapping[int, Any] | None = None
    evaluate: Literal["server", "clients", "both", "none"] | None = None
    evaluate_every: int = 1
    profiles: Mapping[int, Profile] | Profile | None = None
    codec: Any = None
    quorum: float = 0.5
    timeout: float | None = None
    reply_limit: int = 1 << 30
    stop: Stop = field(default_factory=Stop)
    folder: str | os.PathLike | None = None
    checkpoint_every: int | None = None
    store_bytes: int = 1 << 30
    profile: Literal["comm", "all"] | None = None
    reporters: Sequence[Reporter] = ()

    def __post_init__(self) -> None:
        self.data = {int(c): as_batches(batches) for c, batches in self.data.items()}
        self.test = None if self.test is None else as_batches(self.test)
        self.client_test = {int(c): as_batches(b) for c, b in (self.client_test or {}).items()}
        self._check()
        if getattr(self.algorithm, "pooled", False):
            self.data = {0: pooled([self.data[c] for c in sorted(self.data)])}
            self.client_test = {0: pooled(list(self.client_test.values()))} if self.client_test else {}
        self.folder = None if self.folder is None else Path(self.folder)
        if self.evaluate is None:
            self.evaluate = "server" if self.test is not None else "clients" if self.client_test else "none"

    def _check(self) -> None:
        if not self.data:
            raise ValueError("there is no client; data must map clients to batches")
        empty = [c for c, batches in self.data.items() if not batches.examples]
        if empty:
            raise ValueError(f"client {empty[0]} has no data; leave it out, or use fewer clients")
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; it must be at least 1")
        if not 0 <= self.quorum <= 1:
            raise ValueError(f"quorum is {self.quorum}; it is a share, between 0 and 1")
        cohort = getattr(self.algorithm, "cohort", None)
        if cohort is not None and not 1 <= cohort <= len(self.data) and not getattr(self.algorithm, "pooled", False):
            raise ValueError(
                f"a cohort of {cohort} does not fit a fleet of {len(self.data)} clients; choose 1 to {len(self.data)}"
            )
        for cohort in self.cohorts or ():
            foreign = [c for c in cohort if c not in self.data]
            if foreign or not cohort:
                raise ValueError(
                    f"a cohort names client {foreign[0]}, which has no data" if foreign else "a cohort is empty"
                )
        if self.cohorts is not None and len(self.cohorts) < self.rounds:
            raise ValueError(f"cohorts lists {len(self.cohorts)} rounds, fewer than rounds={self.rounds}")
        model, optimizer = getattr(self.task, "model", None), getattr(self.algorithm, "optimizer", None)
        if optimizer is not None and isinstance(model, nn.Module):
            check_projects(optimizer, getattr(self.algorithm, "optimizer_options", {}), model)
        if self.evaluate in ("server", "both") and self.test is None:
            raise ValueError(f"evaluate={self.evaluate!r} needs a test set; give test=")
        if self.evaluate in ("clients", "both") and not self.client_test:
            raise ValueError(f"evaluate={self.evaluate!r} needs the clients' test sets; give client_test=")

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be this experiment's."""
        return identity(self)

    def run(self, engine: str | Engine = "auto", resume: bool = False) -> History:
        """Run to the end (or, with `resume`, on from the folder's checkpoint) and return the history.

        engine: auto, sequential, workers, dry (which tells what a run would cost), or an engine object.
        Raises ValueError for a task and data that the method sees do not fit each other (`check`, where it has one),
        QuorumError if too few clients answer, DivergedError if the server's state is not finite after a round,
        CheckpointError if there is nothing sound to resume.
        """
        chosen = resolve(engine)
        if self.timeout is not None and not getattr(chosen, "interrupts", True):
            raise ValueError(
                f"timeout is {self.timeout:g}, and {chosen!r} cannot end a client that takes longer; "
                "use engine=workers or auto, or leave timeout out"
            )
        if isinstance(chosen, Dry):
            predicted = predict(self)
            return History(predicted.rows, {}, {}, predicted.stopped)
        if hasattr(self.algorithm, "check"):
            self.algorithm.check(self.task, self.data)
        with tuned(self.task, getattr(chosen, "threads", 1)) as report:
            run = Run(self, chosen, resume)
            try:
                run.to_the_end()
                return History(run.rows, run.state, run.models, run.stopped, report)
            finally:
                run.engine.close()

    def trained(self, engine: str | Engine = "auto") -> dict[Any, Model]:
        """The models of the folder's last checkpoint, as they would be evaluated; writes nothing.

        Raises CheckpointError if there is none, or it is another experiment's.
        """
        chosen = resolve(engine)
        with tuned(self.task, getattr(chosen, "threads", 1)):
            run = Run(self, chosen, resume=True, reading=True)
            try:
                return run.last_models()
            finally:
                run.engine.close()

    def job(self, run: str) -> Job:
        """What server and devices agree on before a run of this name starts."""
        given = self.profiles if isinstance(self.profiles, Mapping) else dict.fromkeys(self.data, self.profiles)
        profiles = {c: given.get(c) or Profile() for c in self.data}
        return Job(
            run, self.algorithm, self.task, self.data, profiles, self.seed, self.rounds, self.codec,
            self.client_test or {}, {"evaluate": evaluation.evaluate}, self.timeout, self.reply_limit,
        )  # fmt: skip

    def _start(self) -> Body:
        state = self.algorithm.init(self.task)
        for name, x in state.get("params", {}).items():
            if x.is_meta:
                raise ValueError(f"{name!r} is on the meta device and has no values; load them, or use engine=dry")
        if self.init is not None:
            for kind in ("params", "buffers"):
                if kind in state:
                    state[kind] = {
                        n: self.init[n].detach().clone() if n in self.init else x for n, x in state[kind].items()
                    }
            unknown = [n for n in self.init if not any(n in state.get(kind, {}) for kind in ("params", "buffers"))]
            if unknown:
                raise ValueError(f"init names {unknown[0]!r}, which the model does not have")
        return state
