"""The server's time to add one client's delta of 11.2 M parameters to the round's mean, and that its memory is O(1).

    python benchmarks/aggregation.py [--quick] [--check]

Goal: at most 2.4 ms per client (the floor of 12 bytes moved per parameter is about 2.2 ms at 62 GB/s), with the same
peak memory for ten times the clients; and InCo's mix at most a tenth of averaging 50 clients.  Peers take turns in the
same run: one axpy over a flat vector, foreach over the tensors, a loop over a state dict as in hand-written programs,
and a stack with its mean.  Results are medians of CPU milliseconds, with the memory settings of a lilliput run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilliput import models
from lilliput.algorithms.inco import mix
from lilliput.core.fleet import Reply
from lilliput.core.tree import Tree
from lilliput.lean.policy import keep_freed_memory
from lilliput.submodel import reduce, weighted_mean

GOAL_MS = 2.4
COHORT = 50
MIX_SHARE = 0.1  # of a round's averaging, that InCo may take besides


def parameters() -> Tree:
    """The 11,181,642 parameters of a ResNet-18, in its 62 tensors."""
    torch.manual_seed(0)
    model = models.build("resnet18", shape=(3, 32, 32), classes=10)
    return {name: p.detach() for name, p in model.named_parameters()}


def ours(x: Tree, deltas: list[Tree]) -> Tree:
    replies = (Reply(c, {"delta": delta}, 500, {}) for c, delta in enumerate(deltas))
    return reduce(replies, delta=weighted_mean().over(x))["delta"]


def state_dict_loop(x: Tree, deltas: list[Tree]) -> Tree:
    total = {name: torch.zeros_like(p) for name, p in x.items()}
    for delta in deltas:
        for name in total:
            total[name] += delta[name] * (1 / len(deltas))
    return total


def foreach(x: Tree, deltas: list[Tree]) -> Tree:
    total = [torch.zeros_like(p) for p in x.values()]
    for delta in deltas:
        torch._foreach_add_(total, list(delta.values()), alpha=1 / len(deltas))
    return dict(zip(x, total, strict=True))


def stack(x: Tree, deltas: list[Tree]) -> Tree:
    return {name: torch.stack([delta[name] for delta in deltas]).mean(0) for name in x}


def flat_axpy(vectors: list[Tensor]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    for vector in vectors:
        total.add_(vector, alpha=1 / len(vectors))
    return total


def compare(repeats: int) -> dict[str, float]:
    """Median CPU milliseconds per client of each way; the ways alternate, and must all give the same mean."""
    x = parameters()
    distinct = [{name: torch.randn_like(p) for name, p in x.items()} for _ in range(10)]
    flat = [torch.cat([d.flatten() for d in delta.values()]) for delta in distinct]
    deltas, vectors = distinct * (COHORT // 10), flat * (COHORT // 10)  # 447 MB either way: far more than any cache
    ways: dict[str, Callable[[], Tree | Tensor]] = {
        "lilliput": lambda: ours(x, deltas),
        "flat axpy": lambda: flat_axpy(vectors),
        "foreach": lambda: foreach(x, deltas),
        "state dict loop": lambda: state_dict_loop(x, deltas),
        "stack and mean": lambda: stack(x, deltas),
    }
    expected = flat_axpy(vectors)

    def check(mean: Tree | Tensor) -> None:
        got = mean if isinstance(mean, Tensor) else torch.cat([mean[n].flatten() for n in x])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)

    return {name: found / COHORT for name, found in in_turn(ways, repeats, check).items()}


def in_turn(
    ways: dict[str, Callable[[], Any]], repeats: int, check: Callable[[Any], None] = lambda out: None
) -> dict[str, float]:
    """Median CPU milliseconds of each way; a first time does not count, and `check` of each result is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = time.process_time()
            out = way()
            seconds[name].append(time.process_time() - started)
            check(out)
    return {name: 1000 * statistics.median(values[1:]) for name, values in seconds.items()}


def peak_mib(clients: int) -> float:
    """Peak resident MiB of a process that averages the replies of this many clients as they stream in."""
    code = f"import aggregation; aggregation.stream({clients})"
    done = subprocess.run([sys.executable, "-c", code], cwd=sys.path[0], capture_output=True, text=True, check=True)
    return float(done.stdout)


def stream(clients: int) -> None:
    """Print the peak resident MiB of this process after averaging this many deltas, each made on demand."""
    keep_freed_memory()
    x = parameters()
    fresh = ({name: p.clone() for name, p in x.items()} for _ in range(clients))
    reduce((Reply(c, {"delta": d}, 500, {}) for c, d in enumerate(fresh)), delta=weighted_mean().over(x))
    # Not getrusage, whose peak a child inherits from its parent.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)


def mixing(repeats: int) -> dict[str, float]:
    """Median CPU milliseconds of InCo's mix of one change, in each mode, beside those of averaging a cohort."""
    x = parameters()
    delta = {name: 1e-3 * torch.randn_like(p) for name, p in x.items()}
    ways: dict[str, Callable[[], Tree]] = {"mean": lambda: ours(x, [delta] * COHORT)}
    ways |= {mode: partial(mix, delta, mode) for mode in ("published", "theorem", "algorithm1", "normalised")}
    return in_turn(ways, repeats)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="fewer repetitions")
    arguments.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    milliseconds = compare(2 if options.quick else 9)
    memory = {str(clients): peak_mib(clients) for clients in (10, 100)}
    model_mib = sum(p.nbytes for p in parameters().values()) / 2**20
    grown = memory["100"] - memory["10"]
    mixed = mixing(3 if options.quick else 9)
    met = {"time": milliseconds["lilliput"] <= GOAL_MS, "memory": grown < model_mib}
    met["mix"] = mixed["published"] <= MIX_SHARE * mixed["mean"]
    result = {"parameters": 11_181_642, "goal_ms": GOAL_MS, "cpu_ms_per_client": milliseconds, "peak_mib": memory,
              "cpu_ms_of_a_round": mixed}  # fmt: skip
    print(json.dumps({**result, "model_mib": model_mib, "met": met}, indent=2))
    sys.exit(options.check and not all(met.values()))


if __name__ == "__main__":
    main()
