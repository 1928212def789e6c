"""Codecs: they make bodies smaller at the wire, for any method; each says what it costs in precision."""

from __future__ import annotations

from collections.abc import Callable

from lilliput.core.registry import described, nearest
from lilliput.wire.codecs.base import PREFIX, Chain, Codec, chain
from lilliput.wire.codecs.bf16 import BF16, bf16
from lilliput.wire.codecs.int8 import Int8, int8

CODECS: dict[str, Callable[..., Codec]] = {
    "none": described("Sends messages unchanged", chain), "bf16": bf16, "int8": int8,
}  # fmt: skip


def build(text: str) -> Codec:
    """The codec of a text: a name such as `bf16`, with kinds such as `int8:cut:gradient`, or several joined by "+".

    `int8:activations+bf16` rounds activations and their gradients to int8 and then everything else to bfloat16.
    Raises ValueError if a name is unknown.
    """
    made = [_one(part.strip()) for part in text.split("+")]
    return made[0] if len(made) == 1 else chain(*made)


def is_built(text: str) -> bool:
    """Whether a text is for `build`: a name of CODECS with kinds, or several names."""
    return "+" in text or (":" in text and text.partition(":")[0].strip() in CODECS)


def _one(text: str) -> Codec:
    name, *kinds = text.split(":")
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}; {nearest(name, CODECS)} (joined by '+')")
    if name == "none" and kinds:
        raise ValueError(f"codec {text!r}: none changes no message of any kind; leave out {kinds[0]!r}")
    return CODECS[name](*kinds)


__all__ = ["BF16", "CODECS", "PREFIX", "Chain", "Codec", "Int8", "bf16", "build", "chain", "int8", "is_built"]
