"""SplitFed v1 is FedAvg under every product of settings, to 1e-6 in float32 and to 1e-12 in float64.

FedAvg's `accumulate`, `per_layer` and `checkpointing` change no number; split learning, which refuses them, equals it
under each.  What cannot be equal is not drawn: dropout, whose draws each end names for itself; micro-batches under
bf16, which rounds them, or of a model that moves state in forward or in which examples see each other, because a
split step runs its batch whole; clipping, which each end does by its own norm; fp16, which split methods refuse.
"""

from __future__ import annotations

import warnings
from typing import Any

import nets
import plain
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from products import COHORTS, ENGINES, SPACE, Case, described, examples, sensible
from torch import Tensor, nn

import lilliput
from lilliput import algorithms
from lilliput.tasks import Split

LEFT_OUT = {"method": ["fedavg"], "clip": [None], "precision": ["float32", "float32", "bf16"]}
ADDED: dict[str, list[Any]] = {"cut": [1, 0, 4], "tail": [False, True]}
CASES = st.fixed_dictionaries({n: st.sampled_from(v) for n, v in (SPACE | LEFT_OUT | ADDED).items()})


class Front(nn.Module):
    """The device's part of a `Net`: its first layer and some of its blocks."""

    def __init__(self, net: nets.Net, cut: int):
        super().__init__()
        self.first, self.blocks = net.first, net.blocks[:cut]

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(torch.tanh(self.first(x)))


class Back(nn.Module):
    """The rest of it; without the head where that is a tail."""

    def __init__(self, net: nets.Net, cut: int, tail: bool):
        super().__init__()
        self.blocks, self.branch, self.sometimes, self.middle = net.blocks[cut:], net.branch, net.sometimes, net.middle
        self.head = nn.Identity() if tail else net.head
        if hasattr(net, "offset"):
            self.offset = net.offset

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        if self.branch is not None and self.sometimes and x.sum() > 0:
            x = x + self.branch(x)
        return self.head(torch.relu(self.middle(x)) + getattr(self, "offset", 0))


def fitting(case: Case) -> Case:
    s = sensible(case)
    if s["cut"]:  # what is tied across the cut is a matter of its own
        s["tied"] = False
    mixing = s["norm"] != "none" or s["layout"] == "expanded" or s["branch"] == "sometimes"
    if mixing or s["precision"] == "bf16":
        s["accumulate"] = 1
    if s["accumulate"] > 1 and s["optimizer"] != "sgd":  # adaptive optimizers blow up the rounding of sums
        s |= {"dtype": "float64", "precision": "float32"}
    return s


def trained(method: type, s: Case, **others: Any) -> dict[str, Tensor]:
    net = nets.Net(s)
    task = Split(Front(net, s["cut"]), Back(net, s["cut"], s["tail"]), tail=net.head if s["tail"] else None)
    names = ("momentum", "nesterov", "weight_decay", "lr", "local_epochs", "local_steps", "schedule", "warmup")
    own = {n: s[n] for n in (*names, "precision", "optimizer_state", "buffers")} | others
    known = s["optimizer"] if s["optimizer"] in plain.OPTIMIZERS else getattr(torch.optim, s["optimizer"])
    options = {"dampening": s["dampening"]} if s["dampening"] else {}
    options |= {"eps": s["eps"]} if s["optimizer"] != "sgd" else {}
    experiment = lilliput.Experiment(
        method(**own, optimizer=known, optimizer_options=options), task, examples(s), rounds=s["rounds"],
        cohorts=COHORTS[s["cohorts"]], quorum=1.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = experiment.run(engine=ENGINES[s["engine"]]()).state
    return {**state["params"], **state.get("buffers", {})}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(CASES)
def test_splitfed_v1_is_fedavg(case: Case) -> None:
    s = fitting(case)
    whole = trained(algorithms.FedAvg, s, **{n: s[n] for n in ("accumulate", "per_layer", "checkpointing")})
    split = trained(algorithms.SplitFedV1, s)
    assert split.keys() == whole.keys()
    worst = max(float((split[n].double() - x.double()).abs().max()) for n, x in whole.items())
    assert worst <= (1e-12 if s["dtype"] == "float64" else 1e-6), f"{worst}: {described(case)}"
