"""`lilliput doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from lilliput.cli.machine import commit, cores, free_disk, memory, processor, version

FOR = {
    "run": "the command line's data, sweeps and figures",
    "hf": "Hugging Face models and data sets",
    "flower": "real devices through Flower",
    "ray": "a cluster through Ray",
    "wandb": "tracking by Weights & Biases",
    "export": "export to ONNX",
    "lowbit": "8-bit optimizer states",
    "dev": "tests, lint and types",
}


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    if argv:
        raise ValueError(f"doctor takes no argument, and there is {argv[0]!r}")
    for name, text in findings():
        print(f"{name:11}{text}")
    return 0


def findings() -> Iterator[tuple[str, str]]:
    """(what, how it stands) line by line."""
    import torch

    from lilliput import __version__

    at = commit()
    yield "lilliput", f"{__version__}{f' at {at[:12]}{at[40:]}' if at else ''} in {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()} in {sys.prefix}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield from _extras()
    total, free = memory()
    yield "processor", f"{processor()}, {cores()} cores"
    yield "devices", ", ".join(_devices())
    yield "memory", f"{_gb(total)}, {_gb(free)} free"
    disk = free_disk(Path("runs"))
    yield "disk", f"{_gb(disk)} free for runs/{'' if disk > 1e9 else ': that is little, a checkpoint may not fit'}"
    yield "workers", _workers()


def extras() -> dict[str, list[str]]:
    """The packages of each extra, as the installed metadata name them."""
    found: dict[str, list[str]] = {}
    try:
        required = metadata.requires("lilliput") or []
    except metadata.PackageNotFoundError:
        return {}
    for line in required:
        match = re.match(r"([\w.-]+).*extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if match and match[1] != "lilliput":
            found.setdefault(match[2], []).append(match[1])
    return found


def _extras() -> Iterator[tuple[str, str]]:
    known = extras()
    if not known:
        yield "extras", "unknown: lilliput is not installed by pip; try `pip install -e .` in its checkout"
    for extra, packages in known.items():
        missing = [package for package in packages if version(package) is None]
        what = FOR.get(extra, "")
        state = f"no {', '.join(missing)}; pip install 'lilliput[{extra}]'" if missing else "complete"
        yield f"[{extra}]", f"{state}{f'  ({what})' if what else ''}"


def _devices() -> Iterator[str]:
    import torch

    yield "cpu"
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name, size = torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory
        yield f"cuda:{i} {name} ({_gb(size)})"
    if torch.backends.mps.is_available():
        yield "mps"


def _workers() -> str:
    if "fork" not in multiprocessing.get_all_start_methods():
        return "spawned: this system has no fork, so that a run on several cores takes seconds to start"
    if platform.system() == "Darwin":
        return "forked on the CPU, although macOS's own libraries are not safe to fork; engine=sequential if one hangs"
    limit = os.environ.get("OMP_NUM_THREADS")
    threads = f"; OMP_NUM_THREADS={limit}" if limit else ""
    return f"forked on the CPU (safe here), spawned for CUDA{threads}"


def _gb(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"
