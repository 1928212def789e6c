"""The server's end of split learning: steps of its part on clients' uploads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lilliput.algorithms.splitting.half import Half, Payload, gradients, plain, received
from lilliput.core import tree
from lilliput.core.fleet import Fleet, Reply
from lilliput.core.labels import counted
from lilliput.core.tree import MALFORMED, Body
from lilliput.training.step import Grads

Out = TypeVar("Out")
Wanted = Collection[str] | None


def step(
    half: Half, cut: Payload, y: Tensor, key: Sequence[object], at: Wanted = (), waits: bool = False
) -> tuple[Payload | None, float]:
    """One step of a part on activations and labels: (gradient at the activations, mean loss).

    The gradient is taken before the step, and only of the tensors that `at` names: see `slopes`.
    waits: the step waits until it is released.
    """
    slope, loss, own = half.metered([(cut, y)], partial(_step, half, cut, y, key, at, waits))
    if waits:
        half.hold(own)
    return slope, loss


def _step(
    half: Half, cut: Payload, y: Tensor, key: Sequence[object], at: Wanted, waits: bool
) -> tuple[Payload | None, float, Grads]:
    h = received(cut, half.device)
    inputs = slopes(h, at)
    loss = half.loss((h, y.to(half.device)), key)
    grads = gradients(loss, [*half.params, *inputs.values()])
    check_finite([loss.detach(), *grads])
    own, at_cut = grads[: len(half.params)], grads[len(half.params) :]
    if not waits:
        half.apply(own)
    return sloped(cut, inputs, at_cut), loss.item(), own if waits else []


def slopes(payload: Payload, at: Wanted) -> dict[str, Tensor]:
    """The tensors of a payload that need gradients, by name ("" if the payload is a tensor).

    at: their names, or None for all floats.
    """
    named = {"": payload} if isinstance(payload, Tensor) else payload
    return {n: x.requires_grad_() for n, x in named.items() if x.is_floating_point() and (at is None or n in at)}


def sloped(payload: Payload, inputs: Mapping[str, Tensor], grads: Grads) -> Payload:
    """The gradients at a payload, to send: a payload like it, without the tensors that have no gradient."""
    named = {n: g for n, g in zip(inputs, grads, strict=True) if g is not None}
    return plain(named[""] if isinstance(payload, Tensor) and named else named)


def check_finite(values: Grads) -> None:
    """Raise ValueError if a loss or a gradient is not finite."""
    present = [x for x in values if x is not None]
    if present and not torch.stack([norm.isfinite() for norm in tree.norms(present)]).all():
        raise ValueError("the loss or its gradient is not finite")


def try_client(fleet: Fleet, client: int, run: Callable[[], Out]) -> Out | None:
    """Run the server's part on a client's upload.

    If the upload does not fit, takes the client out for the round and returns None.
    """
    try:
        return run()
    except MALFORMED as error:
        fleet.fail(client, f"what it uploaded does not fit the server's part: {error}", error)
        fleet.check_quorum()
        return None


def serve(
    fleet: Fleet, server: Half, reply: Reply, at: Wanted = (), only: str | None = None, waits: bool = False
) -> tuple[Body, float] | None:
    """Take a step on each batch of a reply, in order: (gradients at the cut by batch number, mean loss).

    Returns None if the client is out, see `try_client`.  only: the number of the only batch to use.  waits: see `step`.
    """

    def run() -> tuple[Body, float]:
        out: Body = {}
        weight, total = 0, 0.0
        for number, cut in reply.body["cut"].items():
            if only is None or only == number:
                y = reply.body["labels"][number]
                out[number], loss = step(server, cut, y, server_key(fleet, reply.client, number), at, waits)
                weight, total = weight + counted(y), total + counted(y) * loss
        return out, total / max(weight, 1)

    return try_client(fleet, reply.client, run)


def server_key(fleet: Fleet, client: int, number: str) -> tuple[object, ...]:
    """The random labels of the server's forward on a client's batch."""
    return fleet.seed, fleet.round, client, "server", number


# U-shape: the device's tail computes the loss on the outputs of the server's part.


def passed(fleet: Fleet, server: Half, reply: Reply) -> Body:
    """The outputs of the server's part on the activations of a reply, by batch number."""
    cuts = reply.body["cut"].items()
    return {n: server.sent((received(x, server.device),), server_key(fleet, reply.client, n)) for n, x in cuts}


def pulled(fleet: Fleet, server: Half, first: Reply, second: Reply, waits: bool = False) -> Body:
    """A step for each gradient of the second reply; returns gradients at the activations of the first, by batch number.

    All gradients are taken at the weights of their forward, before the first step.  waits: see `step`.
    """
    own: dict[str, Grads] = {}
    out: Body = {}
    for number, cut in first.body["cut"].items():
        h = received(cut, server.device)
        inputs, gradient = slopes(h, fleet.task.differentiable), second.body["middle_gradient"][number]
        run = partial(server.pull, (h,), server_key(fleet, first.client, number), gradient, *inputs.values())
        grads = server.metered([(cut,)], run)
        check_finite(grads)
        own[number], at = grads[: len(server.params)], grads[len(server.params) :]
        out[number] = sloped(cut, inputs, at)
    for grads in own.values():
        (server.hold if waits else server.apply)(grads)
    return out


# Clipping by the norm over all parts: the server's step waits for the norm of the device's gradient.


def released(server: Half, reply: Reply) -> float:
    """Take the server's step that waits for the squared norm of the device's gradient; returns that norm."""
    squares: float = reply.body["squares"]
    server.metered([], partial(server.release, server.squares + squares))
    return squares
