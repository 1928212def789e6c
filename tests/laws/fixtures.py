"""What the laws run on: tiny tasks, and two methods that hold the contract before any family needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import lilliput
from lilliput.algorithms import ALGORITHMS, SPLIT, FedAvg, FedSub, SplitFedV1, SplitFedV2
from lilliput.core.fleet import Client, Fleet, Model, on_client
from lilliput.core.tree import Body, add, scale
from lilliput.splitter import Split
from lilliput.submodel import Mean, Slice, reduce
from lilliput.tasks import Supervised


@dataclass(frozen=True)
class RollingSlices(FedAvg):
    """A client's slice of the hidden layer is as wide as its id says, and rolls on with the round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "slice", Rolling())


@dataclass(frozen=True)
class Rolling:
    """Hidden units [round, round + width) modulo 8, of width 2, 4 or 8 by client."""

    def __call__(self, fleet: Fleet, client: int) -> Slice:
        width = (2, 4, 8)[client % 3]
        held = torch.sort((torch.arange(width) + fleet.round) % 8).values
        hidden = [(name, 0) for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")]
        return Slice({"hidden": held}, {"hidden": [*hidden, ("3.weight", 1)]})


@dataclass(frozen=True)
class TwoCalls:
    """Two calls per round and state on both sides: clients send gradients and the server returns momentum.

    The first call stages a draw on the device that the second must find; the server keeps a buffer per client.
    """

    cohort: int | None = None
    lr: float = 0.1
    ordered = False

    def init(self, task: Any) -> Body:
        return {"params": task.init()["params"]}

    def round(self, state: Body, fleet: Fleet) -> Body:
        chosen = fleet.sample(self.cohort)
        buffers = {}
        for reply in fleet.call(self.look, {"params": state["params"]}, to=chosen):
            old = fleet.memory.get(reply.client, {}).get("buffer")
            gradient = reply.body["gradient"]
            buffers[reply.client] = add(scale(old, 0.5), gradient) if old else gradient
            fleet.memory[reply.client] = {"buffer": buffers[reply.client]}
        replies = fleet.call(self.weigh, each={c: {"buffer": b} for c, b in buffers.items()})
        mean = reduce(replies, delta=Mean("labels").over(state["params"]))["delta"]
        return {"params": add(state["params"], mean)}

    @on_client(like={"gradient": "params"})
    def look(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        model = client.task.resident(msg["params"])
        batch = next(iter(client.data.epoch(client.generator("look"))))
        loss, _ = client.task.loss(model, batch)
        named = dict(model.named_parameters())
        gradient = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        draw = torch.rand((), generator=client.generator("draw"))
        return {"gradient": {n: g.contiguous() for n, g in gradient.items()}}, {
            **state,
            "draw": draw,
            "seen": state.get("seen", 0) + 1,
        }

    @on_client(like={"delta": "buffer"})
    def weigh(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        again = torch.rand((), generator=client.generator("draw"))
        if not torch.equal(state["draw"], again):
            raise RuntimeError("what the first call staged is not what the second found")
        step = -self.lr * (0.5 + float(state["draw"])) / state["seen"]
        return {"delta": scale(msg["buffer"], step)}, state

    def models(self, state: Body, fleet: Fleet) -> dict[str, Model]:
        return {"global": Model(state["params"])}


def network(bn: bool = True) -> nn.Sequential:
    """6 -> 8 -> 3, the same weights every time."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if bn else nn.Identity(), nn.ReLU(), nn.Linear(8, 3))


def task(name: str) -> Supervised:
    """The tiny task of a method; what trains a split model has the same one, cut behind BatchNorm, or on both sides of
    BatchNorm and ReLU where the last layer stays on the device."""
    model = network(bn=name != "two_calls")
    if name in TAILED:
        return Split(model[0], model[1:3], tail=model[3])
    return Split(model[:2], model[2:], nn.Linear(8, 3)) if name in SPLIT else Supervised(model)


def batches(clients: int = 6) -> dict[int, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Client c has 1 + c % 3 batches of 4, of classes that lean towards c % 3."""
    generator = torch.Generator().manual_seed(3)

    def batch(c: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(4, 6, generator=generator) + c % 3
        leaning = torch.rand(4, generator=generator) < 0.7
        return x, torch.where(leaning, c % 3, torch.randint(3, (4,), generator=generator))

    return {c: [batch(c) for _ in range(1 + c % 3)] for c in range(clients)}


TOYS: dict[str, Any] = {"two_calls": TwoCalls, "rolling_slices": RollingSlices}
SUBSPACE: dict[str, Any] = {
    "fedsub_svd": partial(FedSub, projection="svd", dual="full", refresh=2, momentum=0.5, optimizer_state="keep"),
}
TAILED: dict[str, Any] = {
    "splitfed_v1_tail": SplitFedV1,
    "splitfed_v2_tail": SplitFedV2,
    "splitfed_v1_tail_clipped": partial(SplitFedV1, clip=0.1),
}
METHODS: dict[str, Any] = {**ALGORITHMS, **SUBSPACE, **SPLIT, **TAILED, **TOYS}


def method(name: str, **settings: Any) -> Any:
    """A method with settings that exercise it: three of six clients, two epochs."""
    if name == "two_calls":
        return TwoCalls(cohort=settings.get("cohort", 3))
    if name in ("fedavg", "local_only"):
        settings = {"optimizer_state": "keep", "momentum": 0.5, **settings}
    if name in ("cse_fsl", "fsl_sage"):
        settings = {"momentum": 0.5, "server_update_interval": 2, **settings}
    if name == "fsl_sage":
        settings = {"align_interval": 2, "align_epochs": 3, "memory_size": 10, **settings}
    return METHODS[name](**{"lr": 0.1, "local_epochs": 2, "cohort": 3, **settings})


def experiment(name: str, rounds: int = 4, data: Mapping | None = None, **options: Any) -> lilliput.Experiment:
    """A run of the method on the tiny task, tested on everyone's data."""
    data = data if data is not None else batches()
    settings = options.pop("settings", {})
    test = [batch for c in sorted(data) for batch in data[c]]
    return lilliput.Experiment(
        algorithm=method(name, **settings), task=task(name), data=data, rounds=rounds,
        **{"test": test, **options},
    )  # fmt: skip


def assert_same_state(a: Body, b: Body) -> None:
    """Bodies equal to the last bit."""
    assert a.keys() == b.keys()
    for key, x in a.items():
        if isinstance(x, torch.Tensor):
            assert x.dtype == b[key].dtype and torch.equal(x, b[key]), key
        elif isinstance(x, Mapping):
            assert_same_state(x, b[key])
        else:
            assert x == b[key], key


def assert_same_history(a: lilliput.History, b: lilliput.History) -> None:
    """States, models and rows equal to the last bit, but for wall time."""
    assert_same_state(a.state, b.state)
    assert a.models.keys() == b.models.keys()
    for name, model in a.models.items():
        assert_same_state(model.params, b.models[name].params)
        assert_same_state(model.buffers or {}, b.models[name].buffers or {})
    assert [timeless(row) for row in a.rows] == [timeless(row) for row in b.rows]


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what depends on the machine."""
    simulated = ("communication_seconds", "simulated_seconds")
    return {k: v for k, v in row.items() if k in simulated or ("second" not in k and k != "process_memory_bytes")}
