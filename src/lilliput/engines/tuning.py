"""Process settings that make training on a CPU faster, applied for the length of a run and reported with it.

Each was measured: glibc gives every large tensor back to the kernel and faults it in again unless told otherwise, and
on CPUs without AMX oneDNN multiplies float32 matrices twice as fast as MKL with the same error.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

LARGE_MATRIX = 500_000  # elements: from here on a product with a batch outweighs oneDNN's cost per call
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@contextmanager
def tuned(task: Any, threads: int = 1) -> Iterator[dict[str, Any]]:
    """Apply the settings that suit a task; yields what was done.  LILLIPUT_TUNING=0 leaves everything as it is.

    One thread per slot is what makes all engines give the same bits.
    """
    report: dict[str, Any] = {"threads": threads}
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    try:
        if os.environ.get("LILLIPUT_TUNING", "1") != "0":
            report["malloc"] = keep_freed_memory()
            if has_large_matrix(task) and not has_amx():
                torch.set_float32_matmul_precision("medium")
        report["float32_matmul"] = torch.get_float32_matmul_precision()
        yield report
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def has_large_matrix(task: Any) -> bool:
    """Whether the task's model multiplies by matrices large enough for oneDNN to pay."""
    params = task.init().get("params", {}) if hasattr(task, "init") else {}
    return any(p.dim() == 2 and p.numel() >= LARGE_MATRIX for p in params.values())


def has_amx() -> bool:
    """Whether the CPU multiplies in bfloat16 tiles, where "medium" would change results, or cannot tell."""
    try:
        with open("/proc/cpuinfo") as info:
            return "amx_bf16" in info.read()
    except OSError:
        return True


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
