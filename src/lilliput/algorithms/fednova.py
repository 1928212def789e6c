"""FedNova (Wang et al., NeurIPS 2020, eq. 8-9).  https://arxiv.org/abs/2007.07481

Clients that take more steps must not have more weight.  With a_i = |a_i|_1 the total weight that a client's optimizer
gives its gradients, d_i = (y_i - x) / a_i and x+ = x + tau_eff sum_i p_i d_i, tau_eff = sum_i p_i a_i.  For tau steps
of SGD with momentum rho, a_i = (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho); without momentum a_i = tau.  The
optimizer reports a_i, with dampening and Nesterov's step; p_i are the weights of the combine.  Where clients hold
slices, both means of a coordinate run over the clients that hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lilliput.algorithms.fedavg import FedAvg, advance, model_for, model_reply, model_sums, train
from lilliput.core.fleet import Client, Fleet, Reply, on_client
from lilliput.core.tree import Body, Tree, scale
from lilliput.submodel import Combine, Slice, reduce


@dataclass(frozen=True)
class FedNova(FedAvg):
    """FedAvg of changes divided by the client's amount of work: for clients that take different numbers of steps.

    Local training is SGD, with any momentum.  compat="official" normalises BatchNorm statistics like weights, as the
    published program does.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer != "sgd" or self.optimizer_state != "reset":
            raise ValueError(
                "FedNova's normaliser is known only for SGD with a new momentum buffer in each round; set "
                "optimizer=sgd and optimizer_state=reset"
            )

    def round(self, state: Body, fleet: Fleet) -> Body:
        slices = {c: self.slice(fleet, c) for c in fleet.sample(self.cohort)}
        sliced = not all(part.is_full for part in slices.values())
        if sliced and self.compat == "official":
            raise ValueError("the published FedNova knows whole models only; leave compat=official or slice= out")
        normalizer = _Normalizers(self.combine, state["params"]) if sliced else self.combine.over(None)
        replies = fleet.call(self.train, each=lambda c: model_for(slices[c], state), to=list(slices))
        sums = reduce(replies, slices, **model_sums(self.combine, state), normalizer=normalizer)
        tau = sums["normalizer"]
        if sliced:
            delta = {name: (tau[name] * d).to(d.dtype) for name, d in sums["delta"].items()}
            return {**state, **advance(self.combine, state, {**sums, "delta": delta})}
        if self.compat == "official" and "buffer_delta" in sums:
            sums["buffer_delta"] = {n: (tau * d).to(d.dtype) for n, d in sums["buffer_delta"].items()}
        return {**state, **advance(self.combine, state, sums, step=tau)}

    @on_client(like={"delta": "params", "buffer_delta": "buffers", "normalizer": float})
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        params, state, stats = train(self, client, state, msg)
        a = stats.weight or 1.0  # without a step the delta is 0
        reply = model_reply(msg, params, stats)
        reply["delta"] = scale(reply["delta"], 1 / a)
        if self.compat == "official" and "buffer_delta" in reply:
            reply["buffer_delta"] = {n: d / a for n, d in reply["buffer_delta"].items()}
        return {**reply, "normalizer": stats.weight}, state


class _Normalizers:
    """An accumulator of tau_eff for each coordinate: the mean of a_i over the clients that hold it."""

    def __init__(self, combine: Combine, params: Tree):
        self._params, self._mean = params, combine.over(params)

    def add(self, reply: Reply, value: float, held: Slice) -> None:
        part = held.gather(self._params)
        self._mean.add(reply, {name: torch.full_like(x, value) for name, x in part.items()}, held)

    def result(self) -> Tree:
        return self._mean.result()
