"""Eight bits with stochastic rounding (QSGD, Alistarh et al., NeurIPS 2017, https://arxiv.org/abs/1610.02132).

A block of 512 numbers is sent as its smallest number, low, a step, (largest - smallest) / 255, and a code per number:
floor((x - low) / step + u) with u uniform on [0, 1).  So low + step * code is right on average, and off by at most one
step.  A range instead of a magnitude halves the error of activations, which a ReLU leaves on one side of zero.  Blocks
of 512 cost 1.6 % and reduce the error of one range per tensor to two fifths (activations) or a sixth (gradients).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lilliput.wire.codecs.base import Tensorwise, of_kinds
from lilliput.wire.image import WireError

BLOCK = 512
LEVELS = 255
_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Int8(Tensorwise):
    """Sends floats as one byte per number and 8 bytes per block (16 for float64).

    A tensor that would not become smaller is sent unchanged.  A block that is not finite stays not finite.
    A note is {dtype: [blocks, 2]}: the tensor's dtype, and low and step of each block.
    """

    name: ClassVar[str] = "int8"

    def narrow(self, x: Tensor, draw: torch.Generator) -> tuple[Tensor, Any]:
        if x.dtype not in _NAMES or x.numel() + 2 * _wide(x.dtype).itemsize * _blocks(x) >= x.nbytes:
            return x, None
        rows = _rows(x.detach().reshape(-1).to(_wide(x.dtype)))
        low, high = rows.aminmax(dim=1, keepdim=True)
        step = (high - low) / LEVELS
        places = (rows - low) / step.clamp_min(torch.finfo(step.dtype).tiny)
        codes = places.add_(_uniform(rows, draw)).floor_().clamp_(0, LEVELS).to(torch.uint8)
        return codes.view(-1)[: x.numel()].view(x.shape), {_NAMES[x.dtype]: torch.cat([low, step], 1)}

    def widen(self, x: Tensor, note: Any) -> Tensor:
        if note is None:
            return x
        dtype, ranges = _checked(x, note)
        low, step = ranges.unbind(1)
        rows = _rows(x.reshape(-1).to(ranges.dtype))
        values = torch.addcmul(low.unsqueeze(1), rows, step.unsqueeze(1))
        return values.view(-1)[: x.numel()].view(x.shape).to(dtype)


def int8(*kinds: str) -> Int8:
    """Rounds floats stochastically to 8 bits: a quarter of the bytes, unbiased; for all kinds of message or some."""
    return Int8(of_kinds(kinds))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a block's range is computed and sent."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _blocks(x: Tensor) -> int:
    return -(-x.numel() // BLOCK)


def _rows(flat: Tensor) -> Tensor:
    """Reshape to [blocks, BLOCK]; repeats the last number to fill the last block, which does not change its range."""
    short = -len(flat) % BLOCK
    return (torch.cat([flat, flat[-1:].expand(short)]) if short else flat).view(-1, BLOCK)


def _uniform(like: Tensor, draw: torch.Generator) -> Tensor:
    """Uniform numbers, drawn on the CPU so that every device rounds alike; draws nothing for meta tensors."""
    return like if like.is_meta else torch.rand(like.shape, dtype=like.dtype, generator=draw).to(like.device)


def _checked(x: Tensor, note: Any) -> tuple[torch.dtype, Tensor]:
    """(the tensor's dtype, its blocks' ranges) from an untrusted note; raises WireError if they do not fit."""
    name, ranges = next(iter(note.items())) if isinstance(note, Mapping) and len(note) == 1 else ("", None)
    dtype = _DTYPES.get(name)
    if dtype is None or not isinstance(ranges, Tensor) or (x.dtype, x.numel() > 0) != (torch.uint8, True):
        raise WireError("'codec.int8' has a note that it never sends")
    if (ranges.dtype, tuple(ranges.shape)) != (_wide(dtype), (_blocks(x), 2)):
        raise WireError("'codec.int8' has ranges that do not fit their tensor")
    return dtype, ranges
