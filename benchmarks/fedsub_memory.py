"""Peak memory of a client on LLaMA-60M, batch 4 x 256: FedSub compared with FedAvg, stock and lean.

    python benchmarks/fedsub_memory.py [--quick] [--optimizers sgd,adamw] [--precision float32,bf16]
    python benchmarks/fedsub_memory.py --published      estimates and the published bars; nothing is trained

Prints JSON and a table, in MB.  `steps` and `call` are peaks of torch's CPU allocator in real training:

    steps  three training steps of a model, its weights included
    call   the largest call of a handler in two rounds of an experiment with one client: its message and state, the
           module that it builds, two steps, and its reply.  While it trains, a client of FedAvg has the model twice, to
           send the difference; a client of FedSub has everything twice but the frozen x of its layers
    ledger the ledger's value for that call

and by kind, each at its own maximum, for the same steps on tensors without values (footprint): weights, gradients,
states (of the optimizer, and duals), and activations, of which `kept` exists when the backward pass begins.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import torch

from allocator import examples, materialised, peak
from lilliput import Experiment, footprint, lean, wire
from lilliput.algorithms import FedAvg, FedSub
from lilliput.core.tree import size
from lilliput.engines import Sequential
from lilliput.engines.device import Job, Response
from lilliput.footprint import Setting, Steps, measured
from lilliput.subspace import replace_with_subspace
from lilliput.tasks import Supervised
from lilliput.training.settings import Training

RANKS = (64, 128, 256)
QUICK = {"layers": 2, "vocabulary": 2000}
GOAL = 0.65  # of FedAvg on transformers' model: FedSub of rank 64 on the lean one
# FedAvg's GB as read off the bars, then FedSub of each rank and P = I (0), % of it; sequences of 1024 under bfloat16
# autocast.  The batch is published for 60M; for the others it is the one whose FedAvg comes nearest.
PUBLISHED: dict[str, tuple[int, float, dict[int, float]]] = {
    "60m": (64, 43.2, {64: 91.3, 128: 92.4, 256: 94.5, 0: 100.9}),
    "350m": (32, 60.8, {64: 82.7, 128: 84.0, 256: 86.7, 0: 107.5}),
    "1b": (16, 59.2, {64: 90.5, 128: 91.6, 256: 93.7}),
}


class Calls(Sequential):
    """Records the allocator's peak in each handler's call, on a device that has only what it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, int] = {}

    def open(self, job: Job) -> None:
        super().open(job)
        self._model = job.task.model

    def receive(self, timeout: float | None) -> Response:
        request, found = self._queue.popleft(), []
        images = [wire.encode(body) for body in (request.common, request.own, request.state or {})]
        job = replace(self._device.job, task=Supervised(self._model))  # with no module built yet
        if isinstance(job.algorithm, FedSub):
            job.algorithm.spaces(job.task)  # made once for all clients and rounds, as the task is
        self._device.job = job
        staged = 0 if request.state is not None else size(self._device._states.get(request.client, {}))

        def run() -> None:
            request.common, request.own, state = (wire.decode(image, copy=True) for image in images)
            request.state = None if request.state is None else state
            found.append(self._device.handle(request))

        self.peaks[request.handler] = max(self.peaks.get(request.handler, 0), staged + peak(run))
        return found[0]


def call(rank: int | None, options: dict[str, Any], given: Setting) -> dict[str, Any]:
    """The allocator's peak of each handler in a client's two rounds, and the ledger's of the largest."""
    torch.manual_seed(0)
    model = materialised(replace(given, subspace=None).module())
    data = [examples(given.example(model)) for _ in range(2)]
    method = FedAvg(lr=1e-3, **options) if rank is None else FedSub(lr=1e-3, rank=rank, **options)
    engine = Calls()
    rows = Experiment(method, Supervised(model), {0: data}, rounds=2, evaluate="none").run(engine).rows
    return {"call": max(engine.peaks.values()), "handlers": engine.peaks,
            "ledger": max(row["peak_memory_bytes"] for row in rows)}  # fmt: skip


