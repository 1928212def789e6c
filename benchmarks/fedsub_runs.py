"""Federated learning in subspaces on clients whose data differ: FedSub, FedAvg and SCAFFOLD, scaled to one CPU core.

    nice python benchmarks/fedsub_runs.py --setting images --data CIFAR10 --out runs.jsonl
    nice python benchmarks/fedsub_runs.py --setting text --out runs.jsonl
    python benchmarks/fedsub_runs.py --table runs.jsonl [--setting images --figure fedsub_images.png]

images: a ResNet-20 with GroupNorm on 10,000 + 1,000 images of CIFAR-10, halved to 16 x 16 pixels; five clients, each
with two classes that nobody else has.  text: a LLaMA of two blocks over 97 characters, on the source of Python's
standard library; six clients, each with its own package.  Both: SGD, ten steps a round, FedSub at a quarter of each
layer's width with cd projections, the other parameters averaged.  Each family uses the learning rate that is best in a
shorter run of seed 0; then three seeds of weights, batches and projections run on the same data.
Each run appends a line to --out when it ends; runs with a line there are skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lilliput
from lilliput import data, models
from lilliput.algorithms import FedAvg, FedSub, Scaffold
from lilliput.core import random
from lilliput.engines.base import QuorumError
from lilliput.subspace import matched
from lilliput.tasks import Supervised
from lilliput.tasks.supervised import accuracy, perplexity

SEEDS, STEPS = (0, 1, 2), 10
# By dual, the rounds between two P.
DUALS: dict[Any, tuple[int, ...]] = {"none": (5,), "rotated": (1, 5, 20), "full": (1, 5, 20)}
METHODS: dict[str, Any] = {
    "FedAvg": FedAvg,
    "SCAFFOLD": Scaffold,
    "P = I": partial(FedSub, projection="idx", rank=1.0),
    **{f"{dual}, {n}": partial(FedSub, dual=dual, refresh=n) for dual, all_n in DUALS.items() for n in all_n},
}
DRAWN = ("FedAvg", "SCAFFOLD", "P = I", "none, 5", "rotated, 5", "full, 5")


@dataclass(frozen=True)
class Setting:
    """What the runs of a setting have in common.  `short` is the rounds of the search for learning rates."""

    metric: str
    clients: int
    batch: int
    rounds: int
    short: int
    rates: tuple[float, ...]


SETTINGS = {
    "images": Setting("accuracy", 5, 16, 56, 20, (0.01, 0.03, 0.1, 0.3, 1.0)),
    "text": Setting("perplexity", 6, 8, 16, 12, (0.03, 0.1, 0.3)),
}


def images(folder: str) -> tuple[data.Dataset, data.Federated]:
    """The first images of each class, 1,000 for training and 100 for testing, at half size; two classes per client."""
    whole = data.load("cifar10", folder=folder)

    def first(columns: Sequence[torch.Tensor], each: int) -> tuple[torch.Tensor, ...]:
        rows = torch.cat([(columns[1] == k).nonzero().flatten()[:each] for k in range(whole.classes)])
        small = torch.nn.functional.avg_pool2d(columns[0][rows].float(), 2).round().to(torch.uint8)
        return small, columns[1][rows]

    part = replace(whole, train=first(whole.train, 1000), test=first(whole.test, 100), shape=(3, 16, 16))
    about = SETTINGS["images"]
    return part, data.federate(
        part, "pathological", clients=about.clients, batch_size=about.batch, augment=None, classes_per_client=2
    )


def text() -> tuple[data.Dataset, data.Federated]:
    """The largest packages, one per client, in windows of 64 characters; up to 64 windows of each for testing."""
    whole, about = data.load("stdlib", length=64), SETTINGS["text"]
    assert whole.owners is not None and whole.test_owners is not None
    largest = whole.owners.bincount().argsort(descending=True)[: about.clients].sort().values
    mine = torch.isin(whole.owners, largest)
    rows = torch.cat([(whole.test_owners == owner).nonzero().flatten()[:: len(largest)][:64] for owner in largest])
    part = replace(
        whole, train=tuple(x[mine] for x in whole.train), test=tuple(x[rows] for x in whole.test),
        owners=torch.searchsorted(largest, whole.owners[mine]), test_owners=None, owner_names=(),
    )  # fmt: skip
    return part, data.federate(part, "natural", clients=about.clients, batch_size=about.batch)


def task(setting: str, part: data.Dataset, seed: int) -> Supervised:
    """The freshly initialised model of a seed."""
    with random.seeded(seed, "model"):
        if setting == "images":
            model = models.build("resnet20", shape=part.shape, classes=part.classes, norm="group")
            return Supervised(model, metrics={"accuracy": accuracy})
        model = models.build("llama_9m", shape=part.shape, classes=part.classes, layers=2)
        return Supervised(model, metrics={"perplexity": perplexity})


def check_targets(made: Supervised) -> None:
    """Check that most of the model is in layers that train in subspaces."""
    total = sum(p.numel() for p in made.model.parameters())
    share = sum(made.model.get_parameter(f"{layer}.weight").numel() for layer in matched(made.model)) / total
    assert share >= 0.9, f"{share:.1%} of {total} parameters are in subspace layers"


def family(method: str) -> str:
    """The family whose learning rate a method uses: a dual has one rate, however often P changes."""
    return f"{method.split(', ')[0]}, 5" if ", " in method else method


def run(known: dict[str, Any], part: data.Dataset, held: data.Federated) -> dict[str, Any]:
    """One run: the line of the results, whose curve has round, MB sent both ways with headers, and the metric.

    The curve of a run that diverged is empty.
    """
    torch.set_num_threads(1)
    about = SETTINGS[known["setting"]]
    method = METHODS[known["method"]](lr=known["lr"], local_steps=STEPS)
    began = time.process_time()
    experiment = lilliput.Experiment(
        method, task(known["setting"], part, known["seed"]), held.train, rounds=known["rounds"], test=held.test,
        seed=known["seed"], evaluate_every=2,
    )  # fmt: skip
    try:
        rows = experiment.run("sequential").rows
    except QuorumError:  # replies that are not finite
        rows = []
    sent, curve = 0.0, []
    for row in rows:
        sent += (row["up_bytes"] + row["down_bytes"] + row["overhead_bytes"]) / 1e6
        if about.metric in row:
            curve.append((row["round"], round(sent, 3), row[about.metric]))
    return {**known, "curve": curve, "cpu_seconds": round(time.process_time() - began, 1)}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of the results that are whole."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def value(setting: str, curve: Sequence[Sequence[float]], megabytes: float = math.inf) -> float:
    """The metric after this many megabytes, interpolated; NaN before the first evaluation.

    Accuracies are means of three evaluations, because they jump if clients have few classes.
    """
    over = 3 if setting == "images" else 1
    means = [statistics.fmean(v for _, _, v in curve[max(0, end - over) : end]) for end in range(1, len(curve) + 1)]
    sent = [mb for _, mb, _ in curve]
    return float(np.interp(megabytes, sent, means, left=math.nan)) if curve else math.nan


def rate(lines: Sequence[dict[str, Any]], setting: str, method: str) -> float:
    """The learning rate at which the method's family did best in the search."""
    about, sign = SETTINGS[setting], -1 if setting == "text" else 1
    found = {
        line["lr"]: sign * value(setting, line["curve"])
        for line in lines
        if (line["setting"], line["method"], line["rounds"]) == (setting, family(method), about.short)
    }
    return max((lr for lr in found if math.isfinite(found[lr])), key=lambda lr: found[lr])


