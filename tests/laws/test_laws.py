"""Laws that hold for every method on every engine."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import METHODS, TAILED, assert_same_history, assert_same_state, batches, experiment, timeless

import lilliput
from lilliput import wire
from lilliput.algorithms import SPLIT
from lilliput.core import tree
from lilliput.engines import Auto, Sequential, Workers
from lilliput.engines.base import QuorumError
from lilliput.wire.codecs import bf16, build

ENGINES: dict[str, Callable[[], Any]] = {
    "sequential": Sequential,
    "wire": lambda: Sequential(wire=True),
    "workers1": lambda: Workers(1),
    "workers2": lambda: Workers(2),
}
every_method = pytest.mark.parametrize("name", METHODS)
every_engine = pytest.mark.parametrize("engine", ["sequential", "wire", "workers2"])


@every_method
@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "sequential"])
def test_every_engine_gives_the_bits_of_the_sequential_one(name: str, engine: str) -> None:
    assert_same_history(experiment(name).run(ENGINES[engine]()), experiment(name).run(Sequential()))


@every_method
@every_engine
def test_resumed_run_equals_straight_run(name: str, engine: str, tmp_path: Path) -> None:
    straight = experiment(name).run(Sequential())
    experiment(name, rounds=2, folder=tmp_path).run(ENGINES[engine]())
    resumed = experiment(name, folder=tmp_path).run(ENGINES[engine](), resume=True)
    assert_same_history(resumed, straight)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [timeless(r) for r in rows] == [timeless(r) for r in straight.rows]
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 4


@every_method
@every_engine
def test_permuting_clients_changes_nothing(name: str, engine: str) -> None:
    data = batches()
    backwards = {c: data[c] for c in reversed(data)}
    a = experiment(name, data=backwards, test=data[0]).run(ENGINES[engine]())
    assert_same_history(a, experiment(name, data=data, test=data[0]).run(Sequential()))


@every_method
@every_engine
def test_the_bytes_of_the_ledger_are_those_on_the_wire(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Payload of a round = 4 bytes a parameter (8 a batch counter), down and up, for each of the cohort."""
    rows = experiment(name).run(ENGINES[engine]()).rows
    params, statistics = (
        6 * 8 + 8 + 8 + 8 + 8 * 3 + 3,
        4 * 16 + 8,
    )  # BatchNorm: mean and variance in float32, a counter in int64
    model = 4 * params + statistics
    plain = {"fedavg": (model, model), "fedprox": (model, model), "fednova": (model, model), "moon": (model, model)}
    plain["scaffold"] = (model + 4 * params, model + 4 * params)
    plain["two_calls"] = (2 * 4 * 83, 2 * 4 * 83)  # no BatchNorm: 56 + 27 parameters, twice each way
    if name in plain:
        down, up = plain[name]
        assert [(r["down_bytes"], r["up_bytes"]) for r in rows] == [(3 * down, 3 * up)] * 4
    elif name in TAILED:
        # Per example 8 activations and their gradients at each of two cuts; 56 + 27 parameters; no label.
        each = [3 * 4 * 83 + r["examples"] * 64 for r in rows]
        assert [(r["down_bytes"], r["up_bytes"]) for r in rows] == [(n, n) for n in each]
    elif name in SPLIT:
        assert [(r["down_bytes"], r["up_bytes"]) for r in rows] == [split_bytes(name, r, rows) for r in rows]
    elif name == "rolling_slices":
        for r in rows:
            # A slice of w of 8 hidden units: w * (6 + 1 + 2 + 2 + 3) parameters and statistics, 3 biases, the counter.
            assert r["up_bytes"] == r["down_bytes"] and r["up_bytes"] % 4 == 0
            assert 3 * (4 * (2 * 14 + 3) + 8) <= r["up_bytes"] <= 3 * (4 * (8 * 14 + 3) + 8)
    elif name == "fedsub":
        # b of the first layer, of rank 1, and the 51 other parameters go up; their means come down, and before them
        # what a client lacks, which is at most the model.
        each = 4 * (8 + 51)
        assert [r["up_bytes"] for r in rows] == [3 * (each + statistics)] * 4
        assert rows[0]["down_bytes"] == 3 * (each + model)
        assert all(3 * (each + statistics) <= r["down_bytes"] <= 3 * (each + model) for r in rows)
    elif name == "fedsub_svd":
        # Every second round a sketch of the first layer's gradient (8 x 6) goes up before, and P (1 x 6) comes down.
        each, sketch, rows_of_p = 4 * (8 + 51), 4 * 8 * 6, 4 * 6
        assert [r["up_bytes"] for r in rows] == [3 * (each + statistics + s) for s in (sketch, 0, sketch, 0)]
        assert rows[0]["down_bytes"] == 3 * (each + model + rows_of_p)
        assert all(3 * (each + statistics) <= r["down_bytes"] <= rows[0]["down_bytes"] for r in rows)
    else:
        assert sum(r["up_bytes"] for r in rows) == 0  # the bounds send weights down once and nothing up
        assert rows[0]["down_bytes"] == (model if name == "centralized" else 3 * model)


