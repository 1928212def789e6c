"""FedSub's recorded runs, through the public names: weights, means of b, duals and the clients' own parameters."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import lilliput
from lilliput.algorithms.fedsub import FedSub
from lilliput.engines import Sequential
from lilliput.subspace import Dense
from lilliput.tasks import Supervised

SHARED = Path(os.environ.get("LILLIPUT_SHARED", Path(__file__).parents[3] / "shared"))
RUNS = [
    "fedsub_cd", "fedsub_cd_official_stale_P", "fedsub_cd_nesterov_wd", "fedsub_ss", "fedsub_idx_adaptive",
    "fedsub_one_client", "fedsub_conv_idx",
]  # fmt: skip
pytestmark = pytest.mark.skipif(
    not (SHARED / "golden/subspace").exists(), reason="the recorded runs in shared/golden/subspace are not here"
)


class Linear(nn.Module):
    """The recorded network of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False)
        self.up_proj, self.gate_proj = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.norm, self.down_proj = nn.LayerNorm(12), nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.emb(x))
        return self.head(self.down_proj(self.norm(F.silu(self.gate_proj(h)) * self.up_proj(h))))


class Conv(nn.Module):
    """The recorded network of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 5, padding=2, bias=False)
        self.conv2 = nn.Conv2d(4, 6, 5, stride=2, padding=2, bias=False)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


def recorded(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a recording, and its settings."""
    with safe_open(SHARED / "golden/subspace" / f"{name}.safetensors", "pt") as file:
        about: dict[str, Any] = {}
        for key, text in file.metadata().items():
            try:
                about[key] = json.loads(text)
            except json.JSONDecodeError:
                about[key] = text
        return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118


def method(own: dict[str, Tensor], about: dict[str, Any]) -> FedSub:
    """The published program's settings, with the recorded projections."""
    targets, tau = about["target_order"], about["tau"]
    refresh = about["update_cp_freq"] // tau

    def basis(layer: str, rank: int, width: int, epoch: int) -> Dense:
        return Dense(own[f"round.P.{layer}"][epoch * refresh - 1] if epoch else own[f"P0.{layer}"])

    return FedSub(
        lr=about["lr"], momentum=about["momentum"], nesterov=about["nesterov"], weight_decay=about["weight_decay"],
        targets=targets, rank={t: own[f"P0.{t}"].shape[0] for t in targets}, projection=basis,
        refresh=refresh, ordinary="local", optimizer_state="keep", compat="official",
        stale_projection=not about["refresh_caller"],
    )  # fmt: skip


class Steps:
    """Explicit batches; each epoch, of which a round draws one, has the next few."""

    def __init__(self, batches: list[Any], size: int):
        self._batches, self._size, self._next = batches, size, 0
        self.examples = len(batches)

    def __len__(self) -> int:
        return self._size

    def epoch(self, generator: object) -> Iterator[Any]:
        self._next += self._size
        return iter(self._batches[self._next - self._size : self._next])


class Watching(Sequential):
    """The engine, keeping what the devices held at the end of each round."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[dict[int, Any]] = []

    def commit(self, clients: Sequence[int]) -> dict[int, Any]:
        states = super().commit(clients)
        if states:
            self.held.append(states)
        return states


def turn(own: dict[str, Tensor], about: dict[str, Any], layer: str, r: int) -> Tensor:
    """What takes a dual to the basis of the next round: the recording does so at once, a device when it is needed."""
    new, refresh = own[f"round.P.{layer}"][r], about["update_cp_freq"] // about["tau"]
    if (r + 1) % refresh:
        return torch.eye(len(new))
    old = own[f"P0.{layer}"] if r < refresh or not about["refresh_caller"] else own[f"round.P.{layer}"][r - refresh]
    return old @ new.T


@pytest.mark.parametrize("name", RUNS)
def test_recorded_run(name: str) -> None:
    own, about = recorded(name)
    model = (Linear if about["kind"] == "linear" else Conv)()
    model.load_state_dict({key.removeprefix("init."): x for key, x in own.items() if key.startswith("init.")})
    tau, rounds, engine = about["tau"], about["rounds"], Watching()
    batches = {c: list(zip(own[f"data.c{c}.x"], own[f"data.c{c}.y"], strict=True)) for c in range(about["clients"])}
    data = {c: Steps(own_batches, tau) for c, own_batches in batches.items()}
    history = lilliput.Experiment(
        algorithm=method(own, about), task=Supervised(model), data=data, rounds=rounds, evaluate="none"
    ).run(engine)

    def same(ours: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    for r, c in itertools.product(range(rounds), data):
        held = engine.held[r][c]
        for layer in about["target_order"]:
            same(held["params"][f"{layer}.weight"], own[f"round.c{c}.x.{layer}"][r])
            same(held["dual"][f"{layer}.b"] @ turn(own, about, layer, r), own[f"round.c{c}.lambda.{layer}"][r])
        for key in (key for key in own if key.startswith(f"c{c}.p.")):
            same(held["params"][key.removeprefix(f"c{c}.p.")], own[key][tau * (r + 1) - 1])
    for layer in about["target_order"]:
        same(history.state["params"][f"{layer}.weight"], own[f"round.c0.x.{layer}"][-1])
