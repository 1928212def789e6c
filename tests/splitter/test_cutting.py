"""Cutting a model: parts do what the whole does and hold their own parameters only; an impossible cut is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import IMAGES, difference, states_are_divided
from torch import Tensor, nn

import lilliput
from lilliput import models, splitter
from lilliput.splitter.places import boundaries
from lilliput.splitter.probes import SHARED, probes


def resnet(name: str) -> nn.Module:
    return models.build(name, shape=(3, 8, 8), classes=5, width=4)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.mark.parametrize("at", ["2", "3", "4"])
def test_parts_of_a_plain_module_are_the_module_dropout_included(at: str) -> None:
    model = plain()
    parts = lilliput.split(model, at)
    states_are_divided(model, parts)
    assert difference(model, parts, torch.randn(5, 12)) == 0.0


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet20", "resnet50"])
def test_resnets_at_boundaries_of_blocks(name: str) -> None:
    model = resnet(name)
    where = boundaries(model, probes(model, IMAGES, SHARED)[0])
    assert len(where) == {"resnet10": 5, "resnet18": 9, "resnet20": 10, "resnet50": 17}[name]
    for at in where[:: {"resnet10": 1, "resnet18": 2, "resnet20": 3, "resnet50": 5}[name]]:
        parts = lilliput.split(model, at, example=IMAGES)
        states_are_divided(model, parts)
        assert difference(model, parts, IMAGES) == 0.0, at


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in models.names() if n.startswith("resnet") and n != "resnet1202"])
def test_every_resnet_at_every_boundary(name: str) -> None:
    model = resnet(name)
    for at in boundaries(model, probes(model, IMAGES, SHARED)[0]):
        assert difference(model, lilliput.split(model, at, example=IMAGES), IMAGES) == 0.0, at


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 300, 600])
def test_a_network_of_1202_layers(at: int) -> None:
    model = resnet("resnet1202")
    assert difference(model, lilliput.split(model, at, example=IMAGES), IMAGES) == 0.0


@pytest.mark.parametrize("name", ["cnn", "cnn_pfl", "simple_conv", "mlp"])
def test_networks_without_lists_before_any_layer(name: str) -> None:
    model = models.build(name, shape=(3, 12, 12), classes=5)
    images = torch.randn(4, 3, 12, 12)
    for at in ("hidden.1", "out") if name == "mlp" else ("conv2", "fc1", "fc2"):
        assert difference(model, lilliput.split(model, at, example=images), images) == 0.0


@pytest.mark.parametrize("name, at", [("char_lm", 1), ("char_lm", 0), ("char_lstm", "lstm"), ("char_lstm", "out")])
def test_networks_over_characters_of_any_length(name: str, at: Any) -> None:
    small = {"hidden": 8, "layers": 2}
    model = models.build(name, shape=(9,), classes=11, **small)
    parts = lilliput.split(model, at, example=torch.randint(11, (2, 9)))
    for length in (9, 4):
        assert difference(model, parts, torch.randint(11, (3, length))) == 0.0


def test_statistics_of_batchnorm_move_as_in_the_whole() -> None:
    model = resnet("resnet10")
    client, server = lilliput.split(model, "layer3")
    assert difference(model, (client, server), IMAGES) == 0.0
    states_are_divided(model, (client, server))
    assert client.bn1.num_batches_tracked == 1 and server.get_submodule("layer3.0.bn1").num_batches_tracked == 1


def test_an_example_of_zeros_is_as_good_as_any() -> None:
    model = models.build("char_lm", shape=(9,), classes=11, hidden=8, layers=2)
    for x in probes(model, torch.zeros(2, 9, dtype=torch.int64), SHARED):
        assert len(x["x"].unique()) > 2
    for x in probes(plain(), torch.zeros(2, 12), SHARED):
        assert x["input"].std() > 0.5


def test_the_model_stays_as_it_was() -> None:
    model = resnet("resnet10").eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    client, server = lilliput.split(model, "layer2")
    assert not (model.training or client.training or server.training)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with torch.no_grad():
        next(client.parameters()).zero_()
    assert torch.equal(model.state_dict()["conv1.weight"], before["conv1.weight"])


def test_a_u_shape_has_three_parts() -> None:
    model = resnet("resnet18")
    parts = lilliput.split(model, ("layer2", "fc"), example=IMAGES)
    states_are_divided(model, parts)
    assert [len(part.state_dict()) > 0 for part in parts] == [True] * 3
    assert set(parts[2].state_dict()) == {"fc.weight", "fc.bias"}
    assert difference(model, parts, IMAGES) == 0.0


class Direct(nn.Module):
    """Parameters and a buffer of the model's own, beside its modules; one block is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(6))
        self.gain = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.full((6,), 0.5))
        self.first, self.twice, self.relu = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x - self.mean + self.position))
        x = self.relu(self.twice(self.twice(x)))
        return self.gain * self.last(x)


def test_parameters_of_the_model_itself_go_where_they_are_used() -> None:
    model = Direct()
    client, server = lilliput.split(model, "last")
    assert {"position", "first.weight"} < set(client.state_dict()) and {"gain", "unused"} < set(server.state_dict())
    states_are_divided(model, (client, server))
    assert difference(model, (client, server), torch.randn(5, 6)) == 0.0


REFUSED = [
    (lambda: resnet("resnet10"), "layer2.0.conv2", r"depends on the output of layer1.*nearest.*at='layer2\.0'"),
    (plain, "1", "the input 'input' itself would travel"),
    (plain, "nowhere", "names no module"),
    (lambda: resnet("resnet10"), "conv2", "is the ending of layer1.0.conv2, layer2.0.conv2"),
    (lambda: resnet("resnet10"), 9, "choose 0 to 4"),
    (plain, 2.5, "name a module"),
    (Direct, "twice", "called 2 times.*nearest place to cut is at='last'"),
]


@pytest.mark.parametrize("make, at, message", REFUSED, ids=[str(at) for _, at, _ in REFUSED])
def test_impossible_cuts_are_refused_with_the_nearest_valid_one(make: Any, at: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lilliput.split(make(), at)


class Shared(nn.Module):
    """One block before and after the cut; or its table as the output layer's, by the same name."""

    def __init__(self, table: bool) -> None:
        super().__init__()
        self.block, self.middle, self.table = nn.Linear(4, 4), nn.Linear(4, 4), table

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.block(x).relu())
        return x @ self.block.weight if self.table else self.block(x)


def test_what_both_sides_need_is_named() -> None:
    with pytest.raises(ValueError, match="'block' is called both before and after 'middle'"):
        lilliput.split(Shared(False), "middle")
    with pytest.raises(ValueError, match=r"depends on the parameter block\.weight"):
        lilliput.split(Shared(True), "middle")


def test_an_example_is_asked_for_where_the_model_does_not_tell() -> None:
    with pytest.raises(ValueError, match="pass example="):
        lilliput.split(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1)), "1")
    with pytest.raises(ValueError, match="does not run on its example"):
        lilliput.split(plain(), "3", example=torch.randn(2, 7))


def test_only_the_blocks_of_its_own_run_in_a_part() -> None:
    model = models.build("char_lm", shape=(9,), classes=11, hidden=8, layers=4, heads=2)
    client, server = lilliput.split(model, 1)
    text = torch.randint(11, (2, 9))
    with splitter.calls(client) as on_device:
        payload = client(text)
    with splitter.calls(server) as on_server:
        server(payload)
    blocks = [[name for name in order if name in {f"blocks.{i}" for i in range(4)}] for order in (on_device, on_server)]
    assert blocks == [["blocks.0"], ["blocks.1", "blocks.2", "blocks.3"]]
