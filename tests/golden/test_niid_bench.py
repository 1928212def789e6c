"""The published programs' trajectories of FedAvg, FedProx, SCAFFOLD, FedNova and MOON, replayed step for step.

The recording: three clients with 3, 2 and 1 fixed batches, three rounds of two local epochs, SGD(0.1, weight decay
1e-5); see the README beside it for how it was made.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lilliput
from lilliput.algorithms import FedAvg, FedNova, FedProx, Moon, Scaffold
from lilliput.submodel import weighted_mean

COPY = Path(__file__).with_name("niid_bench.safetensors")
RUNS = [
    "fedavg",
    "fedavg_m",
    "fedavg_bn",
    "fedavg_partial",
    "fedprox",
    "fedprox_mu0",
    "scaffold",
    "scaffold_m",
    "scaffold_bn",
    "scaffold_partial",
    "fednova",
    "fednova_m",
    "fednova_bn",
    "fednova_partial",
    "moon",
    "moon_mu0",
]


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(COPY)


class Net(nn.Module):
    """Linear - [BatchNorm] - ReLU - [projection] - Linear, with the recording's names."""

    def __init__(self, bn: bool, projection: bool):
        super().__init__()
        self.f1 = nn.Linear(6, 8)
        self.bn = nn.BatchNorm1d(8) if bn else None
        self.p = nn.Linear(8, 4) if projection else None
        self.h = nn.Linear(4 if projection else 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.f1(x)
        x = torch.relu(x if self.bn is None else self.bn(x))
        return self.h(x if self.p is None else self.p(x))


@dataclass
class Run:
    """One recorded run: its hyper-parameters, data, and the tree of numbers under a prefix."""

    name: str
    file: dict[str, torch.Tensor]

    def hp(self, key: str) -> float:
        return float(self.file[f"{self.name}/hp/{key}"])

    def tree(self, prefix: str) -> dict[str, torch.Tensor]:
        start = f"{self.name}/{prefix}/"
        return {key.removeprefix(start): x for key, x in self.file.items() if key.startswith(start)}

    def data(self) -> dict[int, list[tuple[torch.Tensor, torch.Tensor]]]:
        return {c: list(self._batches(c)) for c in range(3)}

    def _batches(self, c: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for i in range(3):
            if f"batch/{c}/{i}/x" in self.file:
                yield self.file[f"batch/{c}/{i}/x"], self.file[f"batch/{c}/{i}/y"]

    def cohorts(self) -> list[list[int]]:
        return [self.file[f"{self.name}/round{t}/selected"].tolist() for t in range(3)]

    def algorithm(self) -> FedAvg:
        method = self.name.split("_")[0]
        momentum = 0.9 if method == "moon" else self.hp("rho")  # the published MOON fixes its momentum
        common = {
            "lr": self.hp("lr"),
            "momentum": momentum,
            "weight_decay": self.hp("reg"),
            "local_epochs": int(self.hp("epochs")),
        }
        if method == "fedprox":
            return FedProx(**common, mu=self.hp("mu"))
        if method == "moon":
            return Moon(**common, mu=self.hp("mu"), temperature=self.hp("temperature"))
        if method == "fednova":
            return FedNova(**common, compat="official")
        if method == "scaffold":
            control = self.tree("round0/c_global_before")
            return Scaffold(**common, combine=weighted_mean(), control=control, compat="official")
        return FedAvg(**common)


def replay(run: Run, rounds: int) -> lilliput.History:
    torch.manual_seed(0)
    model = Net(run.name.endswith("_bn"), run.name.startswith("moon"))
    return lilliput.Experiment(
        algorithm=run.algorithm(),
        task=lilliput.tasks.Supervised(model),
        data=run.data(),
        rounds=rounds,
        init=run.tree("round0/global_before"),
        cohorts=run.cohorts(),
    ).run(engine="sequential")


@pytest.mark.parametrize("name", RUNS)
def test_every_round_of_the_published_run_is_replayed(name: str, recorded: dict[str, torch.Tensor]) -> None:
    run = Run(name, recorded)
    for rounds in (1, 2, 3):
        model = replay(run, rounds).models["global"]
        ours = {**model.params, **(model.buffers or {})}
        expected = run.tree("final_global" if rounds == 3 else f"round{rounds}/global_before")
        assert ours.keys() == expected.keys()
        for key, x in expected.items():
            torch.testing.assert_close(
                ours[key].double(), x.double(), atol=2e-6, rtol=0, msg=lambda m, k=key: f"{name} {k}: {m}"
            )


@pytest.mark.parametrize("name", [run for run in RUNS if run.startswith("scaffold")])
def test_scaffold_ends_with_the_published_control_variates(name: str, recorded: dict[str, torch.Tensor]) -> None:
    run = Run(name, recorded)
    control = replay(run, 3).state["control"]
    for key, x in run.tree("final_c_global").items():
        torch.testing.assert_close(control[key].double(), x.double(), atol=2e-5, rtol=0)  # divided by K lr = 0.2 to 0.6


def test_the_copy_is_the_recording(shared: Path) -> None:
    original = (shared / "golden" / "heterogeneous" / "niid_bench.safetensors").read_bytes()
    assert original == COPY.read_bytes()