def search(setting: str) -> Iterator[dict[str, Any]]:
    """The short runs of seed 0, one for each family and learning rate."""
    about = SETTINGS[setting]
    for method in dict.fromkeys(map(family, METHODS)):
        for lr in about.rates:
            yield {"setting": setting, "method": method, "seed": 0, "lr": lr, "rounds": about.short}


def runs(
    setting: str, lines: Sequence[dict[str, Any]], methods: Sequence[str], seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """The actual runs, at the learning rates that the search found."""
    for seed in seeds:
        for method in methods:
            lr = rate(lines, setting, method)
            yield {"setting": setting, "method": method, "seed": seed, "lr": lr, "rounds": SETTINGS[setting].rounds}


def cell(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation over the seeds, or the number of seeds with a value."""
    known = [v for v in values if math.isfinite(v)]
    if len(known) < len(values) or not known:
        return f"in {len(known)} of {len(values)} runs" if known else "none"
    return f"{statistics.fmean(known):{form}} ± {statistics.pstdev(known):{form}}"


def table(lines: Sequence[dict[str, Any]], setting: str) -> str:
    """In Markdown: each method after equal rounds, and after as many bytes as the cheapest method sends in all."""
    about = SETTINGS[setting]
    lines = [line for line in lines if (line["setting"], line["rounds"]) == (setting, about.rounds)]
    least = math.floor(min((line["curve"][-1][1] for line in lines if line["curve"]), default=0))
    heads = ("learning rate", "MB in all", f"{about.rounds} rounds", f"{least // 2} MB", f"{least} MB")
    out = [f"| {setting}: {about.metric} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for method in METHODS:
        own = [line for line in lines if line["method"] == method]
        total = max((line["curve"][-1][1] for line in own if line["curve"]), default=math.nan)
        form = ".3f" if setting == "images" else ".2f"
        cells = [
            cell([value(setting, line["curve"], mb) for line in own], form) for mb in (math.inf, least // 2, least)
        ]
        out.append(f"| {method} | {own[0]['lr'] if own else ''} | {total:.0f} | {' | '.join(cells)} |")
    return "\n".join(out)


def searched(lines: Sequence[dict[str, Any]], setting: str) -> str:
    """In Markdown: the results of the search for learning rates."""
    about = SETTINGS[setting]
    out = [f"| {setting}: {' | '.join(map(str, about.rates))} |", "|---" * (len(about.rates) + 1) + "|"]
    for method in dict.fromkeys(map(family, METHODS)):
        found = {
            line["lr"]: value(setting, line["curve"])
            for line in lines
            if (line["setting"], line["method"], line["rounds"]) == (setting, method, about.short)
        }
        out.append(f"| {method} | {' | '.join(f'{found.get(lr, math.nan):.3f}' for lr in about.rates)} |")
    return "\n".join(out)


def figure(lines: Sequence[dict[str, Any]], setting: str, path: str) -> None:
    """The metric against rounds and megabytes."""
    from lilliput.report import plots

    about = SETTINGS[setting]
    groups: dict[str, list[Any]] = {}
    for line in lines:
        if line["setting"] == setting and line["rounds"] == about.rounds and line["method"] in DRAWN and line["curve"]:
            name = line["method"].replace("none", "no").replace(", ", " dual, P for ")
            sent = [0.0, *(mb for _, mb, _ in line["curve"])]
            steps = zip(line["curve"], sent, strict=False)
            rows = [{"round": r, "up_bytes": 1e6 * (mb - before), about.metric: v} for (r, mb, v), before in steps]
            groups.setdefault(name, []).append(rows)
    drawn = plots.curves(groups, about.metric, ("rounds", "mb"), width="double")
    with plots.style():
        drawn.savefig(path, dpi=120)


def append(path: Path, wanted: Iterator[dict[str, Any]], setting: str, folder: str | None) -> None:
    """Run what has no line in the file yet."""
    part, held = images(folder or "CIFAR10") if setting == "images" else text()
    check_targets(task(setting, part, 0))
    done = [{key: value for key, value in line.items() if key not in ("curve", "cpu_seconds")} for line in read(path)]
    for known in wanted:
        if known not in done:
            line = run(known, part, held)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(known, line["curve"][-1:], line["cpu_seconds"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, help="which to run")
    parser.add_argument("--data", help="the folder of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("fedsub_runs.jsonl"), help="where results are kept")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="which to run")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of results and stop")
    parser.add_argument("--figure", metavar="FILE", help="with --table: draw the setting's results")
    args = parser.parse_args()
    if args.table:
        lines = read(args.table)
        for setting in [args.setting] if args.setting else SETTINGS:
            print(table(lines, setting), searched(lines, setting), sep="\n\n", end="\n\n")
        if args.figure:
            figure(lines, args.setting, args.figure)
        return
    append(args.out, search(args.setting), args.setting, args.data)
    append(args.out, runs(args.setting, read(args.out), args.methods, args.seeds), args.setting, args.data)


if __name__ == "__main__":
    main()
