"""Tensors that the model has under several names, on both sides of the cut: an embedding that is also the head.

Two parts in two places cannot share memory, so the tensor becomes two.  What then keeps them together is stated:

untie:  nothing.  Each side trains its own from the same start; a warning says so and how large it is.
frozen: neither is trained, so that they stay equal and nothing travels for them.
sync:   whoever trains the parts keeps them equal: `server.tied` maps the server's names to the client's.  The sum of
        both gradients is the gradient of the tied tensor, exactly; exchanging it costs one tensor each way per step,
        or one averaged tensor per round.
"""

from __future__ import annotations

import warnings
from typing import Literal

from torch import nn

from lilliput.splitter.parts import Client, Server
from lilliput.splitter.trace import states

Tied = Literal["untie", "frozen", "sync"]


def check_option(tied: str) -> None:
    """Raise ValueError for an option that there is not."""
    if tied not in ("untie", "frozen", "sync"):
        raise ValueError(f"tied is {tied!r}; choose untie, frozen or sync")


def tie(model: nn.Module, client: Client, server: Server, tied: Tied) -> None:
    """Do as the option says with what both parts have."""
    first: dict[int, str] = {}
    mine = {name for name, *_ in states(client)}
    parameters = {name: x for name, x, _, kind in states(model) if kind == "_parameters"}
    for name, x in parameters.items():
        if name in mine:
            first.setdefault(id(x), name)
    pairs = {name: first[id(x)] for name, x in parameters.items() if name not in mine and id(x) in first}
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