def steps(options: dict[str, Any], given: Setting) -> dict[str, Any]:
    """The allocator's peak of three steps, and their memory by kind."""
    config = Training(lr=1e-3, **options)

    def client(model: torch.nn.Module) -> Steps:
        return Steps(model, config, Supervised(model).loss)

    def train() -> None:
        own = client(materialised(given.module()))
        for _ in range(3):
            own.step(examples(given.example(own.model)))

    allocated, model = peak(train), given.module()
    found = footprint.trace(model, client, given.example(model), "cpu")
    batch = examples(given.example(model))
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        kept = lean.activations(materialised(model), batch, lambda m, x: Supervised(m).loss(m, x)[0])
    kinds = {name: getattr(found, name) for name in ("weights", "gradients", "states", "projections", "activations")}
    return {"steps": allocated, "estimated": found.peak, **kinds, "kept": kept}


def rows(optimizer: str, precision: str, quick: bool) -> dict[str, dict[str, Any]]:
    """Every method, stock and lean, with its ratios to FedAvg's stock and lean client."""
    found: dict[str, dict[str, Any]] = {}
    options = {"optimizer": optimizer, "precision": precision}
    for is_lean in (False, True):
        for rank in (None, *RANKS):
            given = Setting(
                "llama_60m", QUICK if quick else {}, batch_size=4, max_length=256, lean=is_lean, subspace=rank,
                device="cpu",
            )  # fmt: skip
            name = f"FedAvg{', lean' * is_lean}" if rank is None else f"FedSub {rank}{', lean' * is_lean}"
            found[name] = {**steps(options, given), **call(rank, options, given)}
    for row in found.values():
        for what in ("steps", "call"):
            for other, label in (("FedAvg", "stock"), ("FedAvg, lean", "lean")):
                row[f"{what}_of_{label}"] = round(row[what] / found[other][what], 3)
        row["ledger_over_call"] = round(row["ledger"] / row["call"], 3)
    return found


def published() -> dict[str, dict[str, Any]]:
    """Estimates in GB, for transformers' model and for the lean one, and the published bars.  Rank 0 is P = I."""
    found: dict[str, dict[str, Any]] = {}
    for name, (batch, fedavg, shares) in PUBLISHED.items():
        whole: dict[bool, float] = {}
        for rank in (None, *RANKS, 0):
            share = 100.0 if rank is None else shares.get(rank)
            row = {"published": None if share is None else round(fedavg * share / 100, 1), "published %": share}
            for is_lean in (False, True):
                given = Setting(
                    f"llama_{name}", optimizer="sgd", batch_size=batch, max_length=1024, precision="bf16", lean=is_lean,
                    subspace=rank or None,
                )  # fmt: skip
                if rank == 0:
                    model = given.module()
                    replace_with_subspace(model, rank=1.0, projection="idx")
                    given = replace(given, model=model)
                gb = measured(given, certify=True).peak / 1e9
                whole.setdefault(is_lean, gb)
                word = "lean" if is_lean else "ours"
                row |= {word: round(gb, 2), f"{word} %": round(100 * gb / whole[False], 1)}
            found[f"{name} {'FedAvg' if rank is None else f'FedSub {rank}' if rank else 'P = I'}, batch {batch}"] = row
    return found


def table(found: dict[str, dict[str, Any]], columns: list[str]) -> str:
    """Rows of Markdown; whole numbers are bytes, shown in MB."""

    def cell(x: Any) -> str:
        return "" if x is None else f"{x / 1e6:.1f}" if isinstance(x, int) else str(x)

    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(cell(row[column]) for column in columns)] for name, row in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers and a small vocabulary, for function")
    parser.add_argument("--optimizers", default="sgd,adamw")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--published", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.published:
        found = published()
        print(json.dumps(found, indent=1))
        print(table(found, list(next(iter(found.values())))))
        return
    columns = [
        "weights", "kept", "activations", "gradients", "states", "steps", "steps_of_stock", "steps_of_lean", "call",
        "call_of_stock", "call_of_lean", "ledger_over_call",
    ]  # fmt: skip
    for precision in args.precision.split(","):
        for optimizer in args.optimizers.split(","):
            found = rows(optimizer, precision, args.quick)
            ratio = found["FedSub 64, lean"]["steps_of_stock"]
            about = {"optimizer": optimizer, "precision": precision, "quick": args.quick}
            print(json.dumps({**about, "rows": found}, indent=1))
            print(f"\n{optimizer}, {precision}, MB\n\n{table(found, columns)}\n")
            verdict = f"at most {GOAL}: {'met' if ratio <= GOAL else 'NOT met'}"
            print(f"FedSub 64, lean, over FedAvg: {ratio} ({verdict})\n")


if __name__ == "__main__":
    main()
