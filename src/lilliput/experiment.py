"""An experiment: a method, a task, everyone's data, and the loop over rounds."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from lilliput import checkpoint, evaluation
from lilliput.data.batches import as_batches, pooled
from lilliput.engines import Engine, Round, resolve
from lilliput.engines.tuning import tuned
from lilliput.fleet import Job, Model, Profile
from lilliput.store import Store, write
from lilliput.tree import Body, Tree, shapes

Row = dict[str, Any]


class Reporter(Protocol):
    """Told of a run as it goes: a live table, TensorBoard, a tracking service."""

    def start(self, experiment: Experiment, rows: list[Row]) -> None: ...

    def progress(self, round: int, done: int, total: int) -> None: ...

    def row(self, row: Row) -> None: ...

    def end(self, rows: list[Row]) -> None: ...


@dataclass(frozen=True)
class Stop:
    """When a run ends before its last round.

    target:            a metric and a bound, such as "accuracy>=0.9" or "loss<=1.2".
    comm_threshold_mb: megabytes (10^6 bytes) of payload, up and down together.
    seconds:           wall time.
    patience:          evaluations without a better value of the target's metric (or accuracy, or loss).
    """

    target: str | None = None
    comm_threshold_mb: float | None = None
    seconds: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("comm_threshold_mb", "seconds", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"stop.{name} is {value}; it must be positive")
        self.bound()

    def bound(self) -> tuple[str, str, float] | None:
        """(metric, ">=" or "<=", value) of the target."""
        if self.target is None:
            return None
        for sign in (">=", "<="):
            metric, found, value = self.target.partition(sign)
            try:
                if found:
                    return metric.strip(), sign, float(value)
            except ValueError:
                break
        raise ValueError(f"stop.target {self.target!r} is not like 'accuracy>=0.9' or 'loss<=1.2'")

    def reason(self, rows: Sequence[Row]) -> str | None:
        """Why the run should end now, or None."""
        bound = self.bound()
        if bound and bound[0] in rows[-1] and better(bound[1], rows[-1][bound[0]], bound[2]):
            return f"reached {self.target}"
        sent = sum(r["up_bytes"] + r["down_bytes"] for r in rows)
        if self.comm_threshold_mb is not None and sent >= self.comm_threshold_mb * 1e6:
            return f"sent {sent / 1e6:.1f} MB"
        if self.seconds is not None and sum(r["seconds"] for r in rows) >= self.seconds:
            return f"ran for {self.seconds:g} seconds"
        if self.patience is not None and stale(rows, bound) >= self.patience:
            return f"no better value in {self.patience} evaluations"
        return None


def better(sign: str, a: float, b: float) -> bool:
    """Whether a is at least as good as b where larger (">=") or smaller ("<=") is better."""
    return a >= b if sign == ">=" else a <= b


def headline(rows: Sequence[Row], bound: tuple[str, str, float] | None = None) -> tuple[str, str] | None:
    """The metric that says how good the model is, and its direction: the target's, else accuracy, else loss."""
    if bound:
        return bound[0], bound[1]
    for name, sign in (("accuracy", ">="), ("clients/accuracy", ">="), ("loss", "<="), ("clients/loss", "<=")):
        if any(name in r for r in rows):
            return name, sign
    return None


