"""The loop over rounds: one execution of an experiment, from its start or its checkpoint to its end."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lilliput.core.fleet import Model
from lilliput.core.meter import process_memory
from lilliput.core.tree import Body
from lilliput.engines import Engine, Round, run_attempts
from lilliput.experiment import checkpoint, evaluation
from lilliput.experiment.logs import Log
from lilliput.experiment.stop import Row, Watch
from lilliput.wire.store import Store, write

if TYPE_CHECKING:
    from lilliput.experiment.experiment import Experiment

Out = TypeVar("Out")


class Run:
    """One execution of an experiment: what changes while it goes."""

    def __init__(self, experiment: Experiment, engine: Engine, resume: bool, reading: bool = False):
        """Check everything and write nothing: what is refused here leaves every byte as it was.

        reading: take the state of the last checkpoint as it is, not to train on.
        """
        self.e = e = experiment
        self.engine = engine
        self.folder = Path(e.folder) if e.folder is not None else None
        self.identity = e.identity() if self.folder else {}
        saved = self._find(resume)
        if saved is None and reading:
            raise checkpoint.CheckpointError(f"{self.folder} has no checkpoint yet; `lilliput resume` runs it")
        if saved and not reading:
            saved.check_rounds(e.algorithm, e.rounds, Path(str(self.folder)))
        run = saved.run if saved else uuid.uuid4().hex[:12]
        self.job = e.job(run)
        self.store = Store(self.folder / "checkpoint" if self.folder else None, e.store_bytes)
        self.rows: list[Row] = []
        self.done, self.attempt, self.stopped = 0, 0, ""
        self.models: dict[Any, Model] = {}
        self._saved, self._cost = time.perf_counter(), 0.0
        self._largest = ""  # whose change was the largest in the last round
        self._sound = True  # state, store and rows speak of the same round
        if saved and self.folder:
            self.state = saved.read_server(self.folder / "checkpoint")
            self.store.restore(saved.states, saved.files)
            self.done, self.attempt = saved.round, saved.attempt + 1
        else:
            self.state = e._start()
        self._logs = [] if reading or not self.folder else self._read_logs(self.folder)
        self.rows = self._logs[0].rows if self._logs else []
        self._watch = Watch(e.stop, self.rows)
        self.engine.open(self.job)

    def _find(self, resume: bool) -> checkpoint.Saved | None:
        if self.folder is None:
            if resume:
                raise ValueError("there is nothing to resume without a folder")
            return None
        saved = checkpoint.load(self.folder / "checkpoint")
        if saved is None:
            return None
        if not resume:
            raise checkpoint.CheckpointError(f"{self.folder} holds a run already; resume it, or choose another folder")
        saved.check(self.identity, self.folder)
        return saved

    def _read_logs(self, folder: Path) -> list[Log]:
        return [Log.of(folder / "metrics.jsonl", self.done), Log.of(folder / "ledger.jsonl", self.done, keep=False)]

    def last_models(self) -> dict[Any, Model]:
        """The models that would be evaluated after the last round done."""
        _, models = self._attempt(self.done, lambda fleet: self.e.algorithm.models(self.state, fleet), evaluating=True)
        return models

    def to_the_end(self) -> None:
        """Run all rounds that are left, or until a stop rule holds."""
        e = self.e
        for reporter in e.reporters:
            reporter.start(e, self.rows)
        for log in self._logs:
            log.begin()
        try:
            self.stopped = (self._watch.reason() if self.rows else None) or ""
            while self.done < e.rounds and not self.stopped:
                self._round()
                self.stopped = self._watch.reason() or ""
                self._checkpoint(due=bool(self.stopped) or self.done == e.rounds)
            if not self.models:
                self.models = self.last_models()
        except (KeyboardInterrupt, RuntimeError):
            if self._sound and self.done:  # rounds since the last checkpoint need not be lost
                self._checkpoint(due=True)
            raise
        finally:  # a live table gives the terminal back, whatever happened
            for reporter in e.reporters:
                reporter.end(self.rows)

    def _attempt(self, number: int, work: Callable[[Round], Out], evaluating: bool = False) -> tuple[Round, Out]:
        """Do the work of a round, again where a process was lost in it; the round that counts, and what work gave."""
        first = self.attempt

        def begin(again: int, without: Mapping[int, str]) -> Round:
            self.attempt = first + again
            return self._fleet(number, evaluating, without)

        return run_attempts(begin, work)

    def _fleet(self, number: int, evaluating: bool, without: Mapping[int, str]) -> Round:
        e = self.e
        fleet = Round(
            self.engine, self.job, self.store, number, attempt=self.attempt, quorum=e.quorum, timeout=e.timeout,
            cohort=e.cohorts[number - 1] if e.cohorts and number else None,
            progress=self._progress(number), without=without, before=self._largest,
        )  # fmt: skip
        fleet.evaluating = evaluating
        return fleet

    def _progress(self, number: int) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            for reporter in self.e.reporters:
                reporter.progress(number, done, total)

        return tell

    def _round(self) -> None:
        e, number, started = self.e, self.done + 1, time.perf_counter()
        fleet, (state, staged) = self._attempt(number, self._work)
        self._sound = False
        fleet.commit(staged)
        self.state, self.done, self._largest = state, number, fleet.largest()
        seconds = time.perf_counter() - started
        metrics: dict[str, float] = {}
        if number == e.rounds or (number % e.evaluate_every == 0 and e.evaluate != "none"):
            after, (self.models, metrics) = self._attempt(
                number, lambda fleet: evaluation.run(e, self.state, fleet), evaluating=True
            )
            for entry in after.ledger.entries:
                fleet.ledger.add(entry)
        self.engine = _grown(self.engine, seconds)
        self._write({"round": number, **metrics, **self._measured(fleet, seconds)}, fleet)
        self._sound = True
        if metrics and self.folder and self._watch.stale == 0:
            write(self.folder, "best.safetensors", {"round": number, "models": evaluation.saved(self.models)})

    def _work(self, fleet: Round) -> tuple[Body, dict[int, Body]]:
        """The server's state after a round, and the devices'."""
        state = self.e.algorithm.round(self.state, fleet)
        fleet.check_state(state)
        return state, fleet.staged()

    def _measured(self, fleet: Round, seconds: float) -> Row:
        trained = [(r.client, r.metrics.get("examples", fleet.examples[r.client])) for r in fleet.answers]
        examples = sum(n for _, n in trained)
        row: Row = {}
        for name in ("loss", "contrast"):
            seen = [(r.weight, r.metrics[name]) for r in fleet.answers if name in r.metrics]
            if mass := sum(n for n, _ in seen):
                row[f"train_{name}"] = sum(n * x for n, x in seen) / mass
        skipped = sum(r.metrics.get("skipped", 0) for r in fleet.answers)
        row |= {"skipped": int(skipped)} if skipped else {}
        row |= {
            "seconds": seconds,
            "examples": int(examples),
            "examples_per_second": examples / seconds if seconds else math.inf,
        }
        if getattr(self.e.task, "tokens_per_example", None):
            tokens = sum(n * fleet.weight(c) / fleet.examples[c] for c, n in trained)
            row["tokens_per_second"] = tokens / seconds if seconds else math.inf
        row |= {**fleet.ledger.totals(), "clients": len(fleet.called) - len(fleet.out)}
        row["process_memory_bytes"] = process_memory(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))
        if hasattr(self.e.algorithm, "lr_at"):
            row["lr"] = self.e.algorithm.lr_at(fleet.round, self.e.rounds)
        kinds = {"comm": ("encode", "transfer", "decode"), "all": None}.get(self.e.profile or "", ())
        split = fleet.ledger.seconds()
        return row | {f"seconds/{k}": v for k, v in split.items() if kinds is None or k in kinds}

    def _write(self, row: Row, fleet: Round) -> None:
        self.rows.append(row)
        self._watch.see(row)
        if self.folder:
            for log, line in zip(self._logs, (json.dumps(row), fleet.ledger.line()), strict=True):
                log.write(line)
        for reporter in self.e.reporters:
            reporter.row(row)

    def _checkpoint(self, due: bool) -> None:
        """Save, if it is due anyway, or by the experiment's interval, or because it has become cheap."""
        if self.folder is None:
            return
        every = self.e.checkpoint_every
        if due or (self.done % every == 0 if every else time.perf_counter() - self._saved >= 20 * self._cost):
            fields = {
                "run": self.job.run, "identity": self.identity, "planned": self.e.rounds, "round": self.done,
                "attempt": self.attempt,
            }  # fmt: skip
            self._cost = checkpoint.save(self.folder / "checkpoint", fields, self.state, self.store)
            self._saved = time.perf_counter()


def _grown(engine: Engine, seconds: float) -> Engine:
    """What the engine wants to be replaced by for the next round, once it has seen how long one takes."""
    grow = getattr(engine, "grow", None)
    return grow(seconds) if grow else engine
