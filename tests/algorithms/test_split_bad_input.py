"""What does not fit is refused before anything trains, by its name, with the rule and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures import batches, network
from split_toys import language, run, texts, three_parts, two_parts
from torch import Tensor, nn

from lilliput.algorithms import SPLIT, CseFsl, FslSage, SplitFedV1, SplitFedV2
from lilliput.engines.device import Device
from lilliput.splitter import Split
from lilliput.tasks import Supervised


@pytest.fixture(autouse=True)
def nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a device is asked anything."""

    def never(self: Device, request: Any) -> Any:
        raise AssertionError("a device was called")

    monkeypatch.setattr(Device, "handle", never)


def refused(method: Any, on: Any, rule: str, data: Any = None) -> None:
    with pytest.raises(ValueError, match=rule):
        run(method, on, data)


def test_intervals_of_zero() -> None:
    for options, rule in (
        ({"server_update_interval": 0}, "server_update_interval is 0; it must be at least 1"),
        ({"align_interval": 0}, "align_interval is 0; it must be at least 1"),
        ({"memory_size": 0}, "memory_size is 0; it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=rule):
            FslSage(**options)


def test_a_memory_smaller_than_a_batch() -> None:
    refused(FslSage(memory_size=3), two_parts(), r"memory_size is 3.*batch of 4 of client 0.*memory_size >= batch_size")


@pytest.mark.parametrize("method", [CseFsl, FslSage])
def test_a_missing_head_and_one_of_another_width(method: type) -> None:
    refused(method(), Split(nn.Linear(6, 8), nn.Linear(8, 3)), "needs an auxiliary head; give the task one")
    refused(method(), two_parts(nn.Linear(9, 3)), r"\(1, 8\), does not fit the auxiliary head: .*9x3.*widths")
    refused(method(), two_parts(nn.Linear(8, 5)), r"head gives \(5,\).*server's part \(3,\); .*3 outputs")


@pytest.mark.parametrize("name", SPLIT)
def test_more_classes_than_outputs(name: str) -> None:
    data = {c: [(x, y + 1) for x, y in own] for c, own in batches().items()}
    refused(SPLIT[name](), two_parts(), r"label 3, and the model has 3 outputs, 0 to 2; give its last layer", data)


def test_labels_of_text_beyond_the_outputs() -> None:
    data = {c: [{**b, "labels": b["labels"] + 20 * (b["labels"] >= 0)} for b in own] for c, own in texts().items()}
    refused(SplitFedV1(), language(), "and the model has 7 outputs", data)


def test_parts_that_do_not_fit_each_other() -> None:
    refused(SplitFedV1(), Split(nn.Linear(5, 8), nn.Linear(8, 3)), r"device's part does not take a batch of \(4, 6\)")
    refused(SplitFedV2(), Split(nn.Linear(6, 8), nn.Linear(7, 3)), r"\(1, 8\), does not fit the server's part")
    refused(SplitFedV1(), Supervised(network()), r"needs a model cut in two; .*Split\(client, server\)")


class Odd(nn.Linear):
    """Returns what cannot travel."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Joined(nn.Linear):
    """Forgets which example is which."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x).flatten()


@pytest.mark.parametrize("part", [Odd, Joined])
def test_activations_that_cannot_travel(part: type) -> None:
    refused(SplitFedV1(), Split(part(6, 8), nn.Linear(8, 3)), "flat dict of tensors, whose dimension 0 is the example")


def test_a_check_leaves_the_task_as_it_is() -> None:
    on = three_parts()
    before = {n: x.clone() for n, x in on.model.state_dict().items()}
    modes = [m.training for m in on.model.modules()]
    state = torch.random.get_rng_state()
    SplitFedV1().check(on, {c: _Batches(own) for c, own in batches().items()})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in on.model.modules()] == modes
    assert all(torch.equal(x, before[n]) for n, x in on.model.state_dict().items())


class _Batches(list):
    def epoch(self, generator: Any) -> Any:
        return iter(self)