def stale(rows: Sequence[Row], bound: tuple[str, str, float] | None) -> int:
    """Evaluations since the best value of the headline metric."""
    metric = headline(rows, bound)
    values = [r[metric[0]] for r in rows if metric and metric[0] in r]
    if not values or metric is None:
        return 0
    best = (max if metric[1] == ">=" else min)(range(len(values)), key=values.__getitem__)
    return len(values) - 1 - best


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
    timeout:     seconds that a client may take; engines that run clients elsewhere enforce it.
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
        if self.evaluate in ("server", "both") and self.test is None:
            raise ValueError(f"evaluate={self.evaluate!r} needs a test set; give test=")
        if self.evaluate in ("clients", "both") and not self.client_test:
            raise ValueError(f"evaluate={self.evaluate!r} needs the clients' test sets; give client_test=")

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be this experiment's."""
        state = self.task.init()
        return {
            "algorithm": type(self.algorithm).__name__,
            "settings": json.loads(json.dumps(_settings(self.algorithm), default=repr)),
            "model": [[name, list(shape)] for name, shape in shapes(state["params"])],
            "examples": {str(c): batches.examples for c, batches in sorted(self.data.items())},
            "seed": self.seed,
            "codec": repr(self.codec),
        }

    def run(self, engine: str | Engine = "auto", resume: bool = False) -> History:
        """Run to the end (or, with `resume`, on from the folder's checkpoint) and return the history.

        engine: auto, sequential, workers, or an engine object.
        Raises QuorumError if too few clients answer, CheckpointError if there is nothing sound to resume.
        """
        chosen = resolve(engine)
        with tuned(self.task, getattr(chosen, "threads", 1)) as report:
            run = _Run(self, chosen, resume)
            try:
                return replace(run.loop(), tuning=report)
            finally:
                run.engine.close()

    def _start(self) -> Body:
        state = self.algorithm.init(self.task)
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


def _settings(algorithm: Any) -> dict[str, Any]:
    if not is_dataclass(algorithm):
        return {"repr": repr(algorithm)}
    return {
        k: v
        for k, v in vars(algorithm).items()
        if not isinstance(v, dict) or not any(hasattr(x, "shape") for x in v.values())
    }


