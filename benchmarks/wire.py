"""Encoding a body of 62 tensors (ResNet-18: 44.7 MB) against torch.save, safetensors and one memcpy, in one run.

    python benchmarks/wire.py [--quick] [--threads 1]

Every round runs all contenders one after the other, so that a busy machine slows them alike.  Times are medians over
rounds of this process's CPU milliseconds; ratios are to torch.save (saving) and torch.load (loading).
Prints one JSON object.  `goals` are our promises; the exit status is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import sys
import time
from collections.abc import Callable
from statistics import median

import safetensors.torch
import torch
from torch import Tensor

from lilliput import wire
from lilliput.wire import header


def resnet18() -> dict[str, Tensor]:
    """The 62 parameters of ResNet-18 with ten classes, 11.2 M float32, at random."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64)
    inputs = 64
    for stage, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            shapes |= {f"{name}.conv1.weight": (width, inputs, 3, 3)} | norm(f"{name}.bn1", width)
            shapes |= {f"{name}.conv2.weight": (width, width, 3, 3)} | norm(f"{name}.bn2", width)
            if inputs != width:
                shapes |= {f"{name}.downsample.0.weight": (width, inputs, 1, 1)} | norm(f"{name}.downsample.1", width)
            inputs = width
    shapes |= {"fc.weight": (10, 512), "fc.bias": (10,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def contenders(params: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """The jobs to time, by name; names with "save" or "load" are compared with torch's."""
    body = {"params": params, "lr": 0.1, "metrics": {"loss": 1.0, "examples": 320}}
    buffer, file = bytearray(sum(wire.nbytes(body))), io.BytesIO()
    image, official = bytes(wire.encode(body)), safetensors.torch.save(params)
    torch.save(params, file)
    source = torch.frombuffer(bytearray(image), dtype=torch.uint8)
    target = torch.empty_like(source)

    def torch_save() -> None:
        torch.save(params, io.BytesIO())

    def torch_save_reused() -> None:
        file.seek(0)
        torch.save(params, file)

    def nbytes_of_a_new_structure() -> None:
        header.layout.cache_clear()
        wire.nbytes(body)

    return {
        "memcpy": lambda: target.copy_(source),
        "save/lilliput, reused buffer": lambda: wire.encode(body, buffer),
        "save/lilliput, new buffer": lambda: wire.encode(body),
        "save/torch": torch_save,
        "save/torch, reused buffer": torch_save_reused,
        "save/safetensors": lambda: safetensors.torch.save(params),
        "load/lilliput, views": lambda: wire.decode(image),
        "load/lilliput, copy": lambda: wire.decode(image, copy=True),
        "load/torch": lambda: torch.load(io.BytesIO(file.getbuffer()), weights_only=True),
        "load/safetensors": lambda: safetensors.torch.load(official),
        "size/lilliput, out of cache": lambda: wire.nbytes(body),  # after 45 MB went through it
        "size/lilliput": lambda: wire.nbytes(body),
        "size/lilliput, new structure": nbytes_of_a_new_structure,
    }


def measure(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds per round of each job, interleaved; drops the first round."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: values[1:] for name, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="7 rounds instead of 41")
    parser.add_argument("--threads", type=int, default=1, help="torch's intra-op threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    params = resnet18()
    medians = {name: median(ms) for name, ms in measure(contenders(params), 7 if options.quick else 41).items()}
    ratios = {
        name: round(ms / medians[f"{kind}/torch"], 4)
        for name, ms in medians.items()
        if (kind := name.split("/")[0]) in ("save", "load")
    }
    goals = {
        "encode into a reused buffer <= 0.1x torch.save": ratios["save/lilliput, reused buffer"] <= 0.1,
        "nbytes <= 0.2 ms": medians["size/lilliput"] <= 0.2,
    }
    machine = {"cpu": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    report = {
        "tensors": len(params), "bytes": sum(x.nbytes for x in params.values()), "threads": options.threads, **machine,
        "cpu_ms": {name: round(ms, 3) for name, ms in medians.items()}, "ratio_to_torch": ratios, "goals": goals,
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
