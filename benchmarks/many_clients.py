"""CPU seconds of a round as the fleet grows and the cohort stays the same.

    python benchmarks/many_clients.py [--quick]

Fleets of 100, 10,000 and 100,000 registered clients, cohorts of 50, one batch of 20 each, the MLP of simulation.py, on
the sequential engine.  The fleets take turns, so that other load on the machine affects them alike.  Results are
medians of the CPU seconds of a round after the first; the goal is at most 1.5 times the smallest fleet's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch

from lilliput import Experiment, models
from lilliput.algorithms import FedAvg, Scaffold
from lilliput.core.fleet import Profile
from lilliput.data.batches import ArrayBatches
from lilliput.tasks import Supervised

FLEETS, COHORT, EXAMPLES, GOAL = (100, 10_000, 100_000), 50, 20, 1.5
METHODS: dict[str, Any] = {"fedavg": FedAvg, "scaffold": Scaffold}


class Clock:
    """A reporter that records the CPU seconds between rows."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def start(self, experiment: Experiment, rows: list[Any]) -> None:
        self._last = time.process_time()

    def progress(self, round: int, done: int, total: int) -> None: ...

    def row(self, row: Any) -> None:
        now = time.process_time()
        self.seconds.append(now - self._last)
        self._last = now

    def end(self, rows: list[Any]) -> None: ...


def data(clients: int) -> dict[int, ArrayBatches]:
    """Gives every client the same 20 examples, because the measurement does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(EXAMPLES, 1, 28, 28, generator=generator), torch.randint(10, (EXAMPLES,), generator=generator)
    shared = ArrayBatches((x, y), batch_size=20)
    return dict.fromkeys(range(clients), shared)


def measured(method: str, clients: int, rounds: int, availability: float) -> list[float]:
    """CPU seconds of each round after the first."""
    clock = Clock()
    task = Supervised(models.build("mlp", shape=(1, 28, 28), classes=10))
    profile = Profile(availability=availability)
    Experiment(
        METHODS[method](cohort=COHORT, lr=0.05), task, data(clients), rounds, profiles=profile, evaluate="none",
        reporters=[clock],
    ).run("sequential")  # fmt: skip
    return clock.seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    turns, rounds = (2, 6) if options.quick else (5, 11)
    torch.set_num_threads(1)
    for method in METHODS:
        for availability in (1.0, 0.8):
            found: dict[int, list[float]] = {n: [] for n in FLEETS}
            for _ in range(turns):
                for n in FLEETS:
                    found[n] += measured(method, n, rounds, availability)
            medians = {n: statistics.median(seconds) for n, seconds in found.items()}
            for n, seconds in medians.items():
                ratio = seconds / medians[FLEETS[0]]
                over = "" if ratio <= GOAL else "  over the goal"
                label = f"{method:9} available {availability:.1f}  {n:7,} clients"
                print(f"{label}  {1000 * seconds:7.1f} ms  {ratio:5.2f}x{over}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
