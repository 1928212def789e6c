"""A resident module is the task's own: loaded weights are those that its forward uses and its backward reaches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import models
from lilliput.algorithms import FedAvg
from lilliput.tasks import Supervised


class Recurrent(nn.Module):
    """Texts (N, 6) to logits (N, 6, 10) by any of torch's recurrent layers, which keep lists of their weights."""

    def __init__(self, kind: type[nn.RNNBase], **options: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layers = kind(4, 3, 2, batch_first=True, **options)
        self.out = nn.Linear(6 if options.get("bidirectional") else 3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(self.embedding(x))[0])


class Listing(nn.Module):
    """A module that keeps its own parameters in plain containers too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(10, 6)), nn.Parameter(torch.randn(10))
        self.listed, self.named, self.count = [self.a], {"b": self.b, "more": [self.a]}, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.count[0] += 1
        return x.float() @ (self.listed[0] + self.named["more"][0]).T + self.named["b"]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn, both ways": lambda: Recurrent(nn.RNN, bidirectional=True),
    "char_lstm": lambda: models.build("char_lstm", shape=(6,), classes=10, embedding=4, hidden=3),
    "char_lm": lambda: models.build("char_lm", shape=(6,), classes=10, hidden=4, heads=2, layers=1),
    "listing": Listing,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_module_computes_with_the_weights_it_was_given(name: str) -> None:
    torch.manual_seed(0)
    model, other = MODELS[name](), MODELS[name]()
    task, x = Supervised(model), torch.randint(10, (5, 6))
    for _ in range(2):  # loaded for the first client and for the next
        resident = task.resident({n: p.detach() for n, p in other.named_parameters()})
        torch.testing.assert_close(resident(x), other(x))
    resident(x).sum().backward()
    assert all(p.grad is not None for p in resident.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trains_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    task, x = Supervised(MODELS[name]()), torch.randint(10, (5, 6))
    y = x if name != "listing" else x[:, 0]
    before = task.init()["params"]
    data = {c: [(x, y), (x.flip(1), y)] for c in range(2)}
    after = lilliput.Experiment(FedAvg(lr=0.1), task, data, rounds=1, evaluate="none").run("sequential").state["params"]
    assert [n for n, p in after.items() if torch.equal(p, before[n])] == []
