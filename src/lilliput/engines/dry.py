"""Prediction: a method's own rounds over tensors without values, on the ledger of every other engine.

What travels is exact: bytes depend on names, shapes and types alone.  A device runs one step of every kind that a call
has, and the rest of the call costs as much again; what is done by one client is not done again for another of the same
message, state and batches, nor in a later round unless it asked for the round's number or drew something.  So what a
handler sends may depend on all of these, but not on the client's id.
Memory and FLOPs are those of the instrument that measures real runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from lilliput.core.fleet import Client
from lilliput.core.ledger import Ledger
from lilliput.core.meter import Cost, Meter
from lilliput.core.tree import Body, mapped
from lilliput.data.batches import ArrayBatches, Batches, ListBatches
from lilliput.engines.base import QuorumError, Round
from lilliput.engines.device import Computed, Device, Job, Request
from lilliput.engines.ghosts import Copies, Ghosts, copied, is_ghost
from lilliput.engines.prediction import Prediction, RoundCost
from lilliput.engines.sequential import Sequential
from lilliput.wire.store import Store

Out = TypeVar("Out")


class Dry(Sequential):
    """Trains nothing: tells what a run would cost.  `device` is of no account."""

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__()
        self.ghosts = Ghosts()

    def __repr__(self) -> str:
        return "Dry()"

    def open(self, job: Job) -> None:
        self._device: DryDevice = DryDevice(job, self.ghosts)

    @property
    def short(self) -> dict[int, int]:
        """Bytes of memory that clients were found to lack."""
        return self._device.short


def predict(experiment: Any, rounds: int | None = None) -> Prediction:
    """What an experiment's first `rounds` rounds would cost, all of them by default.

    Its model and its data may lie on the meta device.  Nothing is evaluated, and nothing written.
    """
    engine, found, stopped = Dry(), [], ""
    try:
        for ledger, examples in ledgers(experiment, engine, rounds):
            found.append(RoundCost.of(ledger, examples))
    except QuorumError as error:
        if not engine.short:
            raise
        stopped = str(error)
    return Prediction(tuple(found), len(experiment.data), experiment.rounds, dict(engine.short), stopped)


def ledgers(experiment: Any, engine: Dry, rounds: int | None = None) -> Iterator[tuple[Ledger, int]]:
    """The ledger of each round, and the examples that it trains on."""
    e, ghosts = experiment, engine.ghosts
    with ExitStack() as stack:
        stack.enter_context(ghosts)
        stack.enter_context(Copies(ghosts))
        stack.enter_context(Once({}, {}, "server", {}, {}))
        job = haunted(e.job("dry"), ghosts)
        engine.open(job)
        if hasattr(job.algorithm, "check"):
            job.algorithm.check(job.task, job.data)
        store, state = Store(limit_bytes=sys.maxsize), e.algorithm.init(job.task)
        for number in range(1, (rounds or e.rounds) + 1):
            cohort = e.cohorts[number - 1] if e.cohorts else None
            fleet = Round(engine, job, store, number, cohort=cohort, quorum=e.quorum)
            state = e.algorithm.round(state, fleet)
            fleet.commit()
            yield fleet.ledger, sum(int(r.metrics.get("examples", 0)) for r in fleet.answers)


def haunted(job: Job, ghosts: Ghosts) -> Job:
    """The job with ghosts for its model and its data, and nothing to evaluate."""
    task = copied(job.task, ghosts)
    seen: dict[Any, Shapes] = {}
    data = {c: batches_of(own, ghosts, seen) for c, own in job.data.items()}
    codec = None if job.codec is None else Coded(job.codec, ghosts)
    return replace(job, task=task, data=data, codec=codec, client_test={})


class Once(Meter):
    """Runs the first step of a kind, and counts each further one as much without running it.

    known: what steps of earlier calls gave; those that left no state behind are not run in this call either.
    """

    def __init__(self, known: dict[Any, Any], cache: dict[Any, Cost], handler: str, message: Body, state: Body):
        super().__init__(cache, handler, message, state)
        self._known, self._outs = known, dict[Any, Any]()

    def step(self, label: Any, held: Any, run: Any) -> Any:
        if label not in self._outs:
            self._outs[label] = super().step(label, held, partial(self._first, self.kind(label), held, run))
            return self._outs[label]
        self.flops += self._steps[label].flops
        return _others(self._outs[label])

    def _first(self, key: Any, held: Any, run: Any) -> Any:
        if key in self._known:
            return _others(self._known[key])
        before, out = _count(held()), run()
        if _count(held()) == before:  # optimizers may make their state in the first step
            self._known[key] = out
        return out


def _count(held: Iterable[torch.Tensor]) -> int:
    return sum(1 for _ in held)


def _others(out: Any) -> Any:
    return tree_map_only(FakeTensor, _another, out)  # a tensor that is held twice counts once


def _another(x: Any) -> torch.Tensor:
    return x.fake_mode.of(x)


class Clock(int):
    """A round's number that notices when something depends on it, other than the names of random numbers."""

    def __new__(cls, number: int) -> Clock:
        clock = super().__new__(cls, number)
        clock.asked = False
        return clock

    asked: bool

    def mattered(self, computed: Computed) -> bool:
        """Whether what was computed may be another in another round."""
        return self.asked or _holds(computed.reply, self) or _holds(computed.state, self)


