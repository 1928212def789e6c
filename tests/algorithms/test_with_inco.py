"""InCo beside every method that averages whole models: it is the method's own change of the model, mixed."""

from typing import Any

import pytest
import torch
from torch import nn

import lilliput
from lilliput.algorithms import FedAvg, FedNova, FedProx, FedSub, Moon, Scaffold, SplitFedV1
from lilliput.algorithms.inco import mix
from lilliput.core.tree import add, sub
from lilliput.models.resnet import CifarResNet
from lilliput.splitter import Split
from lilliput.submodel import InCo, uniform_mean, weighted_mean
from lilliput.tasks import Supervised

METHODS: dict[str, Any] = {
    "fedavg": lambda **k: FedAvg(momentum=0.5, **k),
    "fedprox": lambda **k: FedProx(mu=0.1, optimizer="adam", **k),
    "scaffold": lambda **k: Scaffold(server_lr=1.5, **k),
    "fednova": lambda **k: FedNova(momentum=0.9, **k),
    "moon": lambda **k: Moon(mu=1.0, **k),
}  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet((3, 2, 1), shape=(3, 8, 8), classes=3, width=4)


def batches() -> dict[int, Any]:
    generator = torch.Generator().manual_seed(1)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator)

    return {c: [batch() for _ in range(1 + c)] for c in range(3)}


def after(algorithm: Any, task: Any = None, rounds: int = 1, engine: str = "sequential") -> dict[str, torch.Tensor]:
    experiment = lilliput.Experiment(algorithm, task or Supervised(network()), batches(), rounds)
    return experiment.run(engine).state["params"]


@pytest.mark.parametrize("mode", ["published", "theorem", "algorithm1", "normalised"])
@pytest.mark.parametrize("name", METHODS)
def test_a_round_differs_from_the_methods_own_by_the_mix_of_its_change(name: str, mode: Any) -> None:
    """FedNova's and SCAFFOLD's server steps come before the mix, whose published form is not linear."""
    start = Supervised(network()).init()["params"]
    plain = after(METHODS[name](lr=0.05, combine=uniform_mean()))
    mixed = after(METHODS[name](lr=0.05, combine=InCo("uniform", mode)))
    expected = add(start, mix(sub(plain, start), mode))
    assert mixed.keys() == expected.keys()
    for key, x in mixed.items():
        torch.testing.assert_close(x, expected[key], rtol=0, atol=2e-6)
    assert any(not torch.equal(mixed[key], plain[key]) for key in mixed)


@pytest.mark.parametrize("name", METHODS)
def test_three_rounds_are_the_same_on_every_engine(name: str) -> None:
    runs = [after(METHODS[name](lr=0.05, combine=InCo()), rounds=3, engine=e) for e in ("sequential", "workers")]
    assert all(torch.equal(x, runs[1][key]) for key, x in runs[0].items())


def test_where_no_two_layers_have_a_shape_it_is_the_mean() -> None:
    torch.manual_seed(0)
    task = Supervised(CifarResNet((1, 1, 1), shape=(3, 8, 8), classes=3, width=4))
    plain, mixed = (after(FedAvg(lr=0.05, combine=c), task) for c in (weighted_mean(), InCo()))
    assert all(torch.equal(x, mixed[key]) for key, x in plain.items())


def test_beside_splitfed_it_mixes_the_change_of_both_sides_of_the_cut() -> None:
    whole = network()
    parts = (
        nn.Sequential(whole.conv1, whole.bn1, nn.ReLU(), whole.layer1[0]),
        nn.Sequential(
            *whole.layer1[1:], whole.layer2, whole.layer3, nn.AdaptiveAvgPool2d(1), nn.Flatten(), whole.linear
        ),
    )
    start = Split(*parts).init()["params"]
    mixed, plain = (after(SplitFedV1(lr=0.05, combine=c), Split(*parts)) for c in (InCo(), weighted_mean()))
    expected = add(start, mix(sub(plain, start)))
    assert mixed.keys() == expected.keys()
    for key, x in mixed.items():
        torch.testing.assert_close(x, expected[key], rtol=0, atol=2e-6)
    assert any(not torch.equal(mixed[key], plain[key]) for key in mixed if key.startswith("server."))


def test_fedsub_refuses_it() -> None:
    with pytest.raises(ValueError, match="FedSub's are coordinates in subspaces; leave combine=inco out"):
        FedSub(lr=0.1, combine=InCo())
