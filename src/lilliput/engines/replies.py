"""Checks a reply, on the device before it is sent, and again at the server.

A failed check takes its client out, with the same message on every engine, and never ends the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lilliput import wire
from lilliput.core import tree
from lilliput.core.fleet import Like
from lilliput.core.tree import Body, size, tensors

Schema = dict[str, tuple[tuple[int, ...], torch.dtype]]

COUNTS = ("examples", "skipped")  # metrics that must not be negative


class ReplyRefused(ValueError):
    """A reply that must not be used; the message says why."""


def schemas(body: Body) -> dict[str, Schema]:
    """The schema of each tree of a message, by its key."""
    by_key = {}
    for key, value in body.items():
        if isinstance(value, Mapping) and all(isinstance(x, Tensor) for x in value.values()):
            by_key[key] = schema(value)
    return by_key


def schema(tree: Mapping[str, Tensor]) -> Schema:
    """Names, shapes and dtypes of a tree."""
    return {name: (tuple(x.shape), x.dtype) for name, x in tree.items()}


def check_returned(handler: str, out: Any) -> tuple[Body, Body]:
    """Return a handler's (reply, state).  Raises ReplyRefused if it returned anything else."""
    if not isinstance(out, tuple) or len(out) != 2 or not all(isinstance(body, Mapping) for body in out):
        raise ReplyRefused(f"{handler} must return two dicts, (reply, state)")
    return out


def sized(body: Body) -> wire.Size:
    """The size of a body.  Raises ReplyRefused if the wire cannot carry it."""
    try:
        return wire.nbytes(body)
    except ValueError as error:
        raise ReplyRefused(str(error)) from None


def check(reply: Body, like: Mapping[str, Like], sent: Mapping[str, Schema], limit: int) -> float:
    """Check a reply and return the norm of its changes.  Raises ReplyRefused if it must not be used.

    sent: the schemas of what the client was last sent in the round, by key.  limit: most bytes of the reply's tensors.
    The norm is that of the trees that are `like` others, 0 without any.
    """
    payload = size(reply)
    if payload > limit:
        raise ReplyRefused(f"the reply has {payload} bytes, more than the limit of {limit}")
    trees = [key for key, of in like.items() if _check_key(key, reply.get(key), of, sent)]
    _check_metrics(reply.get("metrics", {}))
    _check_numbers(reply)
    return _norm([x for key in trees for x in tensors(reply[key])], list(tensors(reply)))


def _check_key(key: str, value: Any, of: Like, sent: Mapping[str, Schema]) -> bool:
    """Check one key; returns whether it is a tree like another.  If the other was not sent, it may be anything."""
    if isinstance(of, type):
        _check_type(key, value, of)
        return False
    expected = sent.get(of) if isinstance(of, str) else schema(of)
    if expected is None:
        return False
    whose = "what was sent" if isinstance(of, str) else "its layers"
    if not isinstance(value, Mapping) or value.keys() != expected.keys():
        raise ReplyRefused(f"{key!r} of the reply has other names than {whose}")
    for name, (shape, dtype) in expected.items():
        x = value[name]
        if not isinstance(x, Tensor) or tuple(x.shape) != shape:
            raise ReplyRefused(f"{key!r} of the reply has another shape at {name!r} than {whose}")
        # The change of an integer counter may be real, if it is a mean.
        if x.dtype != dtype and (dtype.is_floating_point or dtype.is_complex or not x.is_floating_point()):
            raise ReplyRefused(f"{key!r} of the reply is of {x.dtype} at {name!r}, and {whose} of {dtype}")
    return True


def _check_type(key: str, value: Any, of: type) -> None:
    if of is dict:
        if not isinstance(value, Mapping):
            raise ReplyRefused(f"{key!r} of the reply is not a dict")
    elif of is bool:
        if not isinstance(value, bool):
            raise ReplyRefused(f"{key!r} of the reply is neither true nor false")
    else:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (of is float and isinstance(value, float))):
            raise ReplyRefused(f"{key!r} of the reply is not a {'whole ' if of is int else ''}number")
        if value < 0:
            raise ReplyRefused(f"{key!r} of the reply is {value}; it must not be negative")


def _check_metrics(metrics: Any) -> None:
    if not isinstance(metrics, Mapping):
        raise ReplyRefused("'metrics' of the reply is not a dict")
    for name, x in metrics.items():
        single = isinstance(x, Tensor) and x.numel() == 1 and not x.is_complex()
        if not (single or isinstance(x, int | float)):
            raise ReplyRefused(f"the metric {name!r} of the reply is not a number")
        if name in COUNTS and x < 0:
            raise ReplyRefused(f"the metric {name!r} of the reply is {float(x):g}; it must not be negative")


def _check_numbers(value: Any) -> None:
    for x in value.values():
        if isinstance(x, Mapping):
            _check_numbers(x)
        elif isinstance(x, float) and not math.isfinite(x):
            raise ReplyRefused("a number of the reply is not finite")


def _norm(some: list[Tensor], everything: list[Tensor]) -> float:
    """The norm of `some` of a reply's tensors.  Raises ReplyRefused if any tensor's norm is not finite.

    This takes one pass per tensor: a norm is finite only if every entry is.
    """
    by_id = norms(everything)
    for x, norm in by_id.values():
        if not math.isfinite(norm):
            finite = bool(tree.wide(x).isfinite().all())
            raise ReplyRefused("the reply has numbers whose squares overflow" if finite else "the reply is not finite")
    return math.hypot(*(by_id[id(x)][1] for x in some if id(x) in by_id))


def norms(every: list[Tensor]) -> dict[int, tuple[Tensor, float]]:
    """{id(tensor): (tensor, norm)} of the real and complex tensors, computed in float32 at least."""
    floats = [x for x in every if x.is_floating_point() or x.is_complex()]
    return {id(x): (x, float(norm)) for x, norm in zip(floats, tree.norms(floats), strict=True)}