def _asking(name: str) -> Any:
    operation = getattr(int, name)

    def asked(self: Clock, *others: Any) -> Any:
        self.asked = True
        return operation(self, *others)

    return asked


for _name in ("eq", "ne", "lt", "le", "gt", "ge", "add", "radd", "sub", "rsub", "mul", "mod", "floordiv", "index"):
    setattr(Clock, f"__{_name}__", _asking(f"__{_name}__"))
Clock.__hash__ = int.__hash__  # type: ignore[method-assign]
Clock.__name__ = "int"  # as a label of random numbers it is one


def _holds(body: Any, clock: Clock) -> bool:
    return any(_holds(x, clock) for x in body.values()) if isinstance(body, Mapping) else body is clock


class DryDevice(Device):
    """Runs a handler once for every message, state and batches that it can be given."""

    def __init__(self, job: Job, ghosts: Ghosts):
        super().__init__(job)
        self.meter = partial(Once, {})
        self._ghosts = ghosts
        self.short: dict[int, int] = {}
        self._known: dict[Any, Computed] = {}
        self._signed: dict[int, tuple[Body, Any]] = {}  # states that come back, by identity, with their signatures

    def _computed(self, request: Request, client: Client, before: Body, message: Body) -> Computed:
        data: Any = client.data
        own = data.shapes if isinstance(data, Shapes) else (client.id, client.round)
        _, state = self._signed.get(id(before)) or (None, signature(before))
        key = (request.handler, signature(message), state, own, client.profile)
        computed = self._known.get(key) or self._known.get((client.round, key))
        if computed is None:
            clock = Clock(client.round)
            self._ghosts.drew = False
            computed = super()._computed(request, replace(client, round=clock), before, message)
            if not self._ghosts.drew:  # else it is this client's, in this round
                self._known[(client.round, key) if clock.mattered(computed) else key] = computed
                self._signed[id(computed.state)] = computed.state, signature(computed.state)
        missing = computed.peak_memory_bytes - client.profile.memory_bytes
        if missing > 0:
            self.short[client.id] = max(missing, self.short.get(client.id, 0))
        return computed


class Coded:
    """A codec whose draws are ghosts, and which codes what it has seen before as it did then."""

    def __init__(self, codec: Any, ghosts: Ghosts):
        self._codec, self._ghosts = codec, ghosts
        self._known: dict[Any, Body] = {}

    def encode(self, body: Body, key: tuple[object, ...]) -> Body:
        """The coded body."""
        return self._remembered(("encode", signature(body)), lambda: self._codec.encode(body, key))

    def decode(self, body: Body) -> Body:
        """The names, shapes and dtypes that went in; new ghosts, because a tensor that is held twice counts once."""
        return mapped(self._remembered(("decode", signature(body)), lambda: self._codec.decode(body)), self._ghosts.of)

    def _remembered(self, key: Any, run: Any) -> Body:
        if key not in self._known:
            with self._ghosts.haunting():
                self._known[key] = run()
        return self._known[key]


def signature(body: Any) -> Any:
    """What tells bodies apart: names, numbers, shapes, dtypes, and the whole numbers in tensors that are no ghosts."""
    if isinstance(body, torch.Tensor):
        counts = not is_ghost(body) and not body.is_floating_point()
        return tuple(body.shape), body.dtype, body.numpy().tobytes() if counts else None
    return tuple((name, signature(x)) for name, x in body.items()) if isinstance(body, Mapping) else body


# Data.


class Shapes(ListBatches):
    """Batches of ghosts, alike in every epoch."""

    def __init__(self, batches: Any):
        super().__init__(batches)
        self.shapes = tuple(
            signature(batch if isinstance(batch, dict) else dict(enumerate(batch))) for batch in batches
        )

    def counted(self) -> int:
        return self.examples  # ghosts have no values to tell


class Drawn:
    """Batches whose shapes depend on the draw: the real ones, drawn and forgotten."""

    def __init__(self, data: Batches, ghosts: Ghosts):
        self.examples, self._data, self._ghosts = data.examples, data, ghosts

    def counted(self) -> int:
        return self.examples

    def __len__(self) -> int:
        return len(self._data)

    def epoch(self, generator: torch.Generator | None) -> Iterator[Any]:
        """As the data's own."""
        return (_ghostly(batch, self._ghosts) for batch in self._data.epoch(generator))


def batches_of(data: Batches, ghosts: Ghosts, seen: dict[Any, Shapes]) -> Batches:
    """The data as ghosts.  `seen` keeps those of clients that have as much."""
    if isinstance(data, ListBatches):
        return Shapes([_ghostly(batch, ghosts) for batch in data.epoch(None)])
    if not isinstance(data, ArrayBatches):
        return Drawn(data, ghosts)
    alike = data.like(lambda x: ghosts.of(x))
    key = (len(alike), alike.examples, *(signature(x) for x in next(iter(alike.epoch(None)))))
    if key not in seen:
        seen[key] = Shapes(list(alike.epoch(None)))
    return seen[key]


def _ghostly(batch: Any, ghosts: Ghosts) -> Any:
    return mapped(batch, ghosts.of) if isinstance(batch, dict) else tuple(ghosts.of(x) for x in batch)
