"""The cost of checkpoints: SCAFFOLD with thousands of clients that have control variates, and later rounds.

    python benchmarks/checkpoint.py [--clients 10000] [--check]

The first row writes the states of all clients, as after a first round with everyone; the others write those of a cohort
of 50.  Goal: each at most 1 second.  Results are medians of wall seconds over five checkpoints, and the files of one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lilliput.core import tree
from lilliput.experiment import checkpoint
from lilliput.wire.store import Store

SHAPES = {"0.weight": (32, 64), "0.bias": (32,), "1.weight": (10, 32), "1.bias": (10,)}  # an MLP for 8 x 8 digits
GOAL = 1.0


def control() -> dict[str, Any]:
    """A client's state: a control variate of the model's size."""
    return {"control": {name: torch.randn(shape) for name, shape in SHAPES.items()}}


def measured(folder: Path, store: Store, number: int, chosen: range) -> tuple[float, int]:
    """(seconds, files written) of a checkpoint after these clients have trained."""
    for c in chosen:
        store.put(f"client/{c}", control())
    before = {path.name for path in folder.iterdir()} if folder.exists() else set()
    fields = {"run": "benchmark", "identity": {}, "planned": 100, "round": number, "attempt": 0}
    seconds = checkpoint.save(folder, fields, {"params": control()["control"], **control()}, store)
    return seconds, len({path.name for path in folder.iterdir()} - before)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--clients", type=int, default=10_000)
    arguments.add_argument("--check", action="store_true", help="fail if a goal is missed")
    given = arguments.parse_args()
    rows = []
    for name, cohort in (("all", given.clients), ("cohort", 50)):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "checkpoint")
            store = Store(folder)
            if cohort < given.clients:
                measured(folder, store, 1, range(given.clients))
            step = cohort % given.clients  # the next cohort, or everyone again
            turns = [range(n * step, n * step + cohort) for n in range(5)]
            found = [measured(folder, store, number, turn) for number, turn in enumerate(turns, 2)]
        row = {"states": name, "clients": given.clients, "seconds": statistics.median(s for s, _ in found)}
        rows.append({**row, "files": max(n for _, n in found), "state_bytes": tree.size(control())})
        print(json.dumps(rows[-1]))
    if given.check and any(row["seconds"] > GOAL for row in rows):
        sys.exit(f"a checkpoint took more than {GOAL} s")


if __name__ == "__main__":
    main()
