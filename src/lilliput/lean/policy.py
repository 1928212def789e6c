"""Process settings that make training on a CPU faster, applied for a while, reported, and off by one switch.

Each was measured (docs/lean.md): glibc gives every large tensor back to the kernel and faults it in again unless told
otherwise, and on AMD oneDNN multiplies float32 matrices twice as fast as MKL.  On CPUs without AMX it does so in
float32: products are off by 4e-7 of their norm instead of 2.5e-7.  With AMX it would round to bfloat16 (3e-3), so there
nothing is changed.  LILLIPUT_TUNING=0 leaves everything as it is.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@contextmanager
def tuned(threads: int | None = None, large_products: bool = True) -> Iterator[dict[str, Any]]:
    """Apply the settings; yields what was done: `threads`, `malloc`, `float32_matmul`.

    threads: that torch computes with; as many as before by default.
    large_products: whether the work has float32 products of about 10 MFLOP, from where on oneDNN outweighs its cost
    per call; say False for work on a GPU, where the setting would mean TF32.
    """
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads or before[0])
    report: dict[str, Any] = {"threads": torch.get_num_threads()}
    try:
        if enabled():
            report["malloc"] = keep_freed_memory()
            if large_products and exact():
                torch.set_float32_matmul_precision("medium")
        report["float32_matmul"] = torch.get_float32_matmul_precision()
        yield report
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def enabled() -> bool:
    """Whether settings may be changed at all: the switch."""
    return os.environ.get("LILLIPUT_TUNING", "1") != "0"


@cache
def exact() -> bool:
    """Whether "medium" precision is ordinary float32 on this CPU: without AMX, oneDNN takes no bfloat16 short cut.

    False where that cannot be told.
    """
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "amx_bf16" not in flags.read_text()


@contextmanager
def fast(device: torch.device) -> Iterator[None]:
    """Float32 products through oneDNN for a few lines; nothing happens off a CPU, where the setting would mean TF32."""
    if device.type != "cpu" or not enabled() or not exact():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def keep_freed_memory() -> bool:
    """Tell glibc to keep large blocks it could return to the kernel; False where there is no glibc.

    It holds for the process: glibc cannot be asked what the setting was before.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(
        libc.mallopt(_M_TRIM_THRESHOLD, sys.maxsize & 0x7FFFFFFF)
    )
