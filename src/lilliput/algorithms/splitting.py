"""What split learning's methods share: settings of both ends, a client's round by batch number, the server's steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lilliput import random, tree
from lilliput.algorithms.fedavg import model_reply, start
from lilliput.algorithms.half import Half, Payload, gradients, plain, received
from lilliput.fleet import Client, Fleet, Model, Reply
from lilliput.local import Stats, round_batches
from lilliput.submodel import Combine, weighted_mean
from lilliput.tasks.split import portion
from lilliput.tasks.supervised import count, counted, labels, to_device
from lilliput.training import Training, factor
from lilliput.tree import Body


@dataclass(frozen=True)
class SplitTraining(Training):
    """How both ends train: the fields of `Training` hold for the device's part and for the server's.

    optimizer_state: every optimizer keeps its state through aggregation, as published; `reset` drops it each round.
    cohort:          clients per round; all of them for None.
    combine:         how the clients' deltas become one.
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
        if not hasattr(task, "server_part"):
            raise ValueError(f"{type(self).__name__} needs a model cut in two; use the task Split(client, server)")
        return start(self, task)

    def server(self, fleet: Fleet, held: Body, role: str = "server") -> Half:
        """The server's part in training, from its params, buffers and optimizer state."""
        lr = (self.server_lr or self.lr) * factor(self.schedule, fleet.round, fleet.rounds)
        return Half(fleet.task.server_part, held, self, lr, role, self.server_device)

    def kept(self, opt: Body) -> Body:
        """The optimizer state that outlives a round."""
        return opt if self.optimizer_state == "keep" else {}

    def one_server(self, fleet: Fleet, state: Body) -> Half:
        """The server's part in training where there is one for all clients."""
        return self.server(fleet, {**portion(fleet.task.server_part, state), "opt": state["server_opt"]})

    def moved(self, state: Body, client: Body, server: Half) -> Body:
        """The state after a round: the clients' mean beside the one server's part."""
        after, kinds = server.after(), [kind for kind in ("params", "buffers") if kind in state]
        whole: Body = {kind: state[kind] | client.get(kind, {}) | after[kind] for kind in kinds}
        return {**state, **whole, "server_opt": self.kept(after["opt"])}

    def models(self, state: Body, fleet: Fleet) -> dict[str, Model]:
        return {"global": Model(state["params"], buffers=state.get("buffers"))}


def check_order(order: str) -> None:
    """Raise ValueError for an order that a server cannot take its steps in."""
    if order not in ("sequential", "interleaved"):
        raise ValueError(f"order is {order!r}; choose sequential or interleaved")


# The device's half.


def begin(config: SplitTraining, client: Client, state: Body, msg: Body) -> Body:
    """Stage what a round starts from: the device's `client` part will change, `start` stays for the delta."""
    client.task.halves.pop(client.id, None)
    first: Body = {kind: msg[kind] for kind in ("params", "buffers") if kind in msg}
    held: Body = {"buffers": {}, **first, "opt": state.get("opt", {})}
    if config.buffers == "local":
        held["buffers"] = state.get("buffers") or client.task.client_part.init()["buffers"]
    return {**state, "client": held, "start": first, "next": 0, "examples": 0, "weight": 0, "loss": 0.0}


def client_half(config: SplitTraining, client: Client, state: Body) -> Half:
    """The device's part as the last call left it.

    Like the epoch under way it stays with the task between calls; whoever does not have it makes it from the state.
    """
    half: Half | None = client.task.halves.get(client.id)
    if half is None or not half.is_of(state["client"]):
        lr = config.lr_at(client.round, client.rounds)
        half = Half(client.task.client_part, state["client"], config, lr, "train", client.device)
        client.task.halves[client.id] = half
    return half


def sent(config: SplitTraining, client: Client, state: Body, numbers: range) -> tuple[Body, Body]:
    """Activations and labels of these batches, and the state after their forward."""
    half = client_half(config, client, state)
    batches = dict(zip(numbers, take(client, config, numbers), strict=True))
    reply = {
        "cut": {str(n): noisy(config, client, n, half.sent(x, key_of(client, n))) for n, x in batches.items()},
        "labels": {str(n): plain(labels(batch)) for n, batch in batches.items()},
    }
    return reply, {**state, "client": half.live()}


def noisy(config: SplitTraining, client: Client, number: int, cut: Payload) -> Payload:
    """What leaves the device of a batch's activations: with `cut_noise` added to its floats."""
    if not config.cut_noise:
        return cut
    generator = random.generator(*key_of(client, number), "noise")

    def add(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator)
        return x.add(noise.to(x), alpha=config.cut_noise) if x.is_floating_point() else x

    return tree.mapped(cut, add)


def seen(state: Body, batches: Iterable[Any], loss: Tensor | float) -> Body:
    """The round's tally with these batches, whose mean loss this is, added."""
    batches = list(batches)
    weight = sum(counted(labels(batch)) for batch in batches)
    return {
        "examples": state["examples"] + sum(count(batch) for batch in batches),
        "weight": state["weight"] + weight, "loss": state["loss"] + weight * loss,
    }  # fmt: skip


