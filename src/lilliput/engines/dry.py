"""Prediction: a method's own rounds over tensors without values, on the same ledger as every other engine.

The bytes that travel are exact: they depend on names, shapes and dtypes alone.  A device runs one step of each kind
that a call has, and every further step is counted as much.  What one client computes is not computed again for another
with the same message, state and batches, nor in a later round, unless the handler used the round's number or drew
something.  So what a handler sends may depend on all of these, but not on the client's id.
Memory and FLOPs come from the instrument that measures real runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

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
from lilliput.engines.prediction import Prediction, RoundCost
from lilliput.engines.sequential import Sequential
from lilliput.fake import Copies, Fake, copied, is_fake
from lilliput.wire.store import Store


class Dry(Sequential):
    """Predicts what a run would cost, without training.  Ignores `device`."""

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__()
        self.mode = Fake()

    def __repr__(self) -> str:
        return "Dry()"

    def open(self, job: Job) -> None:
        self._device: DryDevice = DryDevice(job, self.mode)

    @property
    def short(self) -> dict[int, int]:
        """Bytes of memory that clients lack, by client."""
        return self._device.short


def predict(experiment: Any, rounds: int | None = None) -> Prediction:
    """What an experiment's first `rounds` rounds would cost, by default all of them.

    Its model and its data may be on the meta device.  Nothing is evaluated, and nothing is written.
    """
    engine, costs, stopped = Dry(), [], ""
    try:
        for ledger, examples in ledgers(experiment, engine, rounds):
            costs.append(RoundCost.of(ledger, examples))
    except QuorumError as error:
        if not engine.short:
            raise
        stopped = str(error)
    return Prediction(tuple(costs), len(experiment.data), experiment.rounds, dict(engine.short), stopped)


def ledgers(experiment: Any, engine: Dry, rounds: int | None = None) -> Iterator[tuple[Ledger, int]]:
    """The ledger of each round, and how many examples it trains on."""
    e, mode = experiment, engine.mode
    with ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(Copies(mode.like))
        stack.enter_context(Once({}, {}, "server", {}, {}))
        job = faked(e.job("dry"), mode)
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


def faked(job: Job, mode: Fake) -> Job:
    """The job with fake tensors for its model and its data, and nothing to evaluate."""
    task = copied(job.task, mode.like)
    alike: dict[Any, FakeBatches] = {}
    data = {c: batches_of(batches, mode, alike) for c, batches in job.data.items()}
    codec = None if job.codec is None else FakeCodec(job.codec, mode)
    return replace(job, task=task, data=data, codec=codec, client_test={})


class Once(Meter):
    """Runs the first step of a kind, and counts each further one as much without running it.

    earlier: outputs of steps of earlier calls that left no state behind; these steps do not run in this call either.
    """

    def __init__(self, earlier: dict[Any, Any], cache: dict[Any, Cost], handler: str, message: Body, state: Body):
        super().__init__(cache, handler, message, state)
        self._earlier, self._outs = earlier, dict[Any, Any]()

    def step(self, label: Any, held: Any, run: Any) -> Any:
        if label not in self._outs:
            self._outs[label] = super().step(label, held, partial(self._first, self.kind(label), held, run))
            return self._outs[label]
        self.flops += self._steps[label].flops
        return _fresh(self._outs[label])

    def _first(self, key: Any, held: Any, run: Any) -> Any:
        if key in self._earlier:
            return _fresh(self._earlier[key])
        before, out = _count(held()), run()
        if _count(held()) == before:  # optimizers may make their state in the first step
            self._earlier[key] = out
        return out


def _count(held: Iterable[torch.Tensor]) -> int:
    return sum(1 for _ in held)


def _fresh(out: Any) -> Any:
    """The output of a step with new tensors: the same one twice would count once."""
    return tree_map_only(FakeTensor, lambda x: x.fake_mode.like(x), out)


class Clock(int):
    """A round's number that notices when anything but the labels of random numbers depends on it."""

    def __new__(cls, number: int) -> Clock:
        clock = super().__new__(cls, number)
        clock.asked = False
        return clock

    asked: bool

    def mattered(self, computed: Computed) -> bool:
        """Whether another round may compute something else."""
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

    def __init__(self, job: Job, mode: Fake):
        super().__init__(job)
        self.meter = partial(Once, {})
        self._mode = mode
        self.short: dict[int, int] = {}
        self._results: dict[Any, Computed] = {}
        self._signatures: dict[int, tuple[Body, Any]] = {}  # of client states, by identity: the same ones come back

    def _computed(self, request: Request, client: Client, before: Body, message: Body) -> Computed:
        data: Any = client.data
        batches = data.shapes if isinstance(data, FakeBatches) else (client.id, client.round)
        _, state = self._signatures.get(id(before)) or (None, signature(before))
        key = (request.handler, signature(message), state, batches, client.profile)
        computed = self._results.get(key) or self._results.get((client.round, key))
        if computed is None:
            clock = Clock(client.round)
            self._mode.drew = False
            computed = super()._computed(request, replace(client, round=clock), before, message)
            if not self._mode.drew:  # otherwise it holds for this client in this round only
                self._results[(client.round, key) if clock.mattered(computed) else key] = computed
                self._signatures[id(computed.state)] = computed.state, signature(computed.state)
        missing = computed.peak_memory_bytes - client.profile.memory_bytes
        if missing > 0:
            self.short[client.id] = max(missing, self.short.get(client.id, 0))
        return computed


