"""States in fewer bits: bfloat16, and 8-bit block-wise codes (Dettmers et al., ICLR 2022, arXiv 2110.02861).

A block of 256 numbers keeps the largest magnitude in float32 and each number as the nearest of 256 fixed fractions of
it: 1 + 4/256 bytes per number.  The nearest code is looked up by the fraction's float16 bits, which is fifty times
faster than a search and moves a number only when it lies within 2^-11 of the middle between two codes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 256
PERIOD = 2**16  # thresholds between two neighbouring bfloat16 numbers, in float32's last 16 bits
GOLDEN = 40503  # PERIOD / golden ratio, odd: its multiples are equidistributed modulo PERIOD


@cache
def codebook(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 fractions, ascending: per decade 10^(i-6), the middles of 2^i (unsigned 2^(i+1)) parts of [0.1, 1]."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (i + (not signed)) + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)).tolist()
        values += middles + [-x for x in middles] * signed
    return torch.tensor(sorted(values), dtype=torch.float64).float().to(device)


@cache
def _nearest(signed: bool, device: torch.device) -> Tensor:
    """The code of every float16, by its bits."""
    table = codebook(signed)
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16).float().nan_to_num(0.0)
    return torch.bucketize(halves, (table[1:] + table[:-1]) / 2).to(torch.uint8).to(device)


def quantise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8, x's shape) and block maxima (float32, one per 256 numbers, the last block may be short)."""
    blocks = _blocks(x.reshape(-1))
    absmax = blocks.abs().amax(1)
    fractions = (blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).half()
    bits = fractions.view(-1)[: x.numel()].view(torch.uint16).long()
    return _nearest(signed, x.device).index_select(0, bits).view(x.shape), absmax


def dequantise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The float32 numbers that codes and block maxima stand for."""
    values = codebook(signed, codes.device).index_select(0, codes.reshape(-1).long())
    blocks = _blocks(values).mul_(absmax.unsqueeze(1))
    return blocks.view(-1)[: codes.numel()].view(codes.shape)


def _blocks(x: Tensor) -> Tensor:
    short = -x.numel() % BLOCK
    return (torch.nn.functional.pad(x, (0, short)) if short else x).view(-1, BLOCK)


def dithered_bf16(x: Tensor, step: int) -> Tensor:
    """x in bfloat16, rounded up or down by a threshold that sweeps [0, 1) evenly over elements and over steps.

    Rounding to nearest would freeze a second moment: with b2 = 0.999 its decay is below bfloat16's resolution.  This is
    right on average, as stochastic rounding is, and needs no generator.
    """
    threshold = (_weyl(x.device) + step * 25_717 % PERIOD).bitwise_and_(PERIOD - 1)
    count = x.numel()
    tiled = threshold[:count] if count <= PERIOD else threshold.repeat(-(-count // PERIOD))[:count]
    bits = x.float().view(torch.int32).add(tiled.view(x.shape)).bitwise_and_(-PERIOD)
    return bits.view(torch.float32).bfloat16()


@cache
def _weyl(device: torch.device) -> Tensor:
    return (torch.arange(PERIOD, dtype=torch.int32) * GOLDEN).bitwise_and_(PERIOD - 1).to(device)
