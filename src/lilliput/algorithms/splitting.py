"""What split learning's methods share: settings of both ends, a client's round by batch number, the server's steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lilliput.algorithms.fedavg import model_reply, start
from lilliput.algorithms.half import Half, gradients, plain
from lilliput.fleet import Client, Fleet, Model, Reply
from lilliput.local import Stats, round_batches
from lilliput.submodel import Combine, weighted_mean
from lilliput.tasks.split import portion
from lilliput.tasks.supervised import count, labels, to_device
from lilliput.training import Training, factor
from lilliput.tree import Body, Tree


@dataclass(frozen=True)
class SplitTraining(Training):
    """How both ends train: the fields of `Training` hold for the device's part and for the server's.

    optimizer_state: every optimizer keeps its state through aggregation, as published; `reset` drops it each round.
    cohort:          clients per round; all of them for None.
    combine:         how the clients' deltas become one.
    server_lr:       the server part's learning rate; that of the clients for None.
    server_device:   where the server part is trained.
    """

    optimizer_state: Literal["reset", "keep"] = "keep"
    cohort: int | None = None
    combine: Combine = weighted_mean()
    server_lr: float | None = None
    server_device: str = "cpu"
    compat: Literal["official"] | None = None

    ordered: ClassVar[bool] = False
    pooled: ClassVar[bool] = False

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
    """Stage the model that a round starts from: `model` will change, `start` stays for the delta."""
    first: Body = {kind: msg[kind] for kind in ("params", "buffers") if kind in msg}
    model: Body = {"buffers": {}, **first, "opt": state.get("opt", {})}
    if config.buffers == "local":
        model["buffers"] = state.get("buffers") or client.task.client_part.init()["buffers"]
    return {**state, "model": model, "start": first, "next": 0, "examples": 0, "loss": 0.0}


def client_half(config: SplitTraining, client: Client, state: Body, trains: bool = True) -> Half:
    """The device's part as the last call left it, with its optimizer if it is to be trained."""
    lr, held = config.lr_at(client.round, client.rounds), state["model"]
    return Half(client.task.client_part, held if trains else {**held, "opt": {}}, config, lr, "train", client.device)


def sent(config: SplitTraining, client: Client, state: Body, numbers: range) -> tuple[Body, Body]:
    """Activations and labels of these batches, and the state after their forward."""
    half = client_half(config, client, state, trains=False)
    batches = dict(zip(numbers, take(client, config, numbers), strict=True))
    reply = {
        "cut": {str(n): half.cut(batch, key_of(client, n)) for n, batch in batches.items()},
        "labels": {str(n): plain(labels(batch)) for n, batch in batches.items()},
    }
    return reply, {**state, "model": {**state["model"], "buffers": half.buffers()}}


def seen(state: Body, batches: Iterable[Any], loss: Tensor | float) -> Body:
    """The round's tally with these batches, whose mean loss this is, added."""
    examples = sum(count(batch) for batch in batches)
    return {"examples": state["examples"] + examples, "loss": state["loss"] + examples * loss}


def end(config: SplitTraining, state: Body) -> tuple[Body, Body]:
    """What goes up at the end of a round, and the state that outlives it."""
    model, examples = state["model"], state["examples"]
    metrics = {"loss": float(state["loss"]) / examples} if examples else {}
    reply = model_reply(state["start"], model["params"], Stats(state["next"], examples, metrics, model["buffers"]))
    staged = ("model", "start", "next", "examples", "loss", "opened", "opt")
    kept = {name: x for name, x in state.items() if name not in staged}
    if config.optimizer_state == "keep":
        kept["opt"] = model["opt"]
    if config.buffers == "local":
        kept["buffers"] = model["buffers"]
    return reply, kept


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


def step(server: Half, cut: Tensor, y: Tensor, key: Sequence[object], back: bool) -> tuple[Tensor | None, float]:
    """One step of the server's part on uploaded activations and labels: (gradient at the cut, mean loss).

    The gradient is taken before the step, and only if it is to go `back`.
    """
    return server.metered([(cut, y)], partial(_step, server, cut, y, key, back))


def _step(server: Half, cut: Tensor, y: Tensor, key: Sequence[object], back: bool) -> tuple[Tensor | None, float]:
    # A copy: what came over the wire may lie at any address, and matrix products round by alignment.
    h = cut.detach().to(server.device, copy=True).requires_grad_(back)
    loss = server.loss((h, y.to(server.device)), key)
    grads = gradients(loss, [*server.params, h] if back else server.params)
    if not torch.stack([x.float() for x in (loss.detach(), *torch._foreach_norm(grads))]).isfinite().all():
        raise ValueError("the loss or its gradient is not finite")
    server.apply(grads[: len(server.params)])
    return (plain(grads[-1]) if back else None), loss.item()


def serve(
    fleet: Fleet, server: Half, reply: Reply, back: bool = False, only: str | None = None
) -> tuple[Tree, float] | None:
    """Step on what a reply uploads, in its order: (gradients at the cut by batch number, mean loss).

    A client whose upload does not fit the server's part is out for the round, and None is returned.
    """
    out: Tree = {}
    losses: list[tuple[int, float]] = []
    try:
        for number, cut in reply.body["cut"].items():
            if only is None or only == number:
                y = reply.body["labels"][number]
                key = (fleet.seed, fleet.round, reply.client, "server", number)
                gradient, loss = step(server, cut, y, key, back)
                losses.append((len(y), loss))
                if gradient is not None:
                    out[number] = gradient
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        fleet.fail(reply.client, f"what it uploaded does not fit the server's part: {error}", error)
        fleet.check_quorum()
        return None
    examples = sum(n for n, _ in losses)
    return out, sum(n * loss for n, loss in losses) / max(examples, 1)