def end(config: SplitTraining, client: Client, state: Body) -> tuple[Body, Body]:
    """What goes up at the end of a round, and the state that outlives it."""
    client.task.halves.pop(client.id, None)
    held, weight = plain(state["client"]), state["weight"]
    metrics = {"loss": float(state["loss"]) / weight} if weight else {}
    stats = Stats(state["next"], state["examples"], metrics, held["buffers"])
    staged = ("client", "start", "next", "examples", "weight", "loss", "opened", "opt")
    kept = {name: x for name, x in state.items() if name not in staged}
    if config.optimizer_state == "keep":
        kept["opt"] = held["opt"]
    if config.buffers == "local":
        kept["buffers"] = held["buffers"]
    return model_reply(state["start"], held["params"], stats), kept


def key_of(client: Client, number: int) -> tuple[object, ...]:
    """Names the randomness of the client's forward on a batch, whichever call it happens in."""
    return client.seed, client.round, client.id, "batch", number


def total(config: Training, client: Client) -> int:
    """Batches of the client's round, over all local epochs."""
    return config.local_steps if config.local_steps is not None else config.local_epochs * len(client.data)


class _Stream(NamedTuple):
    key: tuple
    data: Any
    numbers: range
    batches: list
    rest: Iterator


def take(client: Client, config: Training, numbers: range) -> list[Any]:
    """The batches of these numbers, in `fit`'s order over all local epochs of the round, on the client's device.

    The epoch under way stays with the task between calls, as drawing it anew costs a pass over the data.  It decides
    no number: whoever does not have it starts over and skips.
    """
    streams = client.task.streams
    key = (client.seed, client.round, config.local_epochs, config.local_steps)
    held: _Stream | None = streams.pop(client.id, None)
    if held is None or held.key != key or held.data is not client.data or held.numbers.stop > numbers.stop:
        held = _Stream(key, client.data, range(0), [], round_batches(client, config))
    if held.numbers != numbers:
        for _ in range(held.numbers.stop, numbers.start):
            next(held.rest)
        batches = [to_device(next(held.rest), client.device, client.task.client_part.model) for _ in numbers]
        held = _Stream(key, client.data, numbers, batches, held.rest)
    if numbers.stop < total(config, client):
        streams[client.id] = held
    return held.batches


# The server's half.


def step(server: Half, cut: Payload, y: Tensor, key: Sequence[object], back: bool) -> tuple[Payload | None, float]:
    """One step of the server's part on uploaded activations and labels: (gradient at the cut, mean loss).

    The gradient is taken before the step, and only if it is to go `back`.
    """
    return server.metered([(cut, y)], partial(_step, server, cut, y, key, back))


def _step(server: Half, cut: Payload, y: Tensor, key: Sequence[object], back: bool) -> tuple[Payload | None, float]:
    h = received(cut, server.device)
    inputs = slopes(h) if back else {}
    loss = server.loss((h, y.to(server.device)), key)
    grads = gradients(loss, [*server.params, *inputs.values()])
    check_finite(loss, grads)
    server.apply(grads[: len(server.params)])
    at = dict(zip(inputs, grads[len(server.params) :], strict=True))
    return (plain(at.get("", at)) if back else None), loss.item()


def slopes(payload: Payload) -> dict[str, Tensor]:
    """The tensors of a payload that gradients are taken at, by name ("" for that of a payload which is a tensor)."""
    named = {"": payload} if isinstance(payload, Tensor) else payload
    return {name: x.requires_grad_() for name, x in named.items() if x.is_floating_point()}


def check_finite(loss: Tensor, grads: list[Tensor]) -> None:
    """Raise ValueError if the loss or a gradient is not finite."""
    if not torch.stack([x.float() for x in (loss.detach(), *torch._foreach_norm(grads))]).isfinite().all():
        raise ValueError("the loss or its gradient is not finite")


def serve(
    fleet: Fleet, server: Half, reply: Reply, back: bool = False, only: str | None = None
) -> tuple[Body, float] | None:
    """Step on what a reply uploads, in its order: (gradients at the cut by batch number, mean loss).

    A client whose upload does not fit the server's part is out for the round, and None is returned.
    """
    out: Body = {}
    losses: list[tuple[int, float]] = []
    try:
        for number, cut in reply.body["cut"].items():
            if only is None or only == number:
                y = reply.body["labels"][number]
                key = (fleet.seed, fleet.round, reply.client, "server", number)
                gradient, loss = step(server, cut, y, key, back)
                losses.append((counted(y), loss))
                if gradient is not None:
                    out[number] = gradient
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        fleet.fail(reply.client, f"what it uploaded does not fit the server's part: {error}", error)
        fleet.check_quorum()
        return None
    weight = sum(n for n, _ in losses)
    return out, sum(n * loss for n, loss in losses) / max(weight, 1)
