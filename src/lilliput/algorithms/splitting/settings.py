"""Shared by split methods: the settings of both ends, and which parts of a model's state belong to which end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lilliput.algorithms.fedavg import start
from lilliput.algorithms.splitting.checks import look
from lilliput.algorithms.splitting.half import Half
from lilliput.core.fleet import Fleet, Like, Model, Reply
from lilliput.core.tree import Body
from lilliput.splitter.task import portion
from lilliput.submodel import Combine, weighted_mean
from lilliput.training.settings import Training

# What a device uploads of its batches, by batch number.
UPLOAD: Mapping[str, Like] = {"cut": dict, "labels": dict}


@dataclass(frozen=True)
class SplitTraining(Training):
    """How both ends train: the fields of `Training` apply to the device's part and to the server's.

    optimizer_state: `keep`, as published, keeps every optimizer's state through aggregation; `reset` drops it each
                     round.
    cohort:          clients per round; None for all.
    combine:         how the clients' deltas are combined.
    clip:            in SplitFed by the norm over all parts; elsewhere by that of each end, which has its own loss.
    server_lr:       the server part's learning rate; None for that of the clients.
    server_device:   the device on which the server's part is trained.
    cut_noise:       standard deviation of the Gaussian noise that a device adds to the activations it sends, drawn for
                     each batch of a round.  An auxiliary head on the device sees them without noise.
    """

    optimizer_state: Literal["reset", "keep"] = "keep"
    cohort: int | None = None
    combine: Combine = weighted_mean()
    server_lr: float | None = None
    server_device: str = "cpu"
    cut_noise: float = 0.0
    compat: Literal["official"] | None = None

    ordered: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    split: ClassVar[bool] = True  # needs a task with a cut model

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate != 1 or self.per_layer or self.checkpointing or self.precision == "fp16":
            raise ValueError(
                "split methods step once per exchanged batch, and their devices keep no graph, so they do not support "
                "accumulate, per_layer, checkpointing and fp16; use a smaller batch, or precision=bf16"
            )
        if self.optimizer_state == "average":
            raise ValueError(
                "split methods have an optimizer at each end and do not average them; set optimizer_state=keep or reset"
            )
        if self.server_lr is not None and not self.server_lr > 0:
            raise ValueError(f"server_lr is {self.server_lr}; it must be positive")
        if not 0 <= self.cut_noise < math.inf:
            raise ValueError(f"cut_noise is {self.cut_noise}, a standard deviation; it must be 0 or more, and finite")

    def init(self, task: Any) -> Body:
        self.accept(task)
        return start(self, task)

    def accept(self, task: Any) -> None:
        """Raise ValueError if the task lacks something that the method needs."""
        if not hasattr(task, "server_part"):
            name = type(self).__name__
            raise ValueError(
                f"{name} needs a model cut in two; use the task Split(client, server) or Split.of(model, at)"
            )

    def check(self, task: Any, data: Mapping[int, Any]) -> None:
        """Raise ValueError if parts, labels and data do not fit each other; called before training."""
        self.accept(task)
        look(task, data)

    def server(self, fleet: Fleet, state: Body, role: str = "server") -> Half:
        """The server's part in training, from its params, buffers and optimizer state."""
        peak = self.server_lr or self.lr
        lr = peak * self.factor_at(fleet.round, fleet.rounds)
        # A tied parameter decays only on the device, so that the sum of both changes has the decay once.
        tied = fleet.task.tied
        return Half(fleet.task.server_part, state, self, lr, role, self.server_device, peak=peak, undecayed=tied)

    def kept(self, opt: Body) -> Body:
        """The optimizer state to keep after a round."""
        return opt if self.optimizer_state == "keep" else {}

    def one_server(self, fleet: Fleet, state: Body) -> Half:
        """The single server part in training, shared by all clients."""
        own = servers(fleet.task, state)
        if self.buffers == "local":  # the server keeps its own buffers, as a client does
            first = portion(fleet.task.server_part, fleet.task.init()).get("buffers", {})
            own["buffers"] = state.get("server_buffers", first)
        return self.server(fleet, {**own, "opt": state["server_opt"]})

    def moved(self, task: Any, state: Body, client: Body, server: Half) -> Body:
        """The state after a round: the mean of the clients' parts, and the single server part."""
        after, kinds = server.after(), [kind for kind in ("params", "buffers") if kind in state]
        whole: Body = {kind: state[kind] | client.get(kind, {}) | after[kind] for kind in kinds}
        for mine, theirs in task.tied.items():
            whole["params"][theirs] = whole["params"][theirs] + (whole["params"].pop(mine) - state["params"][theirs])
        own = {"server_buffers": after["buffers"]} if self.buffers == "local" and after["buffers"] else {}
        return {**state, **whole, "server_opt": self.kept(after["opt"]), **own}

    def models(self, state: Body, fleet: Fleet) -> dict[str, Model]:
        return {"global": Model(state["params"], buffers=state.get("buffers"))}


def check_order(order: str) -> None:
    """Raise ValueError if the order of the server's steps is unknown."""
    if order not in ("sequential", "interleaved"):
        raise ValueError(f"order is {order!r}; choose sequential or interleaved")


# Which parts of a model's state belong to which end.


def servers(task: Any, state: Body) -> Body:
    """The state of the server's part, with copies of the parameters that are tied to the device's."""
    own = portion(task.server_part, state)
    return {**own, "params": own["params"] | {mine: state["params"][theirs] for mine, theirs in task.tied.items()}}


def devices(task: Any, state: Body) -> Body:
    """`params` and `buffers` of the device's parts."""
    parts = [portion(part, state) for part in task.on_device.values()]
    kinds = [kind for kind in ("params", "buffers") if any(kind in part for part in parts)]
    return {kind: {n: x for part in parts for n, x in part.get(kind, {}).items()} for kind in kinds}


def down(task: Any, own: Body) -> Body:
    """The message with a device's parts; parameters tied to the server's are under the key `tied`."""
    tied = {n: own["params"][n] for n in task.tied.values()}
    return {**own, "params": {n: x for n, x in own["params"].items() if n not in tied}, "tied": tied} if tied else own


def joined(replies: Iterable[Reply]) -> Iterator[Reply]:
    """Replies whose `delta` includes the change of parameters tied to the server's."""
    for reply in replies:
        body = dict(reply.body)
        delta = {**body["delta"], **body.pop("tied_delta", {})}
        yield Reply(reply.client, {**body, "delta": delta}, reply.weight, reply.metrics)
