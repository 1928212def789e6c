"""The demo says what it shows: who holds what, who can train what, and what comes of it."""

from dataclasses import replace

import pytest
import torch

from lilliput import data
from lilliput.cli import demo
from lilliput.cli import main as lilliput


@pytest.fixture(scope="module")
def dataset():
    return data.load("digits")


@pytest.fixture(scope="module")
def held(dataset):
    return data.federate(dataset, demo.parts(dataset, seed=0), batch_size=demo.BATCH)


def test_each_half_has_its_digits_but_for_the_leak(dataset, held):
    labels = dataset.train[1]
    for digit in range(10):
        home = demo.LARGE if digit in demo.EARLY else range(10, 20)
        there = sum(int((labels[held.partition[c]] == digit).sum()) for c in home)
        every = int((labels == digit).sum())
        assert there == every - round(0.02 * every)


def test_devices_have_about_as_much_as_each_other(held):
    sizes = [len(index) for index in held.partition.values()]
    assert len(sizes) == demo.DEVICES and max(sizes) - min(sizes) <= 5


def test_the_model_has_as_many_parameters_as_the_demo_says(dataset):
    """Two 5x5 convolutions, then 64 maps of 2x2 to 384 to 10."""
    by_hand = (25 * 1 + 1) * 32 + (25 * 32 + 1) * 64 + (64 * 4 + 1) * 384 + (384 + 1) * 10
    assert sum(p.numel() for p in demo.model(dataset, 1.0, seed=0).parameters()) == by_hand == 154_634


def test_only_large_devices_can_train_the_model_and_all_can_train_it_at_half_width(dataset, held):
    whole, _, half, *_ = demo.WAYS
    refused = demo.train(replace(whole, promised=False), dataset, held, rounds=1, seed=0)
    assert refused.last["dropped"] == 10
    fits = demo.train(half, dataset, held, rounds=1, seed=0)
    assert fits.last["dropped"] == 0 and fits.last["peak_memory_bytes"] < demo.MEMORY[False]


def named(start):
    (way,) = [way for way in demo.WAYS if way.name.startswith(start)]
    return way


def test_a_split_model_fits_the_small_devices_and_splitfed_is_fedavg(dataset, held):
    ways = demo.WAYS[0], named("SplitFed"), named("FSL-SAGE")
    outcomes = [demo.train(way, dataset, held, rounds=1, seed=0) for way in ways]
    for outcome in outcomes[1:]:
        assert outcome.last["dropped"] == 0 and outcome.last["peak_memory_bytes"] < demo.MEMORY[False] / 4
    assert outcomes[0].last["loss"] == pytest.approx(outcomes[1].last["loss"], rel=1e-5)


def test_fedsub_fits_the_small_devices_and_sends_its_rank_and_what_is_in_no_subspace(dataset, held):
    rows = demo.train(named("FedSub"), dataset, held, rounds=2, seed=0).rows
    assert rows[-1]["dropped"] == 0 and rows[-1]["peak_memory_bytes"] < demo.MEMORY[False]
    b = 32 * 3 + 64 * 100 + 384 * 32  # of filters of 25 and 800, and of 256 inputs
    ordinary = 32 + 64 + 384 + (384 + 1) * 10
    assert [row["up_bytes"] for row in rows] == [20 * 4 * (b + ordinary)] * 2
    assert rows[-1]["down_bytes"] == 20 * 4 * (b + ordinary)  # the means; the model came before


def test_metrics_look_at_their_own_digits():
    logits = torch.eye(10)[[0, 1, 7, 7, 9, 9]]
    labels = torch.tensor([0, 1, 7, 8, 9, 9])
    assert demo.among([0, 1])(logits, labels) == 1.0
    assert demo.among([7, 8])(logits, labels) == 0.5
    every = torch.arange(10)
    assert demo.worst(torch.eye(10)[every], every) == 1.0
    assert demo.worst(torch.eye(10)[[0, *range(0, 9)]], every) == 0.0


def test_the_same_seed_is_the_same_run(dataset, held):
    rows = [demo.train(demo.WAYS[2], dataset, held, rounds=1, seed=1).last for _ in range(2)]
    assert rows[0]["loss"] == rows[1]["loss"]


def test_the_command_prints_the_table_and_draws_the_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert lilliput(["demo", "--rounds", "1", "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for way in demo.WAYS:
        assert printed.count(way.name) == 2  # while it trains, and in the table
    assert "10 (51%)" in printed and "…" not in printed
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_demo_of_no_rounds_is_refused_in_one_line(capsys):
    assert lilliput(["demo", "--rounds", "0"]) == 2
    assert capsys.readouterr().err == "lilliput: rounds is 0; it must be at least 1\n"


def test_digits_that_only_small_devices_know_stay_unknown_without_them(dataset, held):
    outcome = demo.train(demo.WAYS[1], dataset, held, rounds=10, seed=0)
    assert outcome.last["5-9"] < 0.01 and outcome.last["0-4"] > 0.9


@pytest.mark.slow
def test_a_model_small_enough_for_all_brings_them_in(dataset, held):
    """Measured: .93 if all could hold the model, .89 at half width, .95 in a subspace, .93 and .99 split, .49 alone,
    1.00 in one place."""
    every = {way.name: demo.train(way, dataset, held, demo.ROUNDS, seed=0).last["5-9"] for way in demo.WAYS}
    whole, able, half, subspace, splitfed, sage, alone, central = every.values()
    assert able == 0.0
    assert 0.4 < alone < 0.6 < 0.8 < half < central and 0.85 < whole < central
    assert 0.85 < subspace < central
    assert abs(splitfed - whole) < 0.02 and 0.85 < sage <= central
