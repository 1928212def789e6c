"""The last layer of an auxiliary head, and whether a head fits what it is given and what it has to give."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.core.layers import is_linear, sides
from lilliput.splitter.parts import Part, Payload, Server
from lilliput.splitter.trace import events, states
from lilliput.splitter.valueless import Undecided, moved, on_meta
from lilliput.splitter.values import tensors

LARGE = 10_000_000  # bytes of a layer that are worth a warning


def check_auxiliary(
    payload: Payload | Part, head: nn.Module, server: nn.Module | None = None, classes: int | None = None
) -> None:
    """Raise ValueError unless a head takes a payload and gives as many outputs as the server, or as there are classes.

    payload: one, or a part that `split` made; with the server's part, no `server` is needed.
    """
    server = payload if isinstance(payload, Server) else server
    given = payload.dry() if isinstance(payload, Part) else moved(payload)
    shapes = ", ".join(f"{n} {tuple(x.shape)}" if n else f"{tuple(x.shape)}" for n, x in tensors(given).items())
    try:
        logits = dry_logits(head, given)
    except Exception as error:
        raise ValueError(
            f"the auxiliary head cannot take what the device sends, {shapes}: {error}; give it an input of that width"
        ) from error
    wanted = classes or (None if server is None else dry_logits(server, given).shape[-1])
    if wanted is not None and logits.shape[-1] != wanted:
        raise ValueError(
            f"the auxiliary head gives {logits.shape[-1]} outputs where {wanted} are needed; change its last layer"
        )


def dry_logits(module: nn.Module, payload: Payload) -> Tensor:
    """What a module makes of a payload, on the meta device: of several tensors the logits, or the first."""
    return dry_run(module, payload)[1]


def dry_run(module: nn.Module, payload: Payload) -> tuple[list[tuple[str, bool]], Tensor]:
    """The same, and what was called on the way."""
    with torch.no_grad(), Undecided():
        bare = on_meta(module)
        with events(bare) as seen:
            found = tensors(bare(payload))
    return seen, found["logits"] if "logits" in found else next(iter(found.values()))


def set_last(made: nn.Module, server: Server, classes: int | None, kind: str, rank: int) -> None:
    """Put the last linear layer that a head asks for into it, in place: for other classes, of low rank, or frozen.

    Raises ValueError for a kind there is not, and where the head ends in no linear layer.
    """
    if kind not in ("full", "low_rank", "frozen"):
        raise ValueError(f"head is {kind!r}; choose full, low_rank or frozen")
    name = _last_linear(made, server.dry())
    if name is None:
        if kind != "full" or classes is not None:
            raise ValueError("the head has no linear layer at its end to change; leave head and classes as they are")
        return
    linear = made.get_submodule(name)
    width, own = sides(linear)
    outputs, bias, weight = classes or own, linear.bias is not None, linear.get_parameter("weight")
    where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if kind == "low_rank":
        low = min(rank, width, outputs)
        new: nn.Module = nn.Sequential(
            nn.Linear(width, low, bias=False, **where), nn.Linear(low, outputs, bias, **where)
        )
    elif kind == "frozen":
        new = _frozen(server, name, outputs)
    else:
        new = linear if outputs == own else nn.Linear(width, outputs, bias, **where)
        _warn_if_large(made, weight.element_size(), width, outputs, rank)
    parent, _, local = name.rpartition(".")
    setattr(made.get_submodule(parent), local, new)


def _last_linear(made: nn.Module, payload: Payload) -> str | None:
    """The linear layer that runs last and is as wide as the output."""
    seen, logits = dry_run(made, payload)
    linears = {name: m for name, m in made.named_modules() if is_linear(m)}
    last = next((name for name, entered in reversed(seen) if entered and name in linears), None)
    return last if last is not None and sides(linears[last])[1] == logits.shape[-1] else None


def _frozen(server: Server, name: str, outputs: int) -> nn.Module:
    held = dict(server.named_modules()).get(name)
    if held is None or not is_linear(held) or sides(held)[1] != outputs:
        raise ValueError(
            "head='frozen' takes the server's last linear layer as it is, and here there is none that fits"
        )
    return copy.deepcopy(held).requires_grad_(False)


def _warn_if_large(made: nn.Module, itemsize: int, width: int, outputs: int, rank: int) -> None:
    size, whole = width * outputs * itemsize, sum(x.nbytes for _, x, *_ in states(made))
    if size > LARGE and 2 * size > whole:
        small = rank * (width + outputs) * itemsize
        warnings.warn(
            f"the auxiliary's last layer has {size:,} of its {whole:,} bytes; head='low_rank' has {small:,} with "
            f"rank={rank}, and head='frozen' does not travel",
            stacklevel=4,
        )
