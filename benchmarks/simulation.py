"""A round of federated averaging: lilliput compared with a plain hand-written loop for the same work.

    python benchmarks/simulation.py [--quick] [--check] [--models mlp cnn]

The work: 100 clients of 500 examples, 10 per round, batches of 20, one epoch, SGD: 250 steps per round.  Three
single-threaded programs run in their own processes and take turns round by round (A B C A B C ...), so that other
load on the machine affects them alike:

    loop      one resident model, autograd.grad, foreach SGD
    tuned     the loop with freed memory kept and, for the CNN, channels_last and oneDNN's matmuls
    lilliput  Experiment(FedAvg) as a user runs it, on the sequential engine, with all its checks and counts

They use the same batches in the same order from the same start, and must end with the same loss.  Results are medians
of CPU seconds per round after the first; a ratio is the median over turns.  Goals: MLP (2NN, 199 k parameters) at most
1.15 x loop, CNN (2.16 M) at most 1.10 x tuned.  A busy machine raises the MLP's ratio by a few hundredths, because its
rounds take only 0.1 s.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput import Experiment, models
from lilliput.algorithms import FedAvg
from lilliput.core.random import generator
from lilliput.data.batches import ArrayBatches
from lilliput.engines import Sequential
from lilliput.lean.policy import exact
from lilliput.tasks import Supervised

CLIENTS, COHORT, EXAMPLES, BATCH, CLASSES, LR, SEED = 100, 10, 500, 20, 10, 0.05, 0
SHAPES = {"mlp": (1, 28, 28), "cnn": (3, 32, 32)}
PROGRAMS = ("loop", "tuned", "lilliput")
GOALS = {"mlp": ("loop", 1.15), "cnn": ("tuned", 1.10)}
ROUNDS = {"mlp": (61, 41), "cnn": (11, 3)}  # in full and with --quick


def by_hand(name: str) -> nn.Module:
    """The network written by hand, with lilliput's parameters in the same order."""
    if name == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, CLASSES)
        )
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 8 * 8, 512), nn.ReLU(), nn.Linear(512, CLASSES),
    )  # fmt: skip


def example_data(name: str) -> list[tuple[Tensor, Tensor]]:
    """Each client's images (500, C, H, W) uint8 and labels (500,): a pattern per class under noise."""
    rng = torch.Generator().manual_seed(SEED)
    patterns = torch.rand(CLASSES, *SHAPES[name], generator=rng)
    labels = torch.randint(0, CLASSES, (CLIENTS, EXAMPLES), generator=rng)
    noise = torch.rand(EXAMPLES, *SHAPES[name], generator=rng)
    return [((255 * (0.2 * patterns[y] + 0.8 * noise)).to(torch.uint8), y) for y in labels]


def normalise(x: Tensor, _: torch.Generator | None = None) -> Tensor:
    return x.float().div_(128).sub_(1)


