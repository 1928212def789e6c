"""The interface of codecs, chains of codecs, and codecs that code tensor by tensor.

A coded body has the top-level keys of the original, so that bytes still count by kind, and one more key with its
codec's notes.  Keys that begin with "codec." belong to codecs: in a coded body, and in the client state, where an
engine stores what a codec must remember.  A codec selects tensors by their top-level key (a delta or a broadcast of
parameters) and by dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lilliput.core import random
from lilliput.core.tree import Body
from lilliput.wire.image import WireError

PREFIX = "codec."
GROUPS = {
    "activations": ("cut", "gradient"),
    "models": ("params", "buffers", "delta", "buffer_delta", "auxiliary", "auxiliary_delta"),
}


class Codec(Protocol):
    """A codec has no state: equal arguments give equal bodies, in any process."""

    def encode(self, body: Body, key: tuple[object, ...]) -> Body:
        """The coded body.

        A codec that draws uses `random.generator(*key)`.  The key is (run seed, round, client, call, direction), so
        that every message has its own draws, and they do not depend on the order of messages.
        """
        ...

    def decode(self, body: Body) -> Body:
        """A body with the names, shapes and dtypes of the original.

        Does not trust `body`: raises WireError if it is not one that `encode` makes.
        """
        ...


@dataclass(frozen=True)
class Chain:
    """Applies codecs in turn; without codecs it is the identity."""

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
    """A codec that encodes by each of `codecs` in turn, and decodes in reverse."""
    return Chain(codecs)


def of_kinds(kinds: Iterable[str]) -> frozenset[str] | None:
    """The top-level keys of `kinds`, which are keys or names of GROUPS; None, which means all keys, without kinds."""
    return frozenset(key for kind in kinds for key in GROUPS.get(kind, (kind,))) or None


@dataclass(frozen=True)
class Tensorwise(ABC):
    """A codec that codes tensors one by one.

    kinds: the top-level keys whose tensors it codes; None for all but other codecs' keys.

    The key "codec.<name>" holds the notes that decoding needs, nested like the body.
    """

    kinds: frozenset[str] | None = None

    name: ClassVar[str]

    @abstractmethod
    def narrow(self, x: Tensor, draw: torch.Generator) -> tuple[Tensor, Any]:
        """(the coded tensor, its note); the note is None if decoding needs none."""

    @abstractmethod
    def widen(self, x: Tensor, note: Any) -> Tensor:
        """The decoded tensor.  Raises WireError for a note that `narrow` never writes."""

    def encode(self, body: Body, key: tuple[object, ...] = ()) -> Body:
        if self._mark in body:
            raise ValueError(
                f"the body has a key {self._mark!r}, which belongs to the codec; rename it, or apply {self.name} once"
            )
        chosen = {name: value for name, value in body.items() if self._codes(name)}
        coded, notes = self._narrowed(chosen, random.generator(*key))
        return {**{name: coded.get(name, value) for name, value in body.items()}, self._mark: notes}

    def decode(self, body: Body) -> Body:
        if not isinstance(notes := body.get(self._mark), Mapping):
            raise WireError(
                f"the body has no {self._mark!r} and so was not coded by {self.name}; use the same codec on both sides"
            )
        chosen = {name: value for name, value in body.items() if self._codes(name)}
        decoded = self._widened(chosen, notes)
        return {name: decoded.get(name, value) for name, value in body.items() if name != self._mark}

    @property
    def _mark(self) -> str:
        return PREFIX + self.name

    def _codes(self, name: str) -> bool:
        return not name.startswith(PREFIX) and (self.kinds is None or name in self.kinds)

    def _narrowed(self, body: Mapping[str, Any], draw: torch.Generator) -> tuple[Body, Body]:
        coded, notes = dict(body), {}
        for name, value in body.items():
            note: Any = None
            if isinstance(value, Mapping):
                coded[name], note = self._narrowed(value, draw)
            elif isinstance(value, Tensor):
                coded[name], note = self.narrow(value, draw)
            if note:
                notes[name] = note
        return coded, notes

    def _widened(self, body: Mapping[str, Any], notes: Any) -> Body:
        if not isinstance(notes, Mapping) or not notes.keys() <= body.keys():
            raise WireError(f"{self._mark!r} does not fit the body that it came with")
        return {name: self._one(value, notes.get(name)) for name, value in body.items()}

    def _one(self, value: Any, note: Any) -> Any:
        if isinstance(value, Mapping):
            return self._widened(value, {} if note is None else note)
        if isinstance(value, Tensor):
            return self.widen(value, note)
        if note is not None:
            raise WireError(f"{self._mark!r} has a note on something that is not a tensor")
        return value