def split_bytes(name: str, row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[int, int]:
    """(down, up) of a round of three clients: 72 parameters and 8 units of BatchNorm on the device, a head of 27, and
    per example 8 activations (their gradients too, or every second batch only) and a label of 8 bytes."""
    part, head, cut, n = 4 * 72 + 4 * 16 + 8, 4 * 27, 4 * 8, row["examples"]
    if name.startswith("splitfed"):
        return 3 * part + n * cut, 3 * part + n * (cut + 8)
    if name == "cse_fsl":
        return 3 * (part + head), 3 * (part + head) + n // 2 * (cut + 8)
    heads = (row["down_bytes"] - 3 * part) // head  # of the clients whose head was due
    assert heads == 3 if row is rows[0] else 0 <= heads <= 3
    return 3 * part + heads * head, 3 * part + n // 2 * (cut + 8)


@every_method
def test_what_is_counted_is_what_is_encoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode = wire.encode
    monkeypatch.setattr(wire, "encode", lambda body, buffer=None: _noted(encode(body, buffer), sizes))
    rows = experiment(name, rounds=1, evaluate="none").run(Sequential(wire=True)).rows
    counted = rows[0]["up_bytes"] + rows[0]["down_bytes"] + rows[0]["overhead_bytes"]
    # The engine encodes a message as its common and its own part; together they cost one header more than one message.
    assert counted <= sum(sizes)


def _noted(data: memoryview, sizes: list[int]) -> memoryview:
    sizes.append(len(data))
    return data


@every_method
@every_engine
def test_a_client_that_sends_nan_is_dropped_and_the_rest_go_on(name: str, engine: str) -> None:
    data = batches()
    data[1] = [(torch.full((4, 6), float("nan")), y) for _, y in data[1]]
    e = experiment(name, data=data, test=data[0], settings={"cohort": None}, quorum=0.5)
    if name == "centralized":
        with pytest.raises(QuorumError, match="finite"):
            e.run(ENGINES[engine]())
        return
    history = e.run(ENGINES[engine]())
    assert [row["dropped"] for row in history.rows] == [1] * 4
    for model in history.models.values():
        assert all(x.isfinite().all() for x in tree.tensors(model.params))


@every_method
@every_engine
def test_zero_local_steps_leave_the_model_unchanged(name: str, engine: str) -> None:
    if name == "two_calls":
        pytest.skip("takes a step by definition")
    e = experiment(name, rounds=2, settings={"local_epochs": 0}, evaluate="none")
    history = e.run(ENGINES[engine]())
    start = e.task.init()
    for model in history.models.values():
        assert_same_state(model.params, start["params"])
        assert_same_state(model.buffers or {}, start["buffers"])


@every_method
def test_a_run_changes_neither_the_task_nor_the_data(name: str) -> None:
    data = batches()
    e = experiment(name, data=data)
    before, kept = copy.deepcopy(e.task.init()), copy.deepcopy(data)
    e.run(Sequential())
    assert_same_state(e.task.init(), before)
    for c, list_of_batches in data.items():
        for (x, y), (x0, y0) in zip(list_of_batches, kept[c], strict=True):
            assert torch.equal(x, x0) and torch.equal(y, y0)


@every_method
def test_the_same_seed_gives_the_same_run_and_another_seed_another(name: str) -> None:
    a, b = (experiment(name, seed=s).run(Sequential()) for s in (1, 1))
    assert_same_history(a, b)


@every_method
def test_a_codec_halves_the_floats_and_gives_the_same_bits_on_every_engine(name: str) -> None:
    plain = experiment(name, evaluate="none", rounds=2).run(Sequential())
    coded = [experiment(name, evaluate="none", rounds=2, codec=bf16()).run(make()) for make in ENGINES.values()]
    for other in coded[1:]:
        assert_same_history(other, coded[0])
    counted = ("fedavg", "fedprox", "fednova", "moon", "scaffold", "rolling_slices", *SPLIT)
    for a, b in zip(plain.rows, coded[0].rows, strict=True):
        if name in TAILED:  # no integers: neither labels nor, with BatchNorm on the server, a counter
            assert b["up_bytes"] == a["up_bytes"] / 2
        if name in counted:  # integers stay as they are: a batch counter for each of three clients, and labels
            labels = a["examples"] // (1 if name.startswith("splitfed") else 2) if name in SPLIT else 0
            integers = 8 * (3 + labels)
            assert b["up_bytes"] - integers == (a["up_bytes"] - integers) / 2


@pytest.mark.parametrize("name", ["scaffold", "splitfed_v1", "fsl_sage"])
def test_int8_draws_alike_on_every_engine(name: str) -> None:
    codec = build("int8:activations:delta+bf16")
    first, *others = [experiment(name, rounds=2, codec=codec).run(make()) for make in ENGINES.values()]
    for other in others:
        assert_same_history(other, first)


def test_auto_moves_to_workers_without_changing_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lilliput.engines.auto.WORTHWHILE_SECONDS", 0.0)
    assert_same_history(experiment("scaffold").run(Auto()), experiment("scaffold").run(Sequential()))


@every_engine
def test_evaluation_at_clients_is_the_same_on_every_engine(engine: str) -> None:
    data = batches()
    options = {"client_test": data, "evaluate": "both"}
    a = experiment("fedavg", **options).run(ENGINES[engine]())
    assert_same_history(a, experiment("fedavg", **options).run(Sequential()))
    assert a.rows[-1]["clients/accuracy"] == pytest.approx(a.rows[-1]["accuracy"])  # the same examples, pooled or not
    assert a.rows[-1]["clients/accuracy/worst_decile"] <= a.rows[-1]["clients/accuracy"]


def test_each_clients_metrics_are_in_the_ledger(tmp_path: Path) -> None:
    data = batches()
    row = (
        experiment("fedavg", rounds=1, client_test=data, evaluate="clients", folder=tmp_path).run("sequential").rows[0]
    )
    calls = json.loads((tmp_path / "ledger.jsonl").read_text())["calls"]
    own = {c["client"]: c["metrics"]["accuracy"] for c in calls if c["evaluation"]}
    sizes = {c: sum(len(y) for _, y in data[c]) for c in data}
    mean = sum(sizes[c] * own[c] for c in own) / sum(sizes.values())
    assert own.keys() == data.keys() and mean == pytest.approx(row["clients/accuracy"])


def test_lilliput_exports_what_it_promises() -> None:
    for name in lilliput.__all__:
        if name != "optim":
            assert getattr(lilliput, name) is not None
