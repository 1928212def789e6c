"""Split learning under every product of settings: v1 is FedAvg, and v2 plain training by the clients in turn.

SplitFed v1 is compared with our FedAvg, to 1e-6 in float32 and to 1e-12 in float64, v2 with plain torch.

FedAvg's `accumulate`, `per_layer` and `checkpointing` change no number; split learning, which refuses them, equals it
under each.  What cannot be equal is not drawn: dropout, whose draws each end names for itself; micro-batches under
bf16, which rounds them, or of a model that moves state in forward or in which examples see each other, because a
split step runs its batch whole; fp16, which split methods refuse; clipping each parameter by itself, under per_layer.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import nets
import plain
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from products import COHORTS, ENGINES, SPACE, Case, described, examples, sensible
from torch import Tensor, nn

import lilliput
from lilliput import algorithms
from lilliput.splitter import Split

LEFT_OUT = {"method": ["fedavg"], "precision": ["float32", "float32", "bf16"]}
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
    if s["clip"] is not None:
        s["per_layer"] = False
    if s["optimizer"] != "sgd" and (s["accumulate"] > 1 or s["clip"] is not None):
        s |= {"dtype": "float64", "precision": "float32"}  # adaptive optimizers blow up the rounding of sums
    return s


def parts(s: Case) -> Split:
    net = nets.Net(s)
    return Split(Front(net, s["cut"]), Back(net, s["cut"], s["tail"]), tail=net.head if s["tail"] else None)


def trained(method: type, s: Case, **others: Any) -> dict[str, Tensor]:
    names = ("momentum", "nesterov", "weight_decay", "lr", "local_epochs", "local_steps", "schedule", "warmup", "clip")
    own = {n: s[n] for n in (*names, "precision", "optimizer_state", "buffers")} | others
    known = s["optimizer"] if s["optimizer"] in plain.OPTIMIZERS else getattr(torch.optim, s["optimizer"])
    options = {"dampening": s["dampening"]} if s["dampening"] else {}
    options |= {"eps": s["eps"]} if s["optimizer"] != "sgd" else {}
    experiment = lilliput.Experiment(
        method(**own, optimizer=known, optimizer_options=options), parts(s), examples(s), rounds=s["rounds"],
        cohorts=COHORTS[s["cohorts"]], quorum=1.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = experiment.run(engine=ENGINES[s["engine"]]()).state
    return {**state["params"], **state.get("buffers", {})}


DRAWN: dict[str, Any] = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=20, **DRAWN)
@given(CASES)
def test_splitfed_v1_is_fedavg(case: Case) -> None:
    s = fitting(case)
    whole = trained(algorithms.FedAvg, s, **{n: s[n] for n in ("accumulate", "per_layer", "checkpointing")})
    split = trained(algorithms.SplitFedV1, s)
    assert split.keys() == whole.keys()
    worst = max(float((split[n].double() - x.double()).abs().max()) for n, x in whole.items())
    assert worst <= (1e-12 if s["dtype"] == "float64" else 1e-6), f"{worst}: {described(case)}"


class Both:
    """The optimizers of a device's parts and of the server's as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.zero_grad = lambda: [opt.zero_grad() for opt in optimizers]
        self.step = lambda: [opt.step() for opt in optimizers]


def optimizer(model: nn.Module, server: bool, s: Case, lr: float, kept: dict[str, Any]) -> torch.optim.Optimizer:
    """That of one end, going on from what is kept of it."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and n.startswith("server.") == server]
    opt = plain.optimizer([p for _, p in named], s, lr)
    if s["optimizer_state"] == "keep" and kept:
        opt.load_state_dict({**kept, "param_groups": opt.state_dict()["param_groups"]})
    return opt


def in_turn(first: nn.Module, data: dict[int, list[Any]], s: Case) -> dict[str, Tensor]:
    """Plain training of one model whose device's parts go back to their mean of the round before for every client."""
    x = {n: p.detach().clone() for n, p in first.named_parameters()}
    start = {n: b.clone() for n, b in first.named_buffers() if n in first.state_dict()}
    shared, own, kept = dict(start), {c: start for c in data}, {c: dict[str, Any]() for c in [*data, "server"]}
    for number, cohort in enumerate(COHORTS[s["cohorts"]], 1):
        lr, server, found = plain.lr_at(s, number), None, []
        for c in cohort:
            net = copy.deepcopy(first).train()
            held = {"average": shared, "local": own[c], "none": start}[s["buffers"]]
            held = {n: shared[n] if n.startswith("server.") else b for n, b in held.items()}
            net.load_state_dict({**x, **held}, strict=False)
            if s["buffers"] == "none":
                plain.normalise_by_the_batch(net)
            if server is None:
                server, there = net.server, optimizer(net, True, s, lr, kept["server"])
            net.server = server
            here = optimizer(net, False, s, lr, kept[c])
            params = [p for p in net.parameters() if p.requires_grad]
            passes = s["local_epochs"] if s["local_steps"] is None else s["local_steps"]
            for batch in (data[c] * passes)[: s["local_steps"]]:
                if (batch[1] != plain.IGNORED).any():
                    plain.take_step(net, params, *batch, s, Both(here, there), None, {}, first=False)
            own[c], kept[c] = {n: b.clone() for n, b in net.named_buffers() if n in start}, here.state_dict()
            examples = sum(int((y != plain.IGNORED).sum()) for _, y in data[c])
            found.append((examples, {n: p.detach().clone() for n, p in net.named_parameters()}, own[c]))
        kept["server"], total = there.state_dict(), sum(n for n, *_ in found) or 1
        for kind, at in ((x, 1), (shared if s["buffers"] != "none" else {}, 2)):
            for name, before in kind.items():
                mean = sum(each[0] * (each[at][name].double() - before.double()) for each in found) / total
                kind[name] = found[-1][at][name] if name.startswith("server.") else before + mean.to(before.dtype)
    return {**x, **(shared if s["buffers"] == "average" else {})}


COUNTING_SERVER: Case = {n: v[0] for n, v in (SPACE | LEFT_OUT | ADDED).items()}
COUNTING_SERVER |= {"norm": "counter", "buffers": "local", "cut": 0}


@settings(max_examples=20, **DRAWN)
@given(CASES)
@example(COUNTING_SERVER)
def test_splitfed_v2_is_training_by_the_clients_in_turn(case: Case) -> None:
    s = fitting(case) | {"accumulate": 1, "per_layer": False, "checkpointing": False}
    found, expected = trained(algorithms.SplitFedV2, s), in_turn(parts(s).model, examples(s), s)
    worst = max(float((found[n].double() - x.double()).abs().max()) for n, x in expected.items() if n in found)
    rounding = 1e-9 if s["dtype"] == "float64" else 2e-5 if s["precision"] == "float32" else 2e-3
    assert worst <= rounding * (1 if s["optimizer"] == "sgd" else 5), f"{worst}: {described(case)}"


@pytest.mark.slow
@settings(max_examples=80, **DRAWN)
@given(st.sampled_from([test_splitfed_v1_is_fedavg, test_splitfed_v2_is_training_by_the_clients_in_turn]), CASES)
def test_both_in_many_cases(law: Any, case: Case) -> None:
    law.hypothesis.inner_test(case)
