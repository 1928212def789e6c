"""What may be done with a part: copy, pickle, move, cast, freeze, recompute, run without values; and what it holds."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from exact import IMAGES, convolutional, difference
from torch import nn

import lilliput
from lilliput import models
from lilliput.core.meter import Instrument
from lilliput.fake import Placeholder
from lilliput.splitter import Client, Server
from lilliput.splitter.parts import everything
from lilliput.tasks import Supervised, frozen_norms
from lilliput.tasks.recompute import checkpointed


@pytest.fixture(scope="module")
def once() -> tuple[nn.Module, Client, Server]:
    model = convolutional()
    return model, *lilliput.split(model, "layer2", example=IMAGES)


@pytest.fixture
def cut(once: tuple[nn.Module, Client, Server]) -> tuple[nn.Module, Client, Server]:
    return copy.deepcopy(once)


def test_copies_and_pickles_are_parts_of_their_own(cut: tuple[nn.Module, Client, Server]) -> None:
    model, client, server = cut
    for again in (copy.deepcopy((client, server)), pickle.loads(pickle.dumps((client, server)))):
        assert difference(copy.deepcopy(model), again, IMAGES) == 0.0
        with torch.no_grad():
            again[0].conv1.weight.zero_()
        assert client.conv1.weight.abs().sum() > 0
        assert again[0].get_submodule("conv1") is again[0].whole[0].conv1


def test_a_part_holds_nothing_of_the_others(cut: tuple[nn.Module, Client, Server]) -> None:
    model, client, server = cut
    for part in (client, server):
        held = [x for m in everything(part) for x in vars(m).values() if isinstance(x, Placeholder)]
        assert held and sum(x.untyped_storage().nbytes() for x in held) == 0
    nbytes = lambda m: sum(x.nbytes for x in (*m.parameters(), *m.buffers()))  # noqa: E731
    assert nbytes(client) + nbytes(server) == nbytes(model)
    assert len(pickle.dumps(client)) + len(pickle.dumps(server)) < 2 * len(pickle.dumps(model))


def test_replaying_costs_neither_operations_nor_memory(cut: tuple[nn.Module, Client, Server]) -> None:
    model, client, server = cut
    h = client(IMAGES).detach()
    server = copy.deepcopy(server)  # with nothing remembered
    with Instrument() as replay:
        server(h)
    with Instrument() as alone:
        model.fc(model.layer4(model.layer3(model.layer2(h))).mean((2, 3)))
    assert (replay.flops, replay.peak_bytes) == (alone.flops, alone.peak_bytes)


def test_a_part_moves_and_casts_as_a_whole(cut: tuple[nn.Module, Client, Server]) -> None:
    model, client, server = (m.double().eval() for m in cut)
    assert torch.equal(server(client(IMAGES.double())), model(IMAGES.double()))
    model, client, server = (m.to("meta") for m in cut)
    assert server(client(IMAGES.to("meta"))).shape == (4, 5)
    blanks = [x for m in everything(server) for x in vars(m).values() if isinstance(x, Placeholder)]
    assert {x.device.type for x in blanks} == {"meta"}


def test_modes_reach_the_model_itself() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.dropout(self.first(x), 0.5, self.training)
            return nn.functional.dropout(self.last(x), 0.5, self.training)

    model = Noisy()
    client, server = lilliput.split(model, "last")
    x = torch.randn(8, 4)
    assert difference(model, (client, server), x) == 0.0  # the replay draws nothing before the cut
    assert (server.train()(client(x)) == 0).any() and not (server.eval()(client(x)) == 0).any()


def test_autocast() -> None:
    # No convolutions: torch's in bfloat16, of few channels, differ from themselves on a CPU (2.13).
    model = models.build("char_lm", shape=(9,), classes=11, hidden=8, layers=2)
    parts = lilliput.split(model, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(model, parts, torch.randint(11, (3, 9))) == 0.0


def test_without_a_graph_and_with_frozen_statistics(cut: tuple[nn.Module, Client, Server]) -> None:
    model, client, server = cut
    with torch.no_grad(), frozen_norms(model), frozen_norms(client), frozen_norms(server):
        assert torch.equal(server(client(IMAGES)), model(IMAGES))
    assert server.get_submodule("layer2.0.bn1").num_batches_tracked == 0


def test_recomputed_blocks(cut: tuple[nn.Module, Client, Server]) -> None:
    model, client, server = cut
    with checkpointed(client), checkpointed(server):
        assert difference(model, (client, server), IMAGES) == 0.0
    assert difference(model, (client, server), IMAGES) == 0.0  # what checkpointing takes away is not the replay


def test_a_part_is_the_model_of_a_task(cut: tuple[nn.Module, Client, Server]) -> None:
    _, client, server = cut
    task = Supervised(server)
    held = task.init()
    module = task.resident({n: 2 * x for n, x in held["params"].items()}, held["buffers"])
    assert isinstance(module, Server) and module is not server
    assert torch.equal(module.fc.weight, 2 * server.fc.weight)
    module.eval()(client.eval()(IMAGES))


@pytest.mark.parametrize("dropout", [0.25, 0.0])
def test_one_stream_of_random_numbers_serves_both_parts(dropout: float) -> None:
    model = models.build("cnn_pfl", shape=(3, 12, 12), classes=5, dropout=(dropout, dropout))
    images = torch.randn(4, 3, 12, 12)
    parts = lilliput.split(model, "fc1", example=images)
    assert difference(model, parts, images, training=True) == 0.0
