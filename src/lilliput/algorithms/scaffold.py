"""SCAFFOLD, option II (Karimireddy et al., ICML 2020, alg. 1).  https://arxiv.org/abs/1910.06378

Control variates c (server) and c_i (client) estimate gradients: same sign and unit as a gradient.  A local step uses
g - c_i + c; afterwards c_i+ = c_i - c + (x - y_i) / (K lr), c+ = c + sum_S p_i (c_i+ - c_i), and
x+ = x + server_lr * mean_S(y_i - x).  Every client has the same weight, p_i = 1/N, or that of `combine`, so that the
fixed point is the optimum under those weights.  K is the total weight that the optimizer gives a round's gradients: the
number of steps, or more with momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lilliput.algorithms.fedavg import FedAvg, advance, model_for, model_reply, model_sums, train
from lilliput.core.fleet import Client, Fleet, on_client
from lilliput.core.tree import Body, Tree, add, scale, sub, zeros_like
from lilliput.submodel import Combine, Slice, Sum, reduce, uniform_mean
from lilliput.submodel.combine import Weight
from lilliput.training.fit import fit
from lilliput.training.step import shift


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """FedAvg with control variates that correct each client's drift: for data that differ; sends twice as much.

    server_lr: step of the server along the mean change; the paper uses 1 or sqrt(cohort).
    control:   the initial value of c and every c_i; None for zeros.
    compat="official" corrects weights and BatchNorm statistics after the optimizer's step, divides by the number of
    steps even with momentum, which over-estimates the gradient by up to 1 / (1 - momentum), and averages control
    variates with equal weights for every `combine`.
    """

    combine: Combine = uniform_mean()
    server_lr: float = 1.0
    control: Tree | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer != "sgd" or self.optimizer_state == "average":
            raise ValueError("SCAFFOLD's control variates are known only for SGD; set optimizer=sgd")
        if self.compat == "official" and self.optimizer_state != "reset":
            raise ValueError("compat=official starts each round with a new optimizer; set optimizer_state=reset")
        if self.server_lr <= 0:
            raise ValueError(f"server_lr is {self.server_lr}; it must be positive")

    def init(self, task) -> Body:
        state = super().init(task)
        return {**state, "control": self.control or zeros_like(self._controlled(state))}

    def round(self, state: Body, fleet: Fleet) -> Body:
        slices = {c: self.slice(fleet, c) for c in fleet.sample(self.cohort)}
        replies = fleet.call(
            self.train,
            each=lambda c: {**model_for(slices[c], state, "control"), "slice": slices[c].body()},
            to=list(slices),
        )
        weight: Weight = "uniform" if self.compat == "official" else getattr(self.combine, "weight", "uniform")
        total_weight = len(fleet.clients) if weight == "uniform" else fleet.total_weight
        control_sum = Sum(weight).over(state["control"])
        sums = reduce(replies, slices, **model_sums(self.combine, state), control_delta=control_sum)
        control = add(state["control"], sums["control_delta"], 1 / (total_weight or 1))
        return {**state, **advance(self.combine, state, sums, step=self.server_lr), "control": control}

    @on_client(like={"delta": "params", "buffer_delta": "buffers", "control_delta": "control"})
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        slice_ = Slice.of(msg["slice"])
        whole_c_i: Tree = state.get("control") or self.control or zeros_like(self._controlled(client.task.init()))
        c_i = slice_.gather(whole_c_i)
        drift = sub(msg["control"], c_i)
        lr = self.lr_at(client.round, client.rounds)
        if self.compat == "official":
            params, _, stats = fit(
                client, msg["params"], config=self, buffers=msg.get("buffers"), after_step=_correct(drift, lr),
            )  # fmt: skip
            work = float(stats.steps)
        else:
            params, state, stats = train(self, client, state, msg, [shift(drift)])
            work = stats.weight
        reply = model_reply(msg, params, stats)
        moved: Tree = {**reply["delta"], **reply.get("buffer_delta", {})} if self.compat else reply["delta"]
        # c_i+ - c_i = (x - y) / (K lr) - c; without a step, the client knows nothing new about its gradient.
        c_delta = sub(scale(moved, -1 / (work * lr)), msg["control"]) if stats.steps else zeros_like(c_i)
        if slice_.is_full:
            control = add(whole_c_i, c_delta)
        else:
            control = slice_.scatter_add(c_delta, {n: x.clone() for n, x in whole_c_i.items()})
        return {**reply, "control_delta": c_delta}, {**state, "control": control}

    def _controlled(self, state: Body) -> Tree:
        """The tensors that have control variates: parameters, and with compat="official" BatchNorm statistics."""
        buffers = state.get("buffers", {}) if self.compat == "official" else {}
        return {**state["params"], **buffers}


def _correct(drift: Tree, lr: float) -> Callable[[nn.Module], None]:
    def after_step(model: nn.Module) -> None:
        with torch.no_grad():
            for name, x in (*model.named_parameters(), *model.named_buffers()):
                if name in drift:
                    x.copy_(x - lr * drift[name].to(x.device))

    return after_step
