"""Labels of -100 count for nothing: a batch without any other takes no step at either end, and harms no client."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures import assert_same_state, batches
from split_toys import language, run, text, three_parts, two_parts
from torch import Tensor

from lilliput.algorithms import SPLIT, FedAvg, SplitFedV1
from lilliput.core import tree
from lilliput.submodel import uniform_mean

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01, "local_epochs": 2}
Batch = tuple[Tensor, Tensor]


def task(name: str, norm: bool = True) -> Any:
    return three_parts(norm) if name == "tail" else two_parts(norm=norm)


def silent(batch: Batch) -> Batch:
    """The batch with labels of which none counts."""
    return batch[0], torch.full_like(batch[1], -100)


def halved(batch: Batch) -> Batch:
    """The batch with labels of which every second counts."""
    y = batch[1].clone()
    y[::2] = -100
    return batch[0], y


MASKED = {
    "half of each batch": lambda data: {c: [halved(b) for b in own] for c, own in data.items()},
    "first batches": lambda data: {c: [silent(own[0]), *own[1:], own[0]] for c, own in data.items()},
    "last batches": lambda data: {c: [*own, silent(own[0])] for c, own in data.items()},
    "a client": lambda data: {c: [silent(b) for b in own] if c == 1 else own for c, own in data.items()},
    "everyone": lambda data: {c: [silent(b) for b in own] for c, own in data.items()},
}


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("name", ["splitfed_v1", "tail"])
def test_splitfed_v1_is_fedavg(name: str, masked: str, chunk: int) -> None:
    # The gradients of a chunk are taken at the weights from before it: one step is the same under any.
    data = MASKED[masked](batches())
    if chunk > 1:
        data = {c: [*own[:1], *[silent(b) for b in own[1:]]] for c, own in data.items()}
    settings = {**SETTINGS, "local_epochs": 1 if chunk > 1 else 2}
    split = run(SplitFedV1(**settings, chunk=chunk), task(name), data)
    whole = run(FedAvg(**settings, optimizer_state="keep"), task(name), data)
    assert [row["dropped"] for row in split.rows] == [0, 0, 0]
    assert_same_state(split.state, whole.state)
    losses = [[row.get("train_loss") for row in history.rows] for history in (split, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("name", [*SPLIT, "tail"])
def test_a_batch_without_labels_is_as_good_as_none(name: str) -> None:
    """Also in what goes up: every q-th batch of those that count."""
    data = batches()
    more = {c: [silent(own[0]), *[x for b in own for x in (b, silent(b))]] for c, own in data.items()}
    every: dict[str, Any] = {} if name.startswith("splitfed") or name == "tail" else {"server_update_interval": 2}
    method = SPLIT.get(name, SplitFedV1)(**SETTINGS, combine=uniform_mean(), **every)
    a, b = (run(method, task(name, norm=False), own, rounds=2) for own in (more, data))
    assert [row["dropped"] for row in a.rows] == [0, 0]
    assert_same_state(a.state, b.state)


@pytest.mark.parametrize("name", [*SPLIT, "tail"])
def test_clients_without_any_label_stay_in_and_move_nothing(name: str) -> None:
    method = SPLIT.get(name, SplitFedV1)(**SETTINGS)
    history = run(method, task(name), MASKED["everyone"](batches()), rounds=2)
    assert [row["dropped"] for row in history.rows] == [0, 0]
    first = task(name).init()["params"]
    assert_same_state({n: history.state["params"][n] for n in first}, first)


def test_alignment_leaves_out_rows_without_labels() -> None:
    """Sentences of which some have no word that counts, aligned one at a time."""
    data = {c: [text(4, 3, seed=c)] for c in range(2)}
    for own in data.values():
        own[0]["labels"][1:3] = -100
    method = SPLIT["fsl_sage"](lr=0.1, align_epochs=2, align_batch_size=1)
    history = run(method, language(), data, rounds=2)
    assert [row["dropped"] for row in history.rows] == [0, 0]
    assert all(x.isfinite().all() for x in tree.tensors(history.state))
