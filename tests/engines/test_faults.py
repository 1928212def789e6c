"""Clients that fail, hang, lie or die: counted, reported and left out; never averaged, never a lost run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import assert_same_state, batches, experiment, network

import lilliput
from lilliput.algorithms import FedAvg
from lilliput.core.fleet import Client, Profile, on_client
from lilliput.core.tree import Body
from lilliput.data.batches import as_batches
from lilliput.engines import DivergedError, QuorumError, Round, Sequential, Workers
from lilliput.engines.device import Device, Job, Request, Tag
from lilliput.engines.replies import ReplyRefused, check, schemas
from lilliput.experiment import checkpoint
from lilliput.submodel import Sum
from lilliput.tasks import Supervised
from lilliput.wire.store import Store

ENGINES: dict[str, Callable[[], Any]] = {"sequential": Sequential, "workers": lambda: Workers(2)}
every_engine = pytest.mark.parametrize("engine", ENGINES)


def changed(change: Callable[[torch.Tensor], Any]) -> Callable[[Body, Body, str], Body]:
    """A reply one of whose changes is changed."""
    return lambda reply, delta, name: {**reply, "delta": {**delta, name: change(delta[name])}}


def with_more(**more: Any) -> Callable[[Body, Body, str], Body]:
    return lambda reply, delta, name: {**reply, **more}


def metrics(**values: Any) -> Callable[[Body, Body, str], Body]:
    return lambda reply, delta, name: {**reply, "metrics": {**reply["metrics"], **values}}


NAN8 = torch.tensor([float("nan")]).to(torch.float8_e4m3fn)
# By fault, what the client replies, and the words with which it is refused.
BAD: dict[str, tuple[Callable[[Body, Body, str], Any], str]] = {
    "inf": (changed(lambda x: x / 0), "the reply is not finite"),
    "complex": (with_more(extra=torch.tensor([complex(0, float("inf"))])), "the reply is not finite"),
    "float8": (with_more(extra=NAN8), "the reply is not finite"),
    "bf16": (with_more(extra=torch.tensor([float("inf")], dtype=torch.bfloat16)), "the reply is not finite"),
    "huge": (changed(lambda x: x + 1e38), "the reply has numbers whose squares overflow"),
    "shape": (changed(lambda x: x[:1]), "'delta' of the reply has another shape at '0.weight' than what was sent"),
    "dtype": (changed(torch.Tensor.double), "of torch.float64 at '0.weight', and what was sent of torch.float32"),
    "whole": (changed(torch.Tensor.long), "'delta' of the reply is of torch.int64 at '0.weight'"),
    "number": (changed(lambda x: 1.0), "'delta' of the reply has another shape at '0.weight' than what was sent"),
    "names": (
        lambda reply, delta, name: {**reply, "delta": {n: x for n, x in delta.items() if n != name}},
        "'delta' of the reply has other names than what was sent",
    ),
    "more names": (
        lambda reply, delta, name: {**reply, "delta": {**delta, "more": delta[name]}},
        "'delta' of the reply has other names than what was sent",
    ),
    "missing": (lambda reply, delta, name: {"metrics": {}}, "'delta' of the reply has other names"),
    "large": (with_more(extra=torch.zeros(1 << 20)), "bytes, more than the limit of 1048576"),
    "set": (with_more(extra={1, 2}), "'extra' is a set; a body holds"),
    "key": (lambda reply, delta, name: {**reply, 3: 4}, "the key 3 under '' is not a string"),
    "sparse": (with_more(extra=torch.eye(2).to_sparse()), "send it dense"),
    "nan metric": (metrics(loss=float("nan")), "a number of the reply is not finite"),
    "text metric": (metrics(loss="small"), "the metric 'loss' of the reply is not a number"),
    "no metrics": (with_more(metrics=[1.0]), "'metrics' is a list; a body holds"),
    "other metrics": (with_more(metrics=1.0), "'metrics' of the reply is not a dict"),
    "count": (metrics(examples=-4), "the metric 'examples' of the reply is -4; it must not be negative"),
    "nested": (with_more(deep={"er": {"x": float("inf")}}), "a number of the reply is not finite"),
    "infinite normalizer": (with_more(work=float("inf")), "a number of the reply is not finite"),
    "negative normalizer": (with_more(work=-1.0), "'work' of the reply is -1.0; it must not be negative"),
    "no normalizer": (with_more(work=True), "'work' of the reply is not a number"),
    "fraction": (with_more(steps=0.5), "'steps' of the reply is not a whole number"),
    "unclear": (with_more(more=1), "'more' of the reply is neither true nor false"),
    "flat": (with_more(parts=1), "'parts' of the reply is not a dict"),
}


@dataclass(frozen=True)
class Faulty(FedAvg):
    """FedAvg whose client 2 misbehaves in one way, from round 2 on."""

    fault: str = "raise"

    @on_client(
        like={"delta": "params", "buffer_delta": "buffers", "work": float, "steps": int, "parts": dict, "more": bool}
    )
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        reply, state = super().train(client, state, msg)
        reply |= {"work": 1.5, "steps": 2, "parts": {}, "more": False}
        state = {**state, "rounds": state.get("rounds", 0) + 1}
        if client.id == 2 and client.round > 1:
            return self._misbehave(reply, state)
        return reply, state

    def _misbehave(self, reply: Body, state: Body) -> tuple[Body, Body]:
        delta = dict(reply["delta"])
        name = next(iter(delta))
        if self.fault == "raise":
            raise RuntimeError("the battery is empty")
        if self.fault == "die":
            os._exit(7)
        if self.fault == "hang":
            time.sleep(60)
        if self.fault in BAD:
            return BAD[self.fault][0](reply, delta, name), state
        return {**reply, "delta": delta}, state


def run(fault: str, engine: Any, **options: Any) -> tuple[lilliput.History, lilliput.Experiment]:
    e = lilliput.Experiment(
        Faulty(fault=fault), Supervised(network()), batches(), rounds=3, reply_limit=1 << 20, **options
    )
    return e.run(engine), e


@every_engine
@pytest.mark.parametrize("fault", ["raise", *BAD])
def test_a_bad_reply_is_dropped_counted_and_reported(fault: str, engine: str, tmp_path: Path) -> None:
    check_dropped(fault, ENGINES[engine](), tmp_path)


@pytest.mark.parametrize("fault", BAD)
def test_the_server_refuses_what_a_device_should_have(
    fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, passed in {"check": 0.0, "sized": None}.items():
        monkeypatch.setattr(f"lilliput.engines.device.{name}", lambda *_, passed=passed: passed)
    check_dropped(fault, Sequential(), tmp_path)


def check_dropped(fault: str, engine: Any, folder: Path) -> None:
    history, _ = run(fault, engine, folder=folder)
    assert [row["dropped"] for row in history.rows] == [0, 1, 1]
    assert [row["clients"] for row in history.rows] == [6, 5, 5]
    assert all(p.isfinite().all() for p in history.models["global"].params.values())
    entries = [json.loads(line)["calls"] for line in (folder / "ledger.jsonl").read_text().splitlines()]
    errors = {e["client"]: e["error"] for e in entries[1] if e["error"]}
    assert list(errors) == [2]
    assert "battery is empty" in errors[2] if fault == "raise" else BAD[fault][1] in errors[2]


@every_engine
@pytest.mark.parametrize("out", [None, {}, ({},), ({}, {}, {}), [{}, {}], {"a": 1, "b": 2}, ({}, None), (1, {})])
def test_a_handler_that_returns_no_pair_of_dicts_is_refused(out: Any, engine: str) -> None:
    with pytest.raises(QuorumError, match=r"client \d: train must return two dicts, \(reply, state\)"):
        lilliput.Experiment(Odd(out=out), Supervised(network()), batches(), rounds=1).run(ENGINES[engine]())


@dataclass(frozen=True)
class Odd(FedAvg):
    out: Any = None

    @on_client
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        return self.out


def test_a_mean_of_counters_may_be_a_fraction() -> None:
    like = {"buffer_delta": "buffers"}
    sent = schemas({"buffers": {"n": torch.tensor(3)}})
    for change in (torch.tensor(1), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
        check({"buffer_delta": {"n": change}}, like, sent, limit=100)
    with pytest.raises(ReplyRefused, match=r"of torch.int32 at 'n', and what was sent of torch.int64"):
        check({"buffer_delta": {"n": torch.tensor(1, dtype=torch.int32)}}, like, sent, limit=100)


def test_the_norm_of_a_reply_is_of_its_changes_alone() -> None:
    reply = {"delta": {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, "cut": torch.tensor([100.0])}
    assert check(reply, {"delta": "params"}, schemas({"params": reply["delta"]}), limit=100) == 5.0


# A model that is not finite.


@dataclass(frozen=True)
class Pushed(FedAvg):
    """FedAvg one of whose clients pushes the model far away in round 2."""

    by: float = 1e19
    pushed: int = 2

    @on_client(like={"delta": "params", "buffer_delta": "buffers"})
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        reply, state = super().train(client, state, msg)
        if client.round == 2 and client.id >= self.pushed:
            reply["delta"] = {name: x + self.by for name, x in reply["delta"].items()}
        return reply, state


@every_engine
def test_a_state_that_is_not_finite_is_refused_and_the_one_before_kept(engine: str, tmp_path: Path) -> None:
    """The squares of each change are finite, those of their sum are not."""
    settings: dict[str, Any] = {"task": Supervised(network()), "data": batches()}
    e = lilliput.Experiment(Pushed(combine=Sum(), by=2e18, pushed=1), **settings, rounds=3, folder=tmp_path)
    straight = lilliput.Experiment(FedAvg(combine=Sum()), **settings, rounds=1).run("sequential")
    with pytest.raises(DivergedError, match=r"round 2: 'params/0.weight' is not finite after the round, so it is un"):
        e.run(ENGINES[engine]())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    saved = checkpoint.load(tmp_path / "checkpoint")
    assert saved.round == 1
    assert_same_state(saved.read_server(tmp_path / "checkpoint"), straight.state)


@every_engine
def test_whoever_made_a_model_that_nobody_can_train_is_named(engine: str) -> None:
    layers = [torch.nn.Linear(6, 6) for _ in range(4)]
    task = Supervised(torch.nn.Sequential(*layers, torch.nn.Linear(6, 3)))
    e = lilliput.Experiment(Pushed(by=1e15, pushed=5), task, batches(), rounds=3)
    message = (
        r"round 3: .* not finite; the largest change of round 2 was client 5's, of norm .*e\+16, the next largest of"
    )
    with pytest.raises(QuorumError, match=message):
        e.run(ENGINES[engine]())


@every_engine
def test_the_others_average_as_if_the_failed_one_had_not_been_called(engine: str) -> None:
    history, _ = run("inf", ENGINES[engine]())
    cohorts = [list(range(6)), [0, 1, 3, 4, 5], [0, 1, 3, 4, 5]]
    clean = lilliput.Experiment(FedAvg(), Supervised(network()), batches(), rounds=3, cohorts=cohorts).run("sequential")
    for name, x in clean.state["params"].items():
        assert torch.equal(x, history.state["params"][name])


def test_the_state_of_a_refused_client_is_that_of_before(tmp_path: Path) -> None:
    run("shape", Sequential(), folder=tmp_path)
    saved = checkpoint.load(tmp_path / "checkpoint")
    store = Store(tmp_path / "checkpoint")
    store.restore(saved.states, saved.files)
    assert [store.get(f"client/{c}")["rounds"] for c in range(6)] == [3, 3, 1, 3, 3, 3]


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_worker_that_dies_or_hangs_fails_its_clients_for_the_round(fault: str) -> None:
    history, _ = run(fault, Workers(2), timeout=2.0 if fault == "hang" else None)
    assert [row["dropped"] for row in history.rows] == [0, 1, 1] or fault == "die"
    assert all(1 <= row["dropped"] <= 5 for row in history.rows[1:])
    assert len(history.rows) == 3


@every_engine
def test_less_than_a_quorum_fails_the_round_and_keeps_the_state_before(engine: str, tmp_path: Path) -> None:
    e = lilliput.Experiment(
        Faulty(fault="raise"),
        Supervised(network()),
        batches(),
        rounds=3,
        quorum=1.0,
        folder=tmp_path,
        checkpoint_every=1,
    )
    with pytest.raises(
        QuorumError, match=r"round 2: 5 of 6 clients answered, fewer than the quorum of 6; .* client 2: .*battery"
    ):
        e.run(ENGINES[engine]())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    e.quorum = 0.5
    assert len(e.run(ENGINES[engine](), resume=True).rows) == 3


@every_engine
def test_no_replies_at_all_is_one_clear_error(engine: str) -> None:
    data = {
        c: [(torch.randn(4, 5), y) for _, y in bs] for c, bs in batches().items()
    }  # five features, the model takes six
    e = lilliput.Experiment(FedAvg(), Supervised(network()), data, rounds=1, quorum=0.0)
    with pytest.raises(QuorumError, match="0 of 6 clients answered, fewer than the quorum of 1"):
        e.run(ENGINES[engine]())


@every_engine
def test_a_device_without_the_memory_is_refused_saying_by_how_much(engine: str) -> None:
    profiles = {c: Profile(memory_bytes=1000 if c == 4 else 1 << 30) for c in range(6)}
    e = lilliput.Experiment(FedAvg(), Supervised(network()), batches(), rounds=1, profiles=profiles, quorum=1.0)
    with pytest.raises(QuorumError, match=r"client 4: MemoryError: needs .* MiB, .* MiB more than the device has"):
        e.run(ENGINES[engine]())


def test_clients_that_are_not_up_are_not_sampled() -> None:
    profiles = {c: Profile(availability=0.5) for c in range(6)}
    e = experiment("fedavg", rounds=30, profiles=profiles, settings={"cohort": None}, evaluate="none")
    counts = [row["clients"] for row in e.run("sequential").rows]
    assert 2.0 < sum(counts) / 30 < 4.0  # 6 * 0.5, give or take three standard errors


class Watched(dict):
    """A dict that counts what is asked of it."""

    def __init__(self, values: Mapping[int, Any]):
        super().__init__(values)
        self.looked = 0

    def __getitem__(self, key: int) -> Any:
        self.looked += 1
        return super().__getitem__(key)

    def __iter__(self) -> Any:
        self.looked += len(self)
        return super().__iter__()

    def items(self) -> Any:
        self.looked += len(self)
        return super().items()


@pytest.mark.parametrize("availability", [1.0, 0.5])
def test_what_a_round_costs_depends_on_its_cohort_and_not_on_the_fleet(availability: float) -> None:
    clients, (own, *_) = range(5000), batches().values()
    data = Watched(dict.fromkeys(clients, as_batches(own)))
    profiles = Watched(dict.fromkeys(clients, Profile(availability=availability)))
    job = Job("run", FedAvg(cohort=5), Supervised(network()), data, profiles)
    assert job.clients == tuple(clients)
    data.looked = profiles.looked = 0
    engine, state = Sequential(), job.algorithm.init(job.task)
    engine.open(job)
    for number in range(1, 4):
        fleet = Round(engine, job, Store(), number)
        job.algorithm.round(state, fleet)
        fleet.commit()
        assert len(fleet.sampled) == 5 == sum(1 for c in fleet.sampled if fleet.examples[c] == 4)
    assert data.looked + profiles.looked < 200


def test_a_cohort_is_drawn_evenly_from_those_that_are_up() -> None:
    up = {c: Profile(availability=0.8) for c in range(8)}
    job = Job("run", FedAvg(), Supervised(network()), dict.fromkeys(range(8)), up)
    seen = [c for number in range(600) for c in Round(Sequential(), job, Store(), number).sample(2)]
    expected = len(seen) / 8  # 150, with a standard error of 11
    assert len(seen) == 1200 and all(abs(seen.count(c) - expected) < 45 for c in range(8))


def test_a_stream_must_be_consumed() -> None:
    @dataclass(frozen=True)
    class Impatient(FedAvg):
        def round(self, state: Body, fleet: Any) -> Body:
            next(fleet.call(self.train, {k: state[k] for k in ("params", "buffers")}))
            return state

    e = lilliput.Experiment(Impatient(), Supervised(network()), batches(), rounds=1)
    with pytest.raises(RuntimeError, match="the replies of train were not all consumed"):
        e.run("sequential")


def test_a_key_given_twice_is_an_error() -> None:
    @dataclass(frozen=True)
    class Twice(FedAvg):
        def round(self, state: Body, fleet: Any) -> Body:
            list(fleet.call(self.train, state, each=lambda c: {"params": state["params"]}))
            return state

    with pytest.raises(ValueError, match="'params' is given both for all clients and for each"):
        lilliput.Experiment(Twice(), Supervised(network()), batches(), rounds=1).run("sequential")


def test_messages_are_made_lazily_and_replies_come_in_order() -> None:
    made: list[int] = []

    @dataclass(frozen=True)
    class Lazy(FedAvg):
        def round(self, state: Body, fleet: Any) -> Body:
            def message(c: int) -> Body:
                made.append(c)
                return state

            for position, reply in enumerate(fleet.call(self.train, each=message, to=[5, 3, 1, 0, 2, 4])):
                assert reply.client == position
                assert len(made) <= position + 2  # this one and the one under way
            return state

    lilliput.Experiment(Lazy(), Supervised(network()), batches(), rounds=1).run("sequential")
    assert made == list(range(6))


def test_a_handler_runs_once_per_tag() -> None:
    runs: list[int] = []

    @dataclass(frozen=True)
    class Counted(FedAvg):
        @on_client
        def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
            runs.append(client.id)
            return {"n": len(runs)}, state

    data = {c: as_batches(b) for c, b in batches().items()}
    device = Device(Job("run", Counted(), Supervised(network()), data, {c: Profile() for c in data}))
    request = Request(Tag("run", 1, 0, 1), 0, "train", {}, {}, {})
    assert device.handle(request).body == device.handle(request).body == {"n": 1}
    again = Request(Tag("run", 1, 1, 1), 0, "train", {}, {}, {})  # another attempt is another execution
    assert device.handle(again).body == {"n": 2} and runs == [0, 0]


def test_a_handler_must_be_marked() -> None:
    @dataclass(frozen=True)
    class Unmarked(FedAvg):
        def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:  # type: ignore[override]
            return {}, state

    with pytest.raises(LookupError, match="mark it with @on_client"):
        lilliput.Experiment(Unmarked(), Supervised(network()), batches(), rounds=1).run("sequential")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {}}, "there is no client"),
        ({"data": {0: []}}, "client 0 has no data"),
        ({"rounds": 0}, "rounds is 0"),
        ({"algorithm": FedAvg(cohort=7)}, "a cohort of 7 does not fit a fleet of 6"),
        ({"cohorts": [[0, 9]]}, "names client 9, which has no data"),
        ({"cohorts": [[0]], "rounds": 2}, "fewer than rounds=2"),
        ({"evaluate": "server"}, "needs a test set"),
        ({"evaluate": "clients"}, "needs the clients' test sets"),
        ({"quorum": 2.0}, "quorum is 2.0"),
        ({"init": {"nonsense": torch.zeros(1)}}, "which the model does not have"),
    ],
)
def test_an_impossible_experiment_is_refused(options: Mapping[str, Any], message: str) -> None:
    settings = {"algorithm": FedAvg(), "task": Supervised(network()), "data": batches(), "rounds": 1, **options}
    with pytest.raises(ValueError, match=message):
        lilliput.Experiment(**settings).run("sequential")


def test_nothing_is_left_in_shared_memory() -> None:
    shm = Path("/dev/shm")
    before = set(shm.iterdir()) if shm.is_dir() else set()
    experiment("scaffold").run(Workers(2))
    assert (set(shm.iterdir()) if shm.is_dir() else set()) == before
