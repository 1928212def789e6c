"""Accuracy against bytes: FedAvg and the split methods on CIFAR-10 at a scale for one CPU core.

    nice python benchmarks/cifar_split.py --data CIFAR10 --out results.jsonl
    python benchmarks/cifar_split.py --table results.jsonl [--figure split_cifar10.png]

5,000 training and 2,000 test images; five clients (Dirichlet, alpha 1); a ResNet-10 with the ImageNet stem, cut before
layer3 as published; Adam(1e-3), batches of 64, eight rounds of one epoch; q = 5, l = 4, alignments of 20 epochs over
the newest 320 activations of a client.  Each method runs without codecs, and with int8 activations and bfloat16 models,
under three seeds.  Each run appends a line to --out when it ends; runs with a line there are skipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import lilliput
from lilliput import data, models
from lilliput.algorithms import CseFsl, FedAvg, FslSage, SplitFedV1, SplitFedV2
from lilliput.core import random
from lilliput.splitter import Split
from lilliput.wire import codecs

SEEDS, ROUNDS, CLIENTS, BATCH = (0, 1, 2), 8, 5, 64
TRAINING: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3, "optimizer_state": "keep"}
ALIGNMENT = {"align_interval": 4, "align_epochs": 20, "align_batch_size": 320, "memory_size": 320}
METHODS: dict[str, Any] = {
    "FedAvg": FedAvg(**TRAINING),
    "SplitFed v1": SplitFedV1(**TRAINING),
    "SplitFed v2": SplitFedV2(**TRAINING),
    "CSE-FSL": CseFsl(**TRAINING, server_update_interval=5),
    "FSL-SAGE": FslSage(**TRAINING, server_update_interval=5, **ALIGNMENT),
}
CODECS = {"as it is": None, "int8 and bf16": "int8:activations+bf16"}
MEGABYTES = (50, 100, 200, 400)  # where accuracy is compared
ACCURACIES = (0.3, 0.35, 0.4)  # where megabytes are


def part(dataset: data.Dataset) -> data.Dataset:
    """The first images of each class: 500 for training and 200 for testing."""

    def first(columns: Sequence[torch.Tensor], each: int) -> tuple[torch.Tensor, ...]:
        rows = torch.cat([(columns[1] == k).nonzero().flatten()[:each] for k in range(dataset.classes)])
        return tuple(x[rows] for x in columns)

    return replace(dataset, train=first(dataset.train, 500), test=first(dataset.test, 200))


def run(known: dict[str, Any], cifar10: data.Dataset) -> dict[str, Any]:
    """One run: the line of the results."""
    torch.set_num_threads(1)
    held = data.federate(
        cifar10,
        "dirichlet",
        clients=CLIENTS,
        batch_size=BATCH,
        seed=known["seed"],
        augment=("crop:4", "flip"),
        alpha=1.0,
    )
    with random.seeded(known["seed"], "model"):
        model = models.build("resnet10", shape=cifar10.shape, classes=10, stem="imagenet")
        method = METHODS[known["method"]]
        head = 1 if isinstance(method, CseFsl) else None
        task = Split.of(model, "layer3", auxiliary=head, example=torch.zeros(2, *cifar10.shape))
    codec = CODECS[known["codec"]]
    began = time.process_time()
    rows = lilliput.Experiment(
        method, task, held.train, rounds=ROUNDS, test=held.test, seed=known["seed"],
        codec=codecs.build(codec) if codec else None,
    ).run("sequential").rows  # fmt: skip
    sent, curve = 0.0, []
    for row in rows:
        sent += (row["up_bytes"] + row["down_bytes"]) / 1e6
        curve.append((round(sent, 3), row["accuracy"]))
    return {**known, "curve": curve, "cpu_seconds": round(time.process_time() - began, 1)}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of the results that are whole."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def accuracy_at(curve: Sequence[Sequence[float]], megabytes: float) -> float | None:
    """The best accuracy so far within this many megabytes; None before the first round."""
    return max((accuracy for sent, accuracy in curve if sent <= megabytes), default=None)


def megabytes_at(curve: Sequence[Sequence[float]], accuracy: float) -> float | None:
    """The megabytes sent when the accuracy was first reached; None if it never was."""
    return next((sent for sent, reached in curve if reached >= accuracy), None)


def cell(values: Sequence[float | None], form: str) -> str:
    """Mean and standard deviation, or the number of runs without a value."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return f"in {len(known)} of {len(values)} runs" if known else "none"
    return f"{statistics.fmean(known):{form}} ± {statistics.pstdev(known):{form}}"


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Both comparisons in Markdown."""
    heads = [f"{mb} MB" for mb in MEGABYTES] + [f"{accuracy:.0%}" for accuracy in ACCURACIES]
    out = [f"| method | messages | MB a round | {' | '.join(heads)} | last |", "|---" * (len(heads) + 4) + "|"]
    for codec in CODECS:
        for method in METHODS:
            curves = [line["curve"] for line in lines if (line["method"], line["codec"]) == (method, codec)]
            if not curves:
                continue
            measures: list[tuple[Callable[..., float | None], Any, str]] = [
                *((accuracy_at, mb, ".3f") for mb in MEGABYTES), *((megabytes_at, a, ".0f") for a in ACCURACIES),
            ]  # fmt: skip
            cells = [cell([measure(curve, at) for curve in curves], form) for measure, at, form in measures]
            each = statistics.fmean(curve[-1][0] / len(curve) for curve in curves)
            last = cell([curve[-1][1] for curve in curves], ".3f")
            out.append(f"| {method} | {codec} | {each:.1f} | {' | '.join(cells)} | {last} |")
    return "\n".join(out)


def figure(lines: Sequence[dict[str, Any]], path: str) -> None:
    """Accuracy against megabytes, the mean of the seeds at each round."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for colour, method in enumerate(METHODS):
        for codec, style in zip(CODECS, ("-", "--"), strict=True):
            curves = [line["curve"] for line in lines if (line["method"], line["codec"]) == (method, codec)]
            if curves:
                mean = [
                    [statistics.fmean(v) for v in zip(*points, strict=True)] for points in zip(*curves, strict=True)
                ]
                axes.plot(*zip(*mean, strict=True), style, color=f"C{colour}", label=method if style == "-" else None)
    axes.set(xscale="log", xlabel="megabytes sent, both ways (log)", ylabel="test accuracy")
    axes.plot([], [], "k--", label="int8 activations, bf16 models")
    axes.legend(fontsize=8)
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("cifar_split.jsonl"), help="where results are kept")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to run")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of results and stop")
    parser.add_argument("--figure", metavar="FILE", help="with --table: draw them")
    args = parser.parse_args()
    if args.table:
        print(table(read(args.table)))
        if args.figure:
            figure(read(args.table), args.figure)
        return
    cifar10 = part(data.load("cifar10", folder=args.data))
    done = [{key: line[key] for key in ("method", "codec", "seed")} for line in read(args.out)]
    for seed in SEEDS:
        for method in args.methods:
            for codec in CODECS:
                known = {"method": method, "codec": codec, "seed": seed}
                if known not in done:
                    line = run(known, cifar10)
                    with args.out.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    print(known, line["curve"][-1], line["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main()