class FakeCodec:
    """A codec whose draws are fake, and which codes each kind of body once."""

    def __init__(self, codec: Any, mode: Fake):
        self._codec, self._mode = codec, mode
        self._results: dict[Any, Body] = {}

    def encode(self, body: Body, key: tuple[object, ...]) -> Body:
        """The coded body."""
        return self._remembered(("encode", signature(body)), lambda: self._codec.encode(body, key))

    def decode(self, body: Body) -> Body:
        """The names, shapes and dtypes that went in; new tensors, because the same one twice would count once."""
        decoded = self._remembered(("decode", signature(body)), lambda: self._codec.decode(body))
        return mapped(decoded, lambda x: x if _has_values(x) else self._mode.like(x))

    def _remembered(self, key: Any, run: Any) -> Body:
        if key not in self._results:
            with self._mode.making():
                self._results[key] = run()
        return self._results[key]


def signature(body: Any) -> Any:
    """What tells bodies apart: names, numbers, shapes, dtypes, and the values of real tensors of integers."""
    if isinstance(body, torch.Tensor):
        return tuple(body.shape), body.dtype, body.numpy().tobytes() if _has_values(body) else None
    return tuple((name, signature(x)) for name, x in body.items()) if isinstance(body, Mapping) else body


def _has_values(x: torch.Tensor) -> bool:
    """Whether a tensor's values are known and decide shapes, as the indices of a slice do."""
    return not is_fake(x) and not x.is_floating_point()


# Data.


class FakeBatches(ListBatches):
    """Fake batches, alike in every epoch."""

    def __init__(self, batches: Any):
        super().__init__(batches)
        self.shapes = tuple(
            signature(batch if isinstance(batch, dict) else dict(enumerate(batch))) for batch in batches
        )

    def counted(self) -> int:
        return self.examples  # fake labels do not say whether they count


class DrawnBatches:
    """Batches whose shapes depend on the draw: the real ones are drawn, and faked one by one."""

    def __init__(self, data: Batches, mode: Fake):
        self.examples, self._data, self._mode = data.examples, data, mode

    def counted(self) -> int:
        return self.examples

    def __len__(self) -> int:
        return len(self._data)

    def epoch(self, generator: torch.Generator | None) -> Iterator[Any]:
        """As the data's own."""
        return (_faked_batch(batch, self._mode) for batch in self._data.epoch(generator))


def batches_of(data: Batches, mode: Fake, alike: dict[Any, FakeBatches]) -> Batches:
    """Fake batches like those of the data.  Clients with as many examples of the same shapes share them by `alike`."""
    if isinstance(data, ListBatches):
        return FakeBatches([_faked_batch(batch, mode) for batch in data.epoch(None)])
    if not isinstance(data, ArrayBatches):
        return DrawnBatches(data, mode)
    fake = data.like(mode.like)
    key = (len(fake), fake.examples, *(signature(x) for x in next(iter(fake.epoch(None)))))
    if key not in alike:
        alike[key] = FakeBatches(list(fake.epoch(None)))
    return alike[key]


def _faked_batch(batch: Any, mode: Fake) -> Any:
    return mapped(batch, mode.like) if isinstance(batch, dict) else tuple(mode.like(x) for x in batch)
