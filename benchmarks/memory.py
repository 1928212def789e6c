"""Memory and FLOPs of a device with the whole model and with its part of it, and whether the ledger is right.

    python benchmarks/memory.py [--model resnet18 gpt2] [--batch 32] [--quick]

One client runs one round of two batches with Adam on this machine's CPU: FedAvg trains the whole model; CSE-FSL trains
the device's part (up to layer2 of ResNet-18, one of GPT-2's blocks) with an auxiliary head.  For each, as JSON:

    ledger_bytes     the ledger's peak: what operations allocate and the call holds
    allocator_bytes  the peak of torch's CPU allocator in the call, from torch.profiler, independent of our meter
    resident_bytes   the growth of the process, by the kernel's high-water mark (VmHWM, reset before the call)
    flops            the ledger's, and by_shape, from the shapes of inputs and weights: products and convolutions, 2 per
                     multiply-add, times three for the two gradients, without that of the first layer's inputs

The device's half runs as on a device: the measurement includes decoding the message and building the model.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allocator import peak
from lilliput import Experiment, models
from lilliput.algorithms import CseFsl, FedAvg
from lilliput.engines import Sequential
from lilliput.engines.device import Response
from lilliput.splitter import Split
from lilliput.tasks import Supervised

CUTS = {"resnet18": "layer3", "gpt2": "transformer.h.1"}
QUICK: dict[str, dict[str, Any]] = {"resnet18": {"width": 16}, "gpt2": {"layers": 3, "hidden": 64, "heads": 2}}


class Traced(Sequential):
    """Records the memory of each handler's first call, by the allocator and by the kernel."""

    def __init__(self) -> None:
        super().__init__(wire=True)
        self.peaks: dict[str, tuple[int, int]] = {}

    def receive(self, timeout: float | None) -> Response:
        name, before = self._queue[0].handler, reset_resident()
        found: list[Response] = []
        allocated = peak(lambda: found.append(super(Traced, self).receive(timeout)))
        self.peaks.setdefault(name, (allocated, resident_peak() - before))
        return found[0]


def reset_resident() -> int:
    """Reset the high-water mark of the process; returns its bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def resident_peak() -> int:
    """The high-water mark in bytes."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def tasks(name: str, quick: bool, batch: int) -> tuple[Supervised, Split, list[Any]]:
    """The task of the whole model, the task of the cut model, and two batches."""
    torch.manual_seed(0)
    own = QUICK[name] if quick else {}
    if name == "resnet18":
        whole = models.build(name, shape=(3, 32, 32), classes=10, **own)
        data: list[Any] = [(torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))) for _ in range(2)]
    else:
        from lilliput.models.transformers import pretrained

        whole = pretrained(name, dropout=0.0, **own, **({"vocabulary": 256} if quick else {}))
        tokens = [torch.randint(256, (batch, 64)) for _ in range(2)]
        data = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in tokens]
    return Supervised(copy.deepcopy(whole)), Split.of(whole, CUTS[name], auxiliary=1), data


def by_shape(part: nn.Module, run: Callable[[], Any]) -> float:
    """The FLOPs of a step, from the layers that a forward calls and their inputs."""
    counts: list[float] = []

    def note(module: nn.Module, args: Any, out: Tensor) -> None:
        weight = module.weight  # of Linear (out, in), of GPT-2's Conv1D (in, out), of convolutions (out, in, k, k)
        per_place = weight.numel() / (weight.shape[0] if not _is_conv1d(module) else weight.shape[1])
        counts.append(2.0 * out.numel() * float(per_place))

    layers = [m for m in part.modules() if isinstance(m, nn.Conv2d | nn.Linear) or _is_conv1d(m)]
    hooks = [m.register_forward_hook(note) for m in layers]
    run()
    for hook in hooks:
        hook.remove()
    first_is_data = isinstance(layers[0], nn.Conv2d)  # embeddings need no product, and their output has a gradient
    return 3 * sum(counts) - (counts[0] if first_is_data else 0.0)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def measured(method: Any, task: Supervised, data: list[Any]) -> dict[str, Any]:
    """One client's round: the ledger's figures and the independent ones."""
    engine = Traced()
    row = Experiment(method, task, {0: data}, rounds=1, evaluate="none").run(engine).rows[0]
    allocator, resident = engine.peaks["train"]
    return {
        "ledger_bytes": row["peak_memory_bytes"], "allocator_bytes": allocator, "resident_bytes": resident,
        "ledger_over_allocator": round(row["peak_memory_bytes"] / allocator, 3), "flops": row["flops"],
    }  # fmt: skip


def compared(name: str, quick: bool, batch: int) -> dict[str, Any]:
    """Whole model and device's part, and their ratios."""
    whole, split, data = tasks(name, quick, batch)
    settings: dict[str, Any] = {"lr": 1e-3, "optimizer": "adam", "local_epochs": 1}
    rows = {
        "whole": measured(FedAvg(**settings), whole, data),
        "device": measured(CseFsl(**settings, server_update_interval=2), split, data),
    }
    rows["whole"]["by_shape"] = sum(by_shape(whole.model, lambda x=x: whole.outputs(whole.model, x)) for x in data)
    part = split.client_part
    rows["device"]["client_by_shape"] = sum(by_shape(part.model, lambda x=x: part.outputs(part.model, x)) for x in data)
    ratios = {
        key: round(rows["device"][key] / rows["whole"][key], 3) for key in ("ledger_bytes", "allocator_bytes", "flops")
    }
    return {**rows, "device_over_whole": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["resnet18", "gpt2"], choices=list(CUTS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="narrow models, for function")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({name: compared(name, args.quick, args.batch) for name in args.model}, indent=1))


if __name__ == "__main__":
    main()
