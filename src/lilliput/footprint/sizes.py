"""Sizes of memory: how much there is, and how to write it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
USED = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def available(device: torch.device | str = "cpu") -> int | None:
    """Bytes that are free on a device now, within the limit of a container; None if the system does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = _free()
    limits = [limit - used for limit, used in ((_number(a), _number(b)) for a, b in zip(LIMITS, USED, strict=True))
              if limit is not None and used is not None]  # fmt: skip
    return min([*([free] if free is not None else []), *limits], default=None)


def _free() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _number(file: str) -> int | None:
    try:
        return int(Path(file).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def show(nbytes: float) -> str:
    """A size to three digits: 24.0 GB, 348 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(nbytes) < 999.5 or unit == "TB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:#.3g}".rstrip(".") + f" {unit}"
