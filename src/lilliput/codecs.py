"""Codecs: bodies made smaller at the wire, for any method; what they cost in precision is theirs to say.

A coded body is itself a body with the same top-level keys, so that bytes still count by kind, and one more key that
says what its codec did.  Keys that begin with "codec." belong to codecs: in a coded body, and in the client state where
an engine keeps what a codec has to remember.  A codec chooses what it touches by the top-level key (a delta or a
broadcast of parameters) and by dtype.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lilliput.tree import Body
from lilliput.wire import WireError

PREFIX = "codec."


class Codec(Protocol):
    """A value without memory: equal arguments give equal bodies, in any process."""

    def encode(self, body: Body, key: tuple[object, ...]) -> Body:
        """The coded body.  A codec that draws uses `random.generator(*key)`: the key names (run seed, round, client,
        call, direction), so that no two messages round alike and none depends on the order."""
        ...

    def decode(self, body: Body) -> Body:
        """The names, shapes and dtypes that went in.  `body` is not to be trusted: raises WireError."""
        ...


@dataclass(frozen=True)
class Chain:
    """Codecs one after the other; none at all is the identity."""

    codecs: tuple[Codec, ...] = ()

    def encode(self, body: Body, key: tuple[object, ...]) -> Body:
        for place, codec in enumerate(self.codecs):
            body = codec.encode(body, (*key, place))
        return body

    def decode(self, body: Body) -> Body:
        for codec in reversed(self.codecs):
            body = codec.decode(body)
        return body


def chain(*codecs: Codec) -> Chain:
    """What encodes by each codec in turn and decodes in reverse."""
    return Chain(codecs)


@dataclass(frozen=True)
class BF16:
    """float32 and float64 tensors go as bfloat16, rounded to nearest: 8 bits of mantissa, relative error <= 2**-8.

    Under "codec.bf16" stand, nested like the body, the dtypes that bfloat16 does not return to float32: "float64", and
    "bfloat16" for tensors that had it before.
    """

    def encode(self, body: Body, key: tuple[object, ...] = ()) -> Body:
        if _BF16 in body:
            raise ValueError(f"the body has a key {_BF16!r}, which belongs to the codec; rename it, or apply bf16 once")
        coded, notes = _narrow(body)
        return {**coded, _BF16: notes}

    def decode(self, body: Body) -> Body:
        if not isinstance(notes := body.get(_BF16), Mapping):
            raise WireError(f"the body has no {_BF16!r} and so was not coded by bf16; use the same codec on both sides")
        return _widen({name: value for name, value in body.items() if name != _BF16}, notes)


def bf16() -> BF16:
    """Half the bytes of float32."""
    return BF16()


CODECS: dict[str, Callable[[], Codec]] = {"none": chain, "bf16": bf16}


def build(name: str) -> Codec:
    """The codec of a name, or the chain of names joined by "+".  Raises ValueError for an unknown one."""
    parts = [part.strip() for part in name.split("+")]
    for part in parts:
        if part not in CODECS:
            near = difflib.get_close_matches(part, CODECS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown codec {part!r}; {hint}there are {', '.join(CODECS)}, joined by '+'")
    return CODECS[parts[0]]() if len(parts) == 1 else chain(*(CODECS[part]() for part in parts))


_BF16 = PREFIX + "bf16"
_NOTED = {torch.float64: "float64", torch.bfloat16: "bfloat16"}
_DTYPES = {None: torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def _narrow(body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    coded: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    for name, value in body.items():
        note: Any = None
        if isinstance(value, Mapping):
            value, note = _narrow(value)
        elif isinstance(value, Tensor):
            note = _NOTED.get(value.dtype)
            value = value.detach().to(torch.bfloat16) if value.dtype in (torch.float32, torch.float64) else value
        coded[name] = value
        if note:
            notes[name] = note
    return coded, notes


def _widen(body: Mapping[str, Any], notes: Any) -> dict[str, Any]:
    if not isinstance(notes, Mapping) or not notes.keys() <= body.keys():
        raise WireError(f"{_BF16!r} does not fit the body that it came with")
    return {name: _widened(value, notes.get(name)) for name, value in body.items()}


def _widened(value: Any, note: Any) -> Any:
    if isinstance(value, Mapping):
        return _widen(value, {} if note is None else note)
    if isinstance(value, Tensor) and value.dtype is torch.bfloat16:
        if not (note is None or isinstance(note, str)) or note not in _DTYPES:
            raise WireError(f"{_BF16!r} names a dtype that it never sends")
        return value.to(_DTYPES[note])
    if note is not None:
        raise WireError(f"{_BF16!r} has a dtype for what is no bfloat16 tensor")
    return value
