"""What a run's numbers depend on besides its settings: versions, commit and hardware."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "numpy", "safetensors", "rich", "pyyaml", "scikit-learn", "flwr-datasets", "datasets", "transformers",
    "hydra-core", "hydra-zen", "hydra-joblib-launcher", "matplotlib", "tensorboard", "wandb",
)  # fmt: skip


def version(package: str) -> str | None:
    """The installed version of a distribution, None if it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Versions, commit and hardware as `environment.json` holds them."""
    from lilliput import __version__

    installed = {name: v for name in PACKAGES if (v := version(name))}
    versions = {"lilliput": __version__, "python": platform.python_version(), **installed}
    return {"versions": versions, "commit": commit(), "hardware": hardware()}


def commit(folder: Path | None = None) -> str | None:
    """The git commit of lilliput's own checkout, `-dirty` if files differ from it; None outside a checkout."""
    root = folder or Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes, and accelerators."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": cores(),
        "memory_bytes": memory()[0],
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> tuple[int | None, int | None]:
    """Bytes of main memory, all and free; None where the system does not tell."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page
    except (ValueError, OSError, AttributeError):
        return None, None
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
        return total, int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return total, None


def free_disk(folder: Path) -> int:
    """Bytes free where a folder lies, or would lie."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
