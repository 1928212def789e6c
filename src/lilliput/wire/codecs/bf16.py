"""The codec bf16: half the bytes of float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lilliput.wire.codecs.base import Tensorwise, of_kinds
from lilliput.wire.image import WireError

_NOTED = {torch.float64: "float64", torch.bfloat16: "bfloat16"}
_DTYPES = {None: torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BF16(Tensorwise):
    """Sends float32 and float64 tensors as bfloat16, rounded to nearest: 8 bits of mantissa, relative error <= 2**-8.

    A note is the original dtype of a bfloat16 tensor if it was not float32: "float64", or "bfloat16" itself.
    """

    name: ClassVar[str] = "bf16"

    def narrow(self, x: Tensor, draw: torch.Generator) -> tuple[Tensor, Any]:
        coded = x.detach().to(torch.bfloat16) if x.dtype in (torch.float32, torch.float64) else x
        return coded, _NOTED.get(x.dtype)

    def widen(self, x: Tensor, note: Any) -> Tensor:
        if x.dtype is torch.bfloat16 and (note is None or isinstance(note, str)) and note in _DTYPES:
            return x.to(_DTYPES[note])
        if note is not None:
            raise WireError("'codec.bf16' has a note that it never sends")
        return x


def bf16(*kinds: str) -> BF16:
    """Rounds floats to bfloat16: half the bytes, relative error at most 2**-8; for all kinds of message or some."""
    return BF16(of_kinds(kinds))
