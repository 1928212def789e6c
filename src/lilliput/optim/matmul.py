"""Float32 products on a CPU through oneDNN, which on AMD runs twice as fast as the default of the same wheel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch


@cache
def exact() -> bool:
    """Whether "medium" precision is ordinary float32 here: without AMX, oneDNN takes no bfloat16 short cut."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "amx_bf16" not in flags.read_text()


@contextmanager
def fast(device: torch.device) -> Iterator[None]:
    """Scoped and restored; nothing happens off a CPU, where the setting would mean TF32."""
    if device.type != "cpu" or not exact():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
