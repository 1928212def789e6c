"""The start of a process: lilliput's import and first round, compared with importing torch.

    python benchmarks/startup.py [--quick] [--check]

Programs run in their own processes and take turns.  Goals, in CPU seconds above `import torch`: import and a first
round of federated averaging at most 0.5 from Python, and at most 1.0 from the command line.  Results are medians of CPU
and wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

FIRST_ROUND = """
import torch
import lilliput
from lilliput.algorithms import FedAvg
from lilliput.tasks import Supervised

torch.manual_seed(0)
model = lilliput.models.build("mlp", shape=(64,), classes=10)
x, y = torch.randn(10, 5, 20, 64), torch.randint(0, 10, (10, 5, 20))
data = {c: list(zip(x[c], y[c])) for c in range(10)}
rows = lilliput.Experiment(FedAvg(), Supervised(model), data, rounds=1).run().rows
assert rows[0]["clients"] == 10
"""
PYTHON = [sys.executable, "-c"]
COMMAND = [sys.executable, "-m", "lilliput", "run", "algorithm=fedavg", "model=mlp", "dataset=digits", "rounds=1"]
PROGRAMS = {
    "import torch": [*PYTHON, "import torch"],
    "import lilliput": [*PYTHON, "import lilliput, lilliput.experiment.experiment"],
    "first round, Python": [*PYTHON, FIRST_ROUND],
    "first round, command line": COMMAND,
}
GOALS = {"first round, Python": 0.5, "first round, command line": 1.0}


def seconds(command: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of a command that runs to its end in an empty folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:60]} failed:\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="three repetitions instead of nine")
    arguments.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    options = arguments.parse_args()
    for command in PROGRAMS.values():
        seconds(command)  # fills the caches of files and bytecode
    runs = [{name: seconds(command) for name, command in PROGRAMS.items()} for _ in range(3 if options.quick else 9)]
    cpu, wall = ({name: statistics.median(run[name][kind] for run in runs) for name in PROGRAMS} for kind in (0, 1))
    above = {name: cpu[name] - cpu["import torch"] for name in PROGRAMS}
    met = {name: above[name] <= goal for name, goal in GOALS.items()}
    print(json.dumps({"cpu_seconds": cpu, "wall_seconds": wall, "above": above, "goals": GOALS, "met": met}, indent=2))
    sys.exit(options.check and not all(met.values()))


if __name__ == "__main__":
    main()