def cohorts(rounds: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(SEED + 1)
    return [sorted(torch.randperm(CLIENTS, generator=rng)[:COHORT].tolist()) for _ in range(rounds)]


def weights(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    return models.build(name, shape=SHAPES[name], classes=CLASSES)


def loop(name: str, rounds: int, turn: Callable[[], None], tuned: bool) -> list[Tensor]:
    """The hand-written program: returns the weights after `rounds`, and calls `turn` after each round."""
    fast = tuned and name == "cnn"
    if tuned:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30), libc.mallopt(-1, (1 << 31) - 1)
    if fast and exact():
        torch.set_float32_matmul_precision("medium")
    data, model = example_data(name), by_hand(name)
    with torch.no_grad():
        for p, q in zip(model.parameters(), weights(name).parameters(), strict=True):
            p.copy_(q)
    if fast:
        model.to(memory_format=torch.channels_last)
    params = list(model.parameters())
    current = [p.detach().clone() for p in params]
    for number, cohort in enumerate(cohorts(rounds), start=1):
        total = [torch.zeros_like(p) for p in current]
        for client in cohort:
            with torch.no_grad():
                torch._foreach_copy_(params, current)
            # The order that lilliput draws for this client in this round.
            order = torch.randperm(EXAMPLES, generator=generator(SEED, number, client, "shuffle", 0))
            x, y = (column.index_select(0, order) for column in data[client])
            for xs, ys in zip(x.split(BATCH), y.split(BATCH), strict=True):
                xs = normalise(xs)
                if fast:
                    xs = xs.to(memory_format=torch.channels_last)
                grads = torch.autograd.grad(F.cross_entropy(model(xs), ys), params)
                with torch.no_grad():
                    torch._foreach_add_(params, grads, alpha=-LR)
            with torch.no_grad():
                torch._foreach_add_(total, params, alpha=1 / COHORT)
        current = total
        turn()
    return current


class Turns:
    """A reporter that takes its turn after each round."""

    def __init__(self, turn: Callable[[], None]):
        self._turn = turn

    def start(self, experiment: Experiment, rows: list) -> None: ...

    def progress(self, round: int, done: int, total: int) -> None: ...

    def row(self, row: dict) -> None:
        self._turn()

    def end(self, rows: list) -> None: ...


def ours(name: str, rounds: int, turn: Callable[[], None]) -> list[Tensor]:
    data = {c: ArrayBatches(xy, BATCH, transform=normalise) for c, xy in enumerate(example_data(name))}
    experiment = Experiment(
        FedAvg(lr=LR, cohort=COHORT), Supervised(weights(name)), data, rounds,
        cohorts=cohorts(rounds), seed=SEED, reporters=[Turns(turn)],
    )  # fmt: skip
    return list(experiment.run(Sequential()).models["global"].params.values())


def serve(program: str, name: str, rounds: int) -> None:
    """Run one program: each line on stdin starts a round, and a line on stdout reports its CPU and wall seconds."""
    torch.set_num_threads(1)
    started = [0.0, 0.0]

    def wait() -> None:
        sys.stdin.readline()
        started[:] = time.process_time(), time.perf_counter()

    def turn() -> None:
        print(json.dumps([time.process_time() - started[0], time.perf_counter() - started[1]]), flush=True)
        wait()

    wait()
    final = ours(name, rounds, turn) if program == "lilliput" else loop(name, rounds, turn, program == "tuned")
    print(json.dumps(loss(name, final)), flush=True)


@torch.no_grad()
def loss(name: str, final: list[Tensor]) -> float:
    """The mean loss of these weights over all clients' data."""
    model, data = by_hand(name), example_data(name)
    for p, q in zip(model.parameters(), final, strict=True):
        p.copy_(q)
    return statistics.fmean(F.cross_entropy(model(normalise(x)), y).item() for x, y in data[:20])


def take_turns(name: str, rounds: int) -> Iterator[tuple[str, list[float] | float]]:
    """(program, seconds of a round) in turns, then (program, final loss)."""
    command = [sys.executable, __file__, "--rounds", str(rounds), "--models", name, "--serve"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    processes = {p: subprocess.Popen([*command, p], env=environment, **pipes) for p in PROGRAMS}  # type: ignore[call-overload]
    try:
        for _ in range(rounds + 1):
            for program, process in processes.items():
                process.stdin.write("\n")
                answer = process.stdout.readline()
                if not answer:
                    raise RuntimeError(f"{program} died; see its error above")
                yield program, json.loads(answer)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def measure(name: str, rounds: int) -> dict:
    """Medians of CPU and wall seconds per round, the ratio of the goal, and the common final loss."""
    seconds: dict[str, list] = {program: [] for program in PROGRAMS}
    for program, answer in take_turns(name, rounds):
        seconds[program].append(answer)
    losses = {program: answers.pop() for program, answers in seconds.items()}
    if max(losses.values()) - min(losses.values()) > 1e-3 * min(losses.values()):
        raise AssertionError(f"{name}: the programs did not do the same work: final losses {losses}")
    cpu, wall = (
        {program: statistics.median(times[kind] for times in answers[1:]) for program, answers in seconds.items()}
        for kind in (0, 1)
    )
    beside, goal = GOALS[name]
    ratio = statistics.median(a[0] / b[0] for a, b in zip(seconds["lilliput"][1:], seconds[beside][1:], strict=True))
    return {
        "cpu_seconds": cpu, "wall_seconds": wall, "first_round_cpu_seconds": {p: a[0][0] for p, a in seconds.items()},
        "rounds": rounds, "loss": losses, "beside": beside, "ratio": ratio, "goal": goal, "met": ratio <= goal,
    }  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    arguments.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments.add_argument("--rounds", type=int, help="rounds, of which the first does not count")
    arguments.add_argument("--serve", choices=PROGRAMS, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.serve:
        serve(options.serve, options.models[0], options.rounds)
        return
    result = {name: measure(name, options.rounds or ROUNDS[name][options.quick]) for name in options.models}
    print(json.dumps({"torch": torch.__version__, **result}, indent=2))
    sys.exit(options.check and not all(r["met"] for r in result.values()))


if __name__ == "__main__":
    main()
