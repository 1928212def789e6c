"""Split learning: the cost of a cut model compared with the whole model.

    python benchmarks/split.py [--quick] [--check] [--models resnet18 resnet20]

The work: 3 clients of 6 batches of 32 images (3, 32, 32), one epoch a round, SGD with momentum, on one thread.  The
models are cut behind layer2 (ResNet-18, with the published stem) and layer1 (ResNet-20).

    splitfed_v1   against FedAvg of the whole model plus a second forward of the device, which is needed because no
                  graph outlives a call: at most 1.1 times as long
    fsl_sage      against CSE-FSL, with the same head and q = 5, in rounds without an alignment: at most 1.05

Prints JSON: CPU seconds of a round after the first, medians over turns (A B C D A B C D ...), and medians of the ratios
of single turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lilliput import Experiment, models
from lilliput.algorithms import CseFsl, FedAvg, FslSage, SplitFedV1
from lilliput.engines import Sequential
from lilliput.lean.policy import keep_freed_memory
from lilliput.splitter import Split

CLIENTS, BATCHES, BATCH, CLASSES = 3, 6, 32, 10
TRAINING: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "optimizer_state": "keep"}
CUTS = {"resnet18": "layer3", "resnet20": "layer2"}  # the module that the server's part begins with
GOALS = {"splitfed_v1": 1.1, "fsl_sage": 1.05}
METHODS: dict[str, Any] = {
    "fedavg": FedAvg(**TRAINING),
    "splitfed_v1": SplitFedV1(**TRAINING),
    "cse_fsl": CseFsl(**TRAINING),
    "fsl_sage": FslSage(**TRAINING, align_interval=1000, align_epochs=1),
}


def task(name: str) -> Split:
    """The model cut in two, with an auxiliary head of the server's first stage."""
    torch.manual_seed(0)
    stem = {"stem": "imagenet"} if name == "resnet18" else {}
    whole = models.build(name, shape=(3, 32, 32), classes=CLASSES, **stem)
    return Split.of(whole, CUTS[name], auxiliary=1)


def data() -> dict[int, list[Any]]:
    rng = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(BATCH, 3, 32, 32, generator=rng), torch.randint(CLASSES, (BATCH,), generator=rng)

    return {c: [batch() for _ in range(BATCHES)] for c in range(CLIENTS)}


class Clock:
    """A reporter that records the CPU seconds of each round after the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def start(self, experiment: Experiment, rows: list) -> None: ...

    def progress(self, round: int, done: int, total: int) -> None: ...

    def row(self, row: dict) -> None:
        now = time.process_time()
        self.seconds.append(now - self._last)
        self._last = now

    def end(self, rows: list) -> None: ...


def second_round(method: Any, on: Split, owned: dict[int, list[Any]]) -> float:
    clock = Clock()
    Experiment(method, on, owned, rounds=2, reporters=[clock]).run(Sequential())
    return clock.seconds[1]


def forward_again(on: Split, owned: dict[int, list[Any]]) -> float:
    """CPU seconds of the device's forward over a round's batches."""
    client = on.client_part
    model = client.resident(client.init()["params"], client.init()["buffers"], "benchmark").train()
    started = time.process_time()
    with torch.no_grad():
        for batches in owned.values():
            for x, _ in batches:
                model(x.contiguous(memory_format=torch.channels_last))
    return time.process_time() - started


def measure(name: str, turns: int) -> dict[str, Any]:
    """Medians of a round's CPU seconds, and the ratios of the goals."""
    on, owned = task(name), data()
    programs: dict[str, Callable[[], float]] = {
        label: lambda method=method: second_round(method, on, owned) for label, method in METHODS.items()
    }
    programs["forward"] = lambda: forward_again(on, owned)
    seconds: dict[str, list[float]] = {label: [] for label in programs}
    for _ in range(turns):
        for label, run in programs.items():
            seconds[label].append(run())
    rows = [dict(zip(seconds, turn, strict=True)) for turn in zip(*seconds.values(), strict=True)]
    ratios = {
        "splitfed_v1": statistics.median(r["splitfed_v1"] / (r["fedavg"] + r["forward"]) for r in rows),
        "fsl_sage": statistics.median(r["fsl_sage"] / r["cse_fsl"] for r in rows),
    }
    goals = {
        label: {"ratio": round(r, 3), "most": GOALS[label], "met": r <= GOALS[label]} for label, r in ratios.items()
    }
    return {"cpu_seconds": {label: round(statistics.median(x), 4) for label, x in seconds.items()}, **goals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--models", nargs="+", choices=CUTS, default=list(CUTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    result = {name: measure(name, 3 if options.quick else 9) for name in options.models}
    print(json.dumps({"torch": torch.__version__, **result}, indent=2))
    sys.exit(options.check and not all(row[goal]["met"] for row in result.values() for goal in GOALS))


if __name__ == "__main__":
    main()
