"""Weight decay in subspaces is that of the weight W = x + b P which a layer stands for, not of b."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fedsub import batches, close, orthogonal, run
from torch import Tensor, nn

import lilliput
from lilliput.algorithms import FedAvg, FedSub
from lilliput.subspace import subspace_layers
from lilliput.tasks import Supervised
from lilliput.training.step import Trainer, step

DECAY, LR = 0.3, 0.05


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is [in, out]."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, inside: int, out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inside, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "clip": 0.05}, {"momentum": 0.5, "nesterov": True, "per_layer": True},
        {"optimizer": torch.optim.SGD}, {"optimizer": "adam", "optimizer_state": "keep"}, {"optimizer": "adamw"},
        {"optimizer": torch.optim.AdamW}, {"optimizer": torch.optim.RMSprop}, {"optimizer": "lion"},
        {"optimizer": "adafactor", "optimizer_options": {"scale_parameter": True}},
        {"optimizer": torch.optim.Adafactor}, {"optimizer": torch.optim.ASGD, "weight_decay": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_in_full_dimension_it_is_fedavg_under_weight_decay(settings: dict[str, Any]) -> None:
    given = {"lr": 0.02, "weight_decay": DECAY, "local_epochs": 2, **settings}
    ours, _ = run(FedSub(**given, rank=1.0, projection="idx", dual="none"), rounds=3)
    close(ours.state["params"], run(FedAvg(**given), rounds=3)[0].state["params"], atol=1e-9)


def test_steps_along_the_gradient_decay_alike_in_any_full_basis() -> None:
    given: dict[str, Any] = {"lr": 0.1, "weight_decay": DECAY, "momentum": 0.9}
    ours, _ = run(FedSub(**given, rank=1.0, projection=orthogonal, dual="none"))
    close(ours.state["params"], run(FedAvg(**given))[0].state["params"])


def layered(kind: str, projection: str) -> nn.Sequential:
    """One layer of a kind, in a subspace of rank 2, that has learnt something already."""
    torch.manual_seed(3)
    layer = {"linear": nn.Linear(6, 4), "transposed": Conv1D(6, 4)}.get(kind) or nn.Conv2d(2, 4, 3)
    model = nn.Sequential(layer).double()
    along: Any = "width" if kind == "width" else "filter"
    own = lilliput.replace_with_subspace(model, ["0"], rank=2, projection=projection, along=along).layers["0"]
    nn.init.normal_(own.b)
    return model


KINDS = pytest.mark.parametrize("kind", ["linear", "transposed", "filter", "width"])
PROJECTIONS = pytest.mark.parametrize("projection", ["cd", "ss", "rd"])


def trained(model: nn.Sequential, optimizer: Any, decay: float, penalty: float, slope: float) -> Tensor:
    """The weight after three steps on slope |y| + penalty / 2 |W|^2."""
    config = FedAvg(lr=LR, optimizer=optimizer, weight_decay=decay)
    trainer = Trainer(model, config, LR, only=["0.b"])
    kind = subspace_layers(model)["0"].form.kind
    x = torch.linspace(-1, 1, 6).expand(2, 6).double() if kind in ("linear", "transposed") else None
    x = torch.linspace(-1, 1, 50).double().view(1, 2, 5, 5) if x is None else x

    def loss(model: Any, batch: Any, context: Any) -> tuple[Tensor, dict[str, Tensor]]:
        layer = model[0]
        weight = layer.form.matrix(layer.weight) + layer.basis.expand(layer.b)
        return slope * model(batch[0]).abs().mean() + penalty / 2 * weight.square().sum(), {}

    for _ in range(3):
        step(model, trainer, loss, (x, torch.zeros(len(x))))
    return subspace_layers(model)["0"].dense()


@KINDS
@PROJECTIONS
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_decay_in_the_gradient_is_that_of_the_squared_weight(kind: str, projection: str, optimizer: str) -> None:
    by_decay = trained(layered(kind, projection), optimizer, DECAY, 0.0, 1.0)
    torch.testing.assert_close(by_decay, trained(layered(kind, projection), optimizer, 0.0, DECAY, 1.0))


@KINDS
@PROJECTIONS
@pytest.mark.parametrize("optimizer", ["adamw", torch.optim.AdamW, "lion"])
def test_decay_apart_from_the_gradient_shrinks_what_the_subspace_spans(
    kind: str, projection: str, optimizer: Any
) -> None:
    model = layered(kind, projection)
    layer = subspace_layers(model)["0"]
    before, p = layer.form.matrix(layer.dense()), layer.basis.dense()
    within = p.T @ torch.linalg.inv(p @ p.T) @ p
    expected = before - before @ within + (1 - LR * DECAY) ** 3 * before @ within
    after = layer.form.matrix(trained(model, optimizer, DECAY, 0.0, 0.0))
    torch.testing.assert_close(after, expected, atol=1e-9, rtol=0)


class WithUnused(nn.Sequential):
    """Layers of which the last is never asked."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self[:-1]:
            x = layer(x)
        return x


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw"}, {"compat": "official"}, {"per_layer": True}], ids=str)
def test_what_has_no_gradient_is_left_alone_beside_duals(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = WithUnused(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(8, 3)).double()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = FedSub(lr=0.1, rank=2, targets=["0"], weight_decay=DECAY, **settings)
    found = lilliput.Experiment(
        method, Supervised(model), {c: batches(c) for c in range(2)}, rounds=3, evaluate="none"
    ).run("sequential").state["params"]  # fmt: skip
    for name, x in start.items():
        assert torch.equal(found[name], x) == name.startswith("3"), name
