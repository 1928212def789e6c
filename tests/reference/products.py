"""Draws from the product of settings and compares lilliput with the plain program.

    python tests/reference/products.py --cases 5000 --seed 1

prints the cases that differ, each after the smallest one that differs too, and how many there were.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from typing import Any

import plain
import torch
from nets import Net

import lilliput
from lilliput import algorithms
from lilliput.engines import Sequential, Workers
from lilliput.tasks import Supervised

Case = dict[str, Any]

SPACE: dict[str, list[Any]] = {
    "method": ["fedavg", "fedprox", "scaffold", "fednova"],
    "optimizer": ["sgd", "sgd", "adam", "adamw", "Adagrad", "Adamax", "RMSprop", "AdamW", "NAdam"],
    "momentum": [0.0, 0.9],
    "dampening": [0.0, 0.5],
    "nesterov": [False, True],
    "weight_decay": [0.0, 0.05],
    "accumulate": [1, 2, 3],
    "clip": [None, 0.1],
    "precision": ["float32", "float32", "bf16", "fp16"],
    "per_layer": [False, True],
    "checkpointing": [False, True],
    "optimizer_state": ["reset", "keep"],
    "buffers": ["average", "local", "none"],
    "schedule": ["constant", "linear", "cosine", "exponential:0.8"],
    "warmup": [0, 1],
    "local_steps": [None, 4],
    "layout": ["linear", "einsum", "expanded", "transposed"],
    "norm": ["none", "batch", "counter", "hidden", "spectral"],
    "branch": ["none", "unused", "sometimes"],
    "tied": [False, True],
    "twice": [False, True],
    "frozen": [False, True],
    "whole": [False, True],
    "dtype": ["float32", "float64"],
    "labels": ["all", "some", "no client", "no batch", "no piece"],
    "text": [False, True],
    "cohorts": ["everyone", "some"],
    "engine": ["sequential", "sequential", "sequential", "wire", "workers"],
    "seed": list(range(5)),
}

METHODS = {
    "fedavg": algorithms.FedAvg,
    "fedprox": algorithms.FedProx,
    "scaffold": algorithms.Scaffold,
    "fednova": algorithms.FedNova,
}
ENGINES: dict[str, Any] = {
    "sequential": lambda: Sequential(),
    "wire": lambda: Sequential(wire=True),
    "workers": lambda: Workers(2),
}
EPS = 1e-3  # adaptive optimizers divide by it: a smaller one blows up the rounding of gradients that are almost zero
SIZES = {0: [6, 5], 1: [7], 2: [4, 6, 5]}  # examples per batch, by client
COHORTS = {"everyone": [[0, 1, 2]] * 3, "some": [[0, 2], [1], [0, 1, 2]]}


def sensible(case: Case) -> Case:
    """The case with what would be refused, or means nothing, set aside."""
    s = dict(case)
    if s["method"] in ("scaffold", "fednova"):
        s |= {"optimizer": "sgd", "nesterov": False, "optimizer_state": "reset"}
    if s["optimizer"] != "sgd":
        s |= {"momentum": 0.0}
    if not s["momentum"]:
        s |= {"nesterov": False, "dampening": 0.0}
    if s["nesterov"]:
        s["dampening"] = 0.0
    if s["precision"] == "fp16":
        s["per_layer"] = False
    if s["precision"] != "float32":
        s["dtype"] = "float32"
    if s["norm"] == "batch" and s["accumulate"] == 3:  # a batch of one cannot be normalised by itself
        s["accumulate"] = 2
    lr = 0.05 if s["optimizer"] == "sgd" else 0.01
    return s | {"lr": lr, "mu": 0.1, "rounds": 3, "local_epochs": 2, "eps": EPS}


def examples(s: Case) -> dict[int, list[Any]]:
    """Three clients' batches: inputs [examples, (2,) 5], labels [examples, (2)] of four classes."""
    draw = torch.Generator().manual_seed(s["seed"])
    shape = (2,) if s["text"] else ()
    data = {
        c: [
            (
                torch.randn(n, *shape, 5, generator=draw, dtype=torch.float64).to(getattr(torch, s["dtype"])),
                torch.randint(4, (n, *shape), generator=draw),
            )
            for n in sizes
        ]
        for c, sizes in SIZES.items()
    }
    for c, batches in data.items():
        for i, (_, y) in enumerate(batches):
            flat = y.view(-1)
            if s["labels"] == "some":
                flat[torch.rand(len(flat), generator=draw) < 0.5] = plain.IGNORED
            elif (s["labels"], c) == ("no client", 1) or (s["labels"], i) == ("no batch", 1):
                flat.fill_(plain.IGNORED)
            elif s["labels"] == "no piece":
                flat[: len(flat) // 2 + 1] = plain.IGNORED
    return data


def ours(net: Net, data: dict[int, list[Any]], cohorts: list[list[int]], s: Case) -> dict[str, torch.Tensor]:
    names = ("momentum", "nesterov", "weight_decay", "lr", "local_epochs", "local_steps", "schedule", "warmup", "clip")
    names += ("accumulate", "precision", "checkpointing", "per_layer", "optimizer_state", "buffers")
    known = s["optimizer"] if s["optimizer"] in plain.OPTIMIZERS else getattr(torch.optim, s["optimizer"])
    options = {"dampening": s["dampening"]} if s["dampening"] else {}
    options |= {"eps": s["eps"]} if s["optimizer"] != "sgd" else {}
    extra = {"mu": s["mu"]} if s["method"] == "fedprox" else {}
    method = METHODS[s["method"]](
        **{n: s[n] for n in names}, optimizer=known, optimizer_options=options, **extra
    )  # fmt: skip
    experiment = lilliput.Experiment(
        algorithm=method, task=Supervised(net), data=data, rounds=s["rounds"], cohorts=cohorts, quorum=1.0
    )
    state = experiment.run(engine=ENGINES[s["engine"]]()).state
    return {**state["params"], **(state.get("buffers", {}) if s["buffers"] == "average" else {})}


def difference(case: Case) -> tuple[float, float]:
    """The largest difference between both programs' weights, and the largest that rounding explains."""
    s = sensible(case)
    data, cohorts = examples(s), COHORTS[s["cohorts"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ours(Net(s), data, cohorts, s)
        expected = plain.run(Net(s), data, cohorts, s)
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    worst = max(float((found[n].double() - x.double()).abs().max()) for n, x in expected.items())
    # Adaptive optimizers divide by the size of a gradient, which amplifies rounding even so.
    rounding = 1e-9 if s["dtype"] == "float64" else 2e-5 if s["precision"] == "float32" else 2e-3
    return worst, rounding if s["optimizer"] == "sgd" else 5 * rounding


def verdict(case: Case) -> str:
    """What is wrong with a case, or nothing."""
    try:
        found, rounding = difference(case)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:160]}"
    return "" if found <= rounding else f"{found:.1e}"


def smallest(case: Case) -> Case:
    """A case that is wrong as well, with as many settings as possible at their first, plainest value."""
    for name, values in SPACE.items():
        plainer = {**case, name: values[0]}
        if case[name] != values[0] and verdict(plainer):
            case = plainer
    return case


def described(case: Case) -> str:
    """What of a case is not the first, plainest value."""
    s = sensible(case)
    return " ".join(f"{k}={s[k]}" for k, values in SPACE.items() if s[k] != values[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    wrong: list[str] = []
    for _ in range(options.cases):
        case = {name: rng.choice(values) for name, values in SPACE.items()}
        if said := verdict(case):
            small = smallest(case)
            wrong.append(f"{described(small)}: {verdict(small)}   [{described(case)}: {said}]")
    print(*sorted(wrong, key=len), f"{len(wrong)} of {options.cases} differ (seed {options.seed})", sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
