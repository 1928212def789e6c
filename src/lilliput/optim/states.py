"""Where moments live: float32, bfloat16 or 8-bit block-wise codes, read as float32 and written back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from lilliput.optim.lowbit import BLOCK, dequantise, dithered_bf16, quantise

KINDS = ("float32", "bf16", "8bit")
SMALL = 4096  # tensors below this many elements stay in float32 under 8bit: they are few, and sensitive
MAXIMA = "_absmax"
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic on states: float32, or float64 for float64 weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def layout(moments: Mapping[str, tuple[int, ...]], kind: str, dtype: torch.dtype, prefix: str = "") -> Layout:
    """Names, shapes and dtypes of the tensors that hold these moments.

    Row and column means are never compressed, nor is anything of a float64 weight.
    """
    tensors: Layout = {}
    kind = kind if dtype == torch.float32 else "float32"
    for name, shape in moments.items():
        key, size, factored = prefix + name, prod(shape), name.endswith(("_row", "_col"))
        if kind == "8bit" and size >= SMALL and not factored:
            tensors[key] = (shape, torch.uint8)
            tensors[key + MAXIMA] = ((-(-size // BLOCK),), torch.float32)
        else:
            tensors[key] = (shape, torch.bfloat16 if kind == "bf16" and not factored else dtype)
    return tensors


def allocate(tensors: Layout, device: torch.device) -> dict[str, Tensor]:
    """Zeros; the code of zero is the middle of the signed table, but a block maximum of zero makes any code zero."""
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in tensors.items()}


def moved(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy of a parameter's state on a device, every dtype kept."""
    return {name: x.detach().to(device, copy=True) if isinstance(x, Tensor) else x for name, x in state.items()}


@contextmanager
def opened(
    state: Mapping[str, Any], names: Mapping[str, object], step: int, part: slice | None = None, prefix: str = ""
) -> Iterator[dict[str, Tensor]]:
    """The moments as tensors to change in place, of the whole or of a part of the flattened state; written back after.

    A part must start at a multiple of 256.
    """
    stored = {name: _stored(state, prefix + name, part) for name in names}
    work = {name: _read(*tensors, name) for name, tensors in stored.items()}
    yield work
    for name, tensors in stored.items():
        _write(*tensors, work[name], name, step)


def _stored(state: Mapping[str, Any], key: str, part: slice | None) -> tuple[Tensor, Tensor | None]:
    codes, maxima = state[key], state.get(key + MAXIMA)
    if part is None:
        return codes, maxima
    blocks = None if maxima is None else maxima[part.start // BLOCK : -(-part.stop // BLOCK)]
    return codes.view(-1)[part], blocks


def _read(codes: Tensor, maxima: Tensor | None, name: str) -> Tensor:
    if maxima is not None:
        return dequantise(codes, maxima, signed=not name.endswith("_sq"))
    return codes.float() if codes.dtype == torch.bfloat16 else codes


def _write(codes: Tensor, maxima: Tensor | None, value: Tensor, name: str, step: int) -> None:
    if maxima is not None:
        new_codes, absmax = quantise(value, signed=not name.endswith("_sq"))
        codes.copy_(new_codes)
        maxima.copy_(absmax)
    elif codes.dtype == torch.bfloat16:
        codes.copy_(dithered_bf16(value, step) if name.endswith("_sq") else value)
