"""FedAvg (McMahan et al., AISTATS 2017, alg. 1).  https://arxiv.org/abs/1602.05629

x+ = x + sum_i p_i (y_i - x), with p_i the client's share of the round's labels that count, that is of the examples if
each has one label.  With slices, each coordinate is averaged over the clients that hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lilliput.core.fleet import Client, Fleet, Model, Reply, on_client
from lilliput.core.tree import Body, Tree, add, add_, scale, sub
from lilliput.optim import MeanSubspace
from lilliput.submodel import Combine, Mean, Slice, SliceRule, Tiered, full, reduce, weighted_mean
from lilliput.tasks.carried import check_averaged
from lilliput.training.fit import Stats, fit
from lilliput.training.passes import Loss
from lilliput.training.settings import Training
from lilliput.training.step import Correction


@dataclass(frozen=True)
class FedAvg(Training):
    """Clients train the model they receive; the server adds the mean of their changes: the standard method.

    cohort:  clients per round; None for all.
    slice:   the part of the model that each client holds.
    combine: how the clients' deltas are combined.
    """

    cohort: int | None = None
    slice: SliceRule = full()
    combine: Combine = weighted_mean()
    compat: Literal["official"] | None = None

    ordered: ClassVar[bool] = False
    pooled: ClassVar[bool] = False  # True: all data are in one place, as client 0

    def init(self, task: Any) -> Body:
        return start(self, task)

    def round(self, state: Body, fleet: Fleet) -> Body:
        slices = {c: self.slice(fleet, c) for c in fleet.sample(self.cohort)}
        replies = fleet.call(self.train, each=lambda c: model_for(slices[c], state), to=list(slices))
        return {**state, **advance(self.combine, state, reduce(replies, slices, **model_sums(self.combine, state)))}

    @on_client(like={"delta": "params", "buffer_delta": "buffers"})
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        params, state, stats = train(self, client, state, msg)
        return model_reply(msg, params, stats), state

    def models(self, state: Body, fleet: Fleet) -> dict[str, Model]:
        return {"global": Model(state["params"], buffers=state.get("buffers")), **tiers(self.slice, state, fleet)}


# Shared by every method that averages models: the message down, training, the reply, and the mean.


def tiers(rule: SliceRule, state: Body, fleet: Fleet) -> dict[str, Model]:
    """The model of each tier of clients, where a slice rule has tiers: "tier 1" and so on."""
    slices: list[Slice] = rule.tiers(fleet.task.model) if isinstance(rule, Tiered) else []
    return {
        f"tier {i}": Model(part.gather(state["params"]), part, part.gather(state.get("buffers") or {}))
        for i, part in enumerate(slices, 1)
    }


def start(config: Training, task: Any) -> Body:
    """The server's initial state: `params`, and `buffers` and `projections` if they are averaged.

    Raises ValueError if the model cannot be trained, or its buffers must be averaged and have no mean.
    """
    state: Body = task.init()
    if config.buffers == "average":
        check_averaged(state["buffers"])
    else:
        state = {"params": state["params"]}
    return {**state, "projections": {}} if config.optimizer_state == "average" else state


def model_for(slice: Slice, state: Body, *more: str) -> Body:
    """The message to a client: its slice of params, buffers, projections, and of `more` trees of the model's shape."""
    shared = ("params", "buffers", "projections", *more)
    return {name: slice.gather(state[name]) for name in shared if state.get(name)}


def train(
    config: Training,
    client: Client,
    state: Body,
    msg: Body,
    corrections: Sequence[Correction] = (),
    loss: Loss | None = None,
) -> tuple[Tree, Body, Stats]:
    """Train the model of a message: (params after, client state after, stats).

    The client's state holds the optimizer's state and local buffers, under `opt` and `buffers`, if they are kept.
    """
    buffers: Any = msg.get("buffers")
    if config.buffers == "local":
        buffers = state.get("buffers") or client.task.init()["buffers"]
    before = {**state.get("opt", {}), **({"projections": msg["projections"]} if "projections" in msg else {})}
    params, opt, stats = fit(
        client, msg["params"], before, config=config, buffers=buffers, corrections=corrections, loss=loss,
    )  # fmt: skip
    kept: Body = {"opt": opt} if opt else {}
    if config.buffers == "local" and stats.buffers:
        kept["buffers"] = stats.buffers
    return params, {**state, **kept} if kept else state, stats


def model_reply(msg: Body, params: Tree, stats: Stats) -> Body:
    """The reply: the changes of params and buffers, and the metrics of training.

    Overwrites the tensors of `params` with the delta, so that a device does not hold three models to send one.
    """
    reply: Body = {"delta": add_(params, msg["params"], -1.0), "metrics": measured(stats)}
    if "buffers" in msg:
        reply["buffer_delta"] = sub(stats.buffers, msg["buffers"])
    return {**reply, "projections": stats.projections} if stats.projections else reply


def measured(stats: Stats) -> Body:
    """The metrics of a reply: the mean loss and its own metrics, the number of examples, and skipped steps."""
    left_out = {"skipped": stats.skipped} if stats.skipped else {}
    return {**stats.metrics, "examples": stats.examples, **left_out}


def model_sums(combine: Combine, state: Body) -> dict[str, Any]:
    """Accumulators: the method's combine for `delta`, and the weighted mean for everything else."""
    sums: dict[str, Any] = {"delta": combine.over(state["params"])}
    if "projections" in state:
        sums["projections"] = _Subspaces()
    if state.get("buffers"):
        sums["buffer_delta"] = Mean("labels").over(state["buffers"])
    return sums


class _Subspaces:
    """An accumulator of the mean of the clients' subspaces."""

    def __init__(self) -> None:
        self._mean = MeanSubspace()

    def add(self, reply: Reply, value: Tree, held: Slice) -> None:
        self._mean.add(value, reply.weight)

    def result(self) -> Tree:
        return self._mean.result()


def advance(combine: Combine, state: Body, sums: dict[str, Any], step: float = 1.0) -> Body:
    """The model after the round: params plus `step` times the combined delta, and buffers plus their mean change."""
    delta = combine.finished(sums["delta"] if step == 1.0 else scale(sums["delta"], step))
    moved: Body = {"params": add(state["params"], delta)}
    if "buffer_delta" in sums:
        moved["buffers"] = add(state["buffers"], sums["buffer_delta"])
    if "projections" in sums:
        moved["projections"] = sums["projections"]
    return moved