class _Run:
    """One execution of an experiment: what changes while it goes."""

    def __init__(self, experiment: Experiment, engine: Engine, resume: bool):
        self.e = e = experiment
        self.engine = engine
        self.folder = Path(e.folder) if e.folder is not None else None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        saved = self._find(resume)
        run = saved.run if saved else uuid.uuid4().hex[:12]
        profiles = e.profiles if isinstance(e.profiles, Mapping) else {c: e.profiles or Profile() for c in e.data}
        profiles = {c: profiles[c] if c in profiles else Profile() for c in e.data}
        handlers = {"evaluate": evaluation.evaluate}
        self.job = Job(
            run, e.algorithm, e.task, e.data, profiles, e.seed, e.rounds, e.codec, e.client_test or {}, handlers
        )
        self.store = Store(self.folder / "checkpoint" if self.folder else None, e.store_bytes)
        self.rows: list[Row] = []
        self.done, self.attempt, self._saved, self._cost = 0, 0, time.perf_counter(), 0.0
        if saved and self.folder:
            self.state = saved.read_server(self.folder / "checkpoint")
            self.store.restore(saved.states)
            self.done, self.attempt = saved.round, saved.attempt + 1
        else:
            self.state = e._start()
        if self.folder:
            self.rows = checkpoint.cut_lines(self.folder / "metrics.jsonl", self.done)
            checkpoint.cut_lines(self.folder / "ledger.jsonl", self.done)
            if len(self.rows) < self.done:
                raise checkpoint.CheckpointError(
                    f"{self.folder / 'metrics.jsonl'} lacks rounds that the checkpoint has done"
                )
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
        saved.check(self.e.identity(), self.folder)
        return saved

    def loop(self) -> History:
        e, stopped = self.e, ""
        models: dict[Any, Model] = {}
        for reporter in e.reporters:
            reporter.start(e, self.rows)
        try:
            if self.rows:
                stopped = e.stop.reason(self.rows) or ""
            while self.done < e.rounds and not stopped:
                models = self._round()
                stopped = e.stop.reason(self.rows) or ""
                self._checkpoint(last=bool(stopped) or self.done == e.rounds)
            if not models:
                models = e.algorithm.models(self.state, self._fleet(self.done, evaluating=True))
        finally:  # a live table gives the terminal back, whatever happened
            for reporter in e.reporters:
                reporter.end(self.rows)
        return History(self.rows, self.state, models, stopped)

    def _fleet(self, number: int, evaluating: bool = False) -> Round:
        e = self.e
        fleet = Round(
            self.engine, self.job, self.store, number, attempt=self.attempt, quorum=e.quorum, timeout=e.timeout,
            cohort=e.cohorts[number - 1] if e.cohorts and number else None, reply_limit=e.reply_limit,
            progress=self._progress(number),
        )  # fmt: skip
        fleet.evaluating = evaluating
        return fleet

    def _progress(self, number: int) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            for reporter in self.e.reporters:
                reporter.progress(number, done, total)

        return tell

    def _round(self) -> dict[Any, Model]:
        e, number, started = self.e, self.done + 1, time.perf_counter()
        fleet = self._fleet(number)
        state = e.algorithm.round(self.state, fleet)
        fleet.commit()
        self.state, self.done = state, number
        seconds = time.perf_counter() - started
        models: dict[Any, Model] = {}
        metrics: dict[str, float] = {}
        if number == e.rounds or (number % e.evaluate_every == 0 and e.evaluate != "none"):
            after = self._fleet(number, evaluating=True)
            models, metrics = evaluation.run(e, self.state, after)
            fleet.ledger.entries.extend(after.ledger.entries)
        self.engine = _grown(self.engine, seconds)
        self._write({"round": number, **metrics, **self._measured(fleet, seconds)}, fleet)
        if metrics and self.folder and stale(self.rows, e.stop.bound()) == 0:
            write(self.folder, "best.safetensors", {"round": number, "models": evaluation.saved(models)})
        return models

    def _measured(self, fleet: Round, seconds: float) -> Row:
        trained = sum(m.get("examples", n) for n, m in fleet.metrics)
        row: Row = {}
        for name in ("loss", "contrast"):
            seen = [(n, m[name]) for n, m in fleet.metrics if name in m]
            if seen:
                row[f"train_{name}"] = sum(n * x for n, x in seen) / sum(n for n, _ in seen)
        row |= {
            "seconds": seconds,
            "examples": int(trained),
            "examples_per_second": trained / seconds if seconds else math.inf,
        }
        tokens = getattr(self.e.task, "tokens_per_example", None)
        if tokens:
            row["tokens_per_second"] = tokens * row["examples_per_second"]
        row |= {**fleet.ledger.totals(), "clients": len(fleet.called) - len(fleet.out)}
        if hasattr(self.e.algorithm, "lr_at"):
            row["lr"] = self.e.algorithm.lr_at(fleet.round, self.e.rounds)
        kinds = {"comm": ("encode", "transfer", "decode"), "all": None}.get(self.e.profile or "", ())
        split = fleet.ledger.seconds()
        return row | {f"seconds/{k}": v for k, v in split.items() if kinds is None or k in kinds}

    def _write(self, row: Row, fleet: Round) -> None:
        self.rows.append(row)
        if self.folder:
            for name, line in (("metrics.jsonl", json.dumps(row)), ("ledger.jsonl", fleet.ledger.line())):
                with open(self.folder / name, "a") as out:
                    out.write(line + "\n")
                    out.flush()
                    os.fsync(out.fileno())
        for reporter in self.e.reporters:
            reporter.row(row)

    def _checkpoint(self, last: bool) -> None:
        if self.folder is None:
            return
        every = self.e.checkpoint_every
        due = self.done % every == 0 if every else time.perf_counter() - self._saved >= 20 * self._cost
        if due or last:
            fields = {"run": self.job.run, "identity": self.e.identity(), "round": self.done, "attempt": self.attempt}
            self._cost = checkpoint.save(self.folder / "checkpoint", fields, self.state, self.store)
            self._saved = time.perf_counter()


def _grown(engine: Engine, seconds: float) -> Engine:
    """What the engine wants to be replaced by for the next round, once it has seen how long one takes."""
    grow = getattr(engine, "grow", None)
    return grow(seconds) if grow else engine
