"""`split`: a model into the device's part and the server's, decided and checked on two batches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

from torch import nn

from lilliput.fake import Fake
from lilliput.splitter.budget import Budget, latest_within
from lilliput.splitter.dividing import divide
from lilliput.splitter.names import states
from lilliput.splitter.parts import Client, Part, Server
from lilliput.splitter.places import nearest, place
from lilliput.splitter.probes import SHARED, Inputs, probes
from lilliput.splitter.trace import untouched
from lilliput.splitter.verify import verify

At = str | int | Budget
Tied = Literal["untie", "frozen", "sync"]


def split(
    model: nn.Module,
    at: At | tuple[At, At],
    *,
    example: Any = None,
    tied: Tied = "untie",
    shared: Sequence[str] = SHARED,
) -> tuple[Part, ...]:
    """Cut a model in two, by replaying its own code on both sides: (client, server), and for a U-shape a tail.

    `client(*inputs)` returns the payload, a tensor or a flat dictionary of tensors whose dimension 0 is the example;
    `server(payload)` returns what the model returns.  Parameters and buffers are called as in the model; both parts
    are copies, and the model stays as it is.

    at:      the name of the module that the server's part begins with (a unique ending of it is enough), the number of
             blocks that stay with the client, a budget (`splitter.memory`, `splitter.bytes_per_round`), or a pair of
             these for a U-shape: (client, server, tail), where the tail takes what the server returns.
    example: a batch of inputs: a tensor, a tuple of positional or a dictionary of keyword inputs.  None for models that
             say what they take: those of `transformers`, and those that begin with a convolution, linear or embedding.
    tied:    what becomes of a tensor that the model has on both sides of the cut: see `tie`.
    shared:  inputs that may travel with the activations where the server needs them; all others are private.

    Before it returns, both parts together are compared with the model on two batches of different size, in training and
    in evaluation: outputs, gradients of all parameters and buffers are equal, to the bit on a CPU.  A model on the meta
    device is cut without allocating anything, and only shapes are compared.

    Raises ValueError for an impossible cut, and names the nearest possible one.
    """
    if isinstance(at, tuple) and len(at) == 2:
        front, tail = split(model, at[1], example=example, tied=tied, shared=shared)
        client, server = split(front, at[0], example=example, tied=tied, shared=shared)
        return client, server, tail
    if tied not in ("untie", "frozen", "sync"):
        raise ValueError(f"tied is {tied!r}; choose untie, frozen or sync")
    on_meta = any(p.device.type == "meta" for p in model.parameters())
    with Fake(value=0) if on_meta else nullcontext():
        with untouched(model):
            batches = probes(model, example, tuple(shared))
        if isinstance(at, int | float | str):
            name = place(model, at, batches[0])
        else:
            name = latest_within(model, at, example, batches, tuple(shared))
        client, server = _checked(model, name, batches, tuple(shared))
    tie(model, client, server, tied)
    return client, server


def _checked(
    model: nn.Module, at: str, batches: tuple[Inputs, Inputs], shared: tuple[str, ...]
) -> tuple[Client, Server]:
    try:
        client, server = divide(model, at, batches, shared)
        verify(model, client, server, batches)
    except ValueError as error:
        other = nearest(model, at, batches, shared)
        remedy = f"; the nearest place to cut is at={other!r}" if other else ""
        raise ValueError(f"cannot cut at {at!r}: {error}{remedy}") from error
    return client, server


def tie(model: nn.Module, client: Client, server: Server, tied: Tied) -> None:
    """Apply the option for tensors that are on both sides of the cut, as an embedding is that is also the head.

    Two parts in two places cannot share memory, so that such a tensor becomes two.

    untie:  nothing keeps them together.  Each side trains its own from the same start; a warning says so and how large
            it is.
    frozen: neither is trained, so that they stay equal and nothing travels for them.
    sync:   the method that trains the parts keeps them equal: `server.tied` maps the server's names to the client's.
            The sum of both gradients is the gradient of the tied tensor, exactly; exchanging it costs one tensor each
            way per step, or one averaged tensor per round.
    """
    first: dict[int, str] = {}
    on_client = {name for name, *_ in states(client)}
    parameters = {name: x for name, x, _, kind in states(model) if kind == "_parameters"}
    for name, x in parameters.items():
        if name in on_client:
            first.setdefault(id(x), name)
    pairs = {name: first[id(x)] for name, x in parameters.items() if name not in on_client and id(x) in first}
    trained = {name: other for name, other in pairs.items() if parameters[name].requires_grad}
    client.tied = server.tied = pairs
    if tied == "frozen":
        for name, other in trained.items():
            server.get_parameter(name).requires_grad_(False)
            client.get_parameter(other).requires_grad_(False)
    elif tied == "untie" and trained:
        for name, other in trained.items():
            warnings.warn(
                f"{other} and {name} are one tensor of {parameters[name].nbytes:,} bytes; cut apart, each side has and "
                "trains its own; tied='frozen' trains neither, tied='sync' leaves it to the method to keep them equal",
                stacklevel=5,
            )
        client.tied = server.tied = {}
