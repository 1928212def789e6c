"""The device's end of split learning: the batches of a round by number, over all calls of the method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lilliput.algorithms.fedavg import model_reply
from lilliput.algorithms.splitting.half import Half, Payload, plain
from lilliput.algorithms.splitting.settings import SplitTraining, devices
from lilliput.core import random, tree
from lilliput.core.fleet import Client
from lilliput.core.labels import count, counted, labels
from lilliput.core.tree import Body
from lilliput.splitter.task import portion
from lilliput.tasks.supervised import to_device
from lilliput.training.fit import Stats, round_batches
from lilliput.training.settings import Training


def begin(config: SplitTraining, client: Client, state: Body, msg: Body) -> Body:
    """The client state at the start of a round: the device's parts, which will change, and `start`, for the delta."""
    first: Body = {kind: msg[kind] for kind in ("params", "buffers", "tied") if kind in msg}
    whole = {"params": msg["params"] | msg.get("tied", {}), "buffers": msg.get("buffers", {})}
    if config.buffers == "local":
        whole["buffers"] = state.get("buffers") or devices(client.task, client.task.init()).get("buffers", {})
    opt, halves = state.get("opt", {}), client.task.halves
    parts = {name: {**portion(part, whole), "opt": opt.get(name, {})} for name, part in client.task.on_device.items()}
    halves[client.id] = {name: _half(config, client, name, part) for name, part in parts.items()}
    tally = {"next": 0, "examples": 0, "weight": 0, "loss": 0.0}
    return left({**state, "parts": {}, "start": first, **tally}, **halves[client.id])


def device_half(config: SplitTraining, client: Client, state: Body, name: str = "client") -> Half:
    """A part of the device as the last call left it.

    The task keeps it between calls, like the current epoch; a process without it makes it from the state.
    """
    part, halves = state["parts"][name], client.task.halves.setdefault(client.id, {})
    if name not in halves or not halves[name].is_of(part):
        halves[name] = _half(config, client, name, part)
    return halves[name]


def _half(config: SplitTraining, client: Client, name: str, state: Body) -> Half:
    lr = config.lr_at(client.round, client.rounds)
    return Half(client.task.on_device[name], state, config, lr, "train", client.device, peak=config.lr)


def left(state: Body, **halves: Half) -> Body:
    """The client state, with these parts as they are now."""
    return {**state, "parts": state["parts"] | {name: half.live() for name, half in halves.items()}}


def sent(config: SplitTraining, client: Client, state: Body, numbers: range) -> tuple[Body, Body]:
    """(reply, client state) after the forward of these batches: their activations, and labels if the server needs them.

    A batch without a label that counts is not sent, see `step.step`.
    """
    half = device_half(config, client, state)
    parts = dict(zip(numbers, take(client, config, numbers), strict=True))
    batches = {n: part.batch for n, part in parts.items() if part.counted}
    reply = {"cut": {str(n): noisy(config, client, n, half.sent(x, key_of(client, n))) for n, x in batches.items()}}
    if client.task.tail_part is None:
        reply["labels"] = {str(n): plain(labels(batch)) for n, batch in batches.items()}
    return reply, left(state, client=half)


def noisy(config: SplitTraining, client: Client, number: int, cut: Payload) -> Payload:
    """The activations of a batch with `cut_noise` added to floats, as they leave the device."""
    if not config.cut_noise:
        return cut
    generator = random.generator(*key_of(client, number), "noise")

    def add(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return x.add(torch.randn(x.shape, generator=generator).to(x), alpha=config.cut_noise)

    return tree.mapped(cut, add)


class CountedBatch(NamedTuple):
    """A batch on the client's device, and how many of its labels count."""

    batch: Any
    counted: int


def seen(state: Body, parts: Iterable[CountedBatch], loss: Tensor | float) -> Body:
    """The round's tally after adding these batches with this mean loss."""
    parts = list(parts)
    weight = sum(part.counted for part in parts)
    return {
        "examples": state["examples"] + sum(count(part.batch) for part in parts),
        "weight": state["weight"] + weight, "loss": state["loss"] + weight * loss,
    }  # fmt: skip


def end(config: SplitTraining, client: Client, state: Body) -> tuple[Body, Body]:
    """(reply, client state) at the end of a round: the parts' changes and metrics, and the state for the next round."""
    client.task.halves.pop(client.id, None)
    parts, first, weight = plain(state["parts"]), state["start"], state["weight"]
    whole = {kind: {n: x for part in parts.values() for n, x in part[kind].items()} for kind in ("params", "buffers")}
    metrics = {"loss": float(state["loss"]) / weight} if weight else {}
    stats = Stats(state["next"], state["examples"], metrics, whole["buffers"])
    tied = first.get("tied", {})
    reply = model_reply({**first, "params": first["params"] | tied}, tree.clone(whole["params"]), stats)
    if tied:
        reply["tied_delta"] = {n: reply["delta"].pop(n) for n in tied}
    staged = ("parts", "start", "next", "until", "examples", "weight", "loss", "opened", "opt")
    after = {name: x for name, x in state.items() if name not in staged}
    if config.optimizer_state == "keep":
        after["opt"] = {name: part["opt"] for name, part in parts.items()}
    if config.buffers == "local":
        after["buffers"] = whole["buffers"]
    return reply, after


def key_of(client: Client, number: int) -> tuple[object, ...]:
    """The random labels of the client's forward on a batch, the same in every call."""
    return client.seed, client.round, client.id, "batch", number


def total(config: Training, client: Client) -> int:
    """The number of batches in the client's round, over all local epochs."""
    return config.local_steps if config.local_steps is not None else config.local_epochs * len(client.data)


class _Stream(NamedTuple):
    key: tuple
    data: Any
    numbers: range
    parts: list[CountedBatch]
    rest: Iterator


def take(client: Client, config: Training, numbers: range) -> list[CountedBatch]:
    """The batches with these numbers on the client's device, in `fit`'s order over all local epochs of the round.

    The task keeps the current epoch between calls, because drawing it again costs a pass over the data.  This does not
    affect results: a process without it starts from the beginning and skips ahead.
    """
    streams = client.task.streams
    key = (client.seed, client.round, config.local_epochs, config.local_steps)
    stream: _Stream | None = streams.pop(client.id, None)
    if stream is None or stream.key != key or stream.data is not client.data or stream.numbers.stop > numbers.stop:
        stream = _Stream(key, client.data, range(0), [], round_batches(client, config))
    if stream.numbers != numbers:
        for _ in range(stream.numbers.stop, numbers.start):
            next(stream.rest)
        parts = [_part(next(stream.rest), client) for _ in numbers]
        stream = _Stream(key, client.data, numbers, parts, stream.rest)
    if numbers.stop < total(config, client):
        streams[client.id] = stream
    return stream.parts


def _part(batch: Any, client: Client) -> CountedBatch:
    # Counts labels before the batch moves, because asking a GPU would wait for it.
    n = counted(labels(batch))
    return CountedBatch(to_device(batch, client.device, client.task.client_part.model), n)
