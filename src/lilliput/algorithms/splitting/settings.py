"""What split learning's methods share: the settings of both ends, and which parts of a model's state are whose."""

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

# What a device uploads of its batches, by their numbers.
UPLOAD: Mapping[str, Like] = {"cut": dict, "labels": dict}


@dataclass(frozen=True)
class SplitTraining(Training):
    """How both ends train: the fields of `Training` hold for the device's part and for the server's.

    optimizer_state: every optimizer keeps its state through aggregation, as published; `reset` drops it each round.
    cohort:          clients per round; all of them for None.
    combine:         how the clients' deltas become one.
    clip:            of the gradient of all parts together in SplitFed; elsewhere of each end's, which has its own loss.
    server_lr:       the server part's learning rate; that of the clients for None.
    server_device:   where the server part is trained.
    cut_noise:       standard deviation of the Gaussian noise that a device adds to the activations it sends, drawn for
                     each batch of a round.  An auxiliary head on the device sees them without it.
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
    split: ClassVar[bool] = True  # wants a task whose model is cut

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate != 1 or self.per_layer or self.checkpointing or self.precision == "fp16":
            raise ValueError(
                "split methods step once per exchanged batch, and their devices keep no graph anyway: accumulate, "
                "per_layer, checkpointing and fp16 are not for them; use a smaller batch, or precision=bf16"
            )
        if self.optimizer_state == "average":
            raise ValueError(
                "split methods keep or reset optimizers, one at each end; optimizer_state=average is not theirs"
            )
        if self.server_lr is not None and not self.server_lr > 0:
            raise ValueError(f"server_lr is {self.server_lr}; it must be positive")
        if not 0 <= self.cut_noise < math.inf:
            raise ValueError(f"cut_noise is {self.cut_noise}, a standard deviation; it must be 0 or more, and finite")

    def init(self, task: Any) -> Body:
        self.accept(task)
        return start(self, task)

    def accept(self, task: Any) -> None:
        """Raise ValueError for a task that lacks what the method needs."""
        if not hasattr(task, "server_part"):
            name = type(self).__name__
            raise ValueError(
                f"{name} needs a model cut in two; use the task Split(client, server) or Split.of(model, at)"
            )

    def check(self, task: Any, data: Mapping[int, Any]) -> None:
        """Raise ValueError for parts, labels and data that do not fit each other; called before a run trains."""
        self.accept(task)
        look(task, data)

    def server(self, fleet: Fleet, held: Body, role: str = "server") -> Half:
        """The server's part in training, from its params, buffers and optimizer state."""
        peak = self.server_lr or self.lr
        lr = peak * self.factor_at(fleet.round, fleet.rounds)
        # What is tied to the device's decays there: the sum of both changes holds the decay once.
        tied = fleet.task.tied
        return Half(fleet.task.server_part, held, self, lr, role, self.server_device, peak=peak, undecayed=tied)

    def kept(self, opt: Body) -> Body:
        """The optimizer state that outlives a round."""
        return opt if self.optimizer_state == "keep" else {}

    def one_server(self, fleet: Fleet, state: Body) -> Half:
        """The server's part in training where there is one for all clients."""
        own = servers(fleet.task, state)
        if self.buffers == "local":  # the server keeps its own, as a client does
            first = portion(fleet.task.server_part, fleet.task.init()).get("buffers", {})
            own["buffers"] = state.get("server_buffers", first)
        return self.server(fleet, {**own, "opt": state["server_opt"]})

    def moved(self, task: Any, state: Body, client: Body, server: Half) -> Body:
        """The state after a round: the clients' mean beside the one server's part."""
        after, kinds = server.after(), [kind for kind in ("params", "buffers") if kind in state]
        whole: Body = {kind: state[kind] | client.get(kind, {}) | after[kind] for kind in kinds}
        for mine, theirs in task.tied.items():
            whole["params"][theirs] = whole["params"][theirs] + (whole["params"].pop(mine) - state["params"][theirs])
        own = {"server_buffers": after["buffers"]} if self.buffers == "local" and after["buffers"] else {}
        return {**state, **whole, "server_opt": self.kept(after["opt"]), **own}

    def models(self, state: Body, fleet: Fleet) -> dict[str, Model]:
        return {"global": Model(state["params"], buffers=state.get("buffers"))}


def check_order(order: str) -> None:
    """Raise ValueError for an order that a server cannot take its steps in."""
    if order not in ("sequential", "interleaved"):
        raise ValueError(f"order is {order!r}; choose sequential or interleaved")


# Which parts of a model's state are whose.


def servers(task: Any, state: Body) -> Body:
    """What the server trains: its part, with a copy of what is tied to the device's."""
    own = portion(task.server_part, state)
    return {**own, "params": own["params"] | {mine: state["params"][theirs] for mine, theirs in task.tied.items()}}


def devices(task: Any, state: Body) -> Body:
    """What a device trains: `params` and `buffers` of its parts."""
    parts = [portion(part, state) for part in task.on_device.values()]
    kinds = [kind for kind in ("params", "buffers") if any(kind in part for part in parts)]
    return {kind: {n: x for part in parts for n, x in part.get(kind, {}).items()} for kind in kinds}


def down(task: Any, own: Body) -> Body:
    """The message that brings a device its parts; what is tied to the server's goes under a kind of its own."""
    tied = {n: own["params"][n] for n in task.tied.values()}
    return {**own, "params": {n: x for n, x in own["params"].items() if n not in tied}, "tied": tied} if tied else own


def joined(replies: Iterable[Reply]) -> Iterator[Reply]:
    """Replies with the change of what is tied to the server's beside that of the rest."""
    for reply in replies:
        body = dict(reply.body)
        delta = {**body["delta"], **body.pop("tied_delta", {})}
        yield Reply(reply.client, {**body, "delta": delta}, reply.weight, reply.metrics)
