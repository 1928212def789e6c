"""`split`: a model into the device's part and the server's, decided and checked on two batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lilliput.splitter.budget import Budget
from lilliput.splitter.dividing import divide
from lilliput.splitter.parts import Client, Part, Server
from lilliput.splitter.places import place
from lilliput.splitter.probes import SHARED, Inputs, probes
from lilliput.splitter.search import latest_within, nearest
from lilliput.splitter.tied import Tied, check_option, tie
from lilliput.splitter.valueless import decided
from lilliput.splitter.verify import untouched, verify

At = str | int | Budget


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
             tell what they take: those of `transformers`, and those that begin with a convolution, linear or embedding.
    tied:    what becomes of a tensor that the model has on both sides of the cut: see `Tied`.
    shared:  inputs that may travel with the activations where the server needs them; all others are private.

    Before it returns, both parts together are compared with the model on two batches of different size, in training and
    in evaluation: outputs, gradients of all parameters and buffers are equal, to the bit on a CPU.  A model on the meta
    device is cut without allocating anything, and only shapes are compared.

    Raises ValueError for a cut that cannot be, naming the nearest one that can.
    """
    if isinstance(at, tuple) and len(at) == 2:
        front, tail = split(model, at[1], example=example, tied=tied, shared=shared)
        client, server = split(front, at[0], example=example, tied=tied, shared=shared)
        return client, server, tail
    check_option(tied)
    with decided(model):
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
