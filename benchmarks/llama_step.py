"""One training step of LLaMA-60M, batch 4 x 256: the lean step and transformers take turns: time, memory, losses.

    python benchmarks/llama_step.py [--quick] [--only time,kept,losses] [--turns 7] [--steps 50]

Prints JSON.  `time`: CPU milliseconds of a step, one thread, medians of turns; each side runs in its own process,
because process settings cannot be undone.  transformers runs as shipped (with torch's default AdamW), with our
settings, and also with the fused AdamW, which separates the gain of the lean step from that of the settings.  `kept`:
bytes that the forward pass keeps for the backward pass, gradients that it computes early, and the peak of a step's
allocations.  `losses`: the distance of losses from those of transformers in steps of fused AdamW on equal batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilliput import lean
from lilliput.core.meter import Instrument
from lilliput.lean import policy
from lilliput.models.llama import LLAMA
from lilliput.tasks.recompute import checkpointed

BATCH, LENGTH, LR = 4, 256, 1e-3
QUICK = {"num_hidden_layers": 2, "vocab_size": 4000}


@dataclass(frozen=True)
class Side:
    """A way to take the step."""

    lean: bool = False
    settings: bool = False  # the process's
    fused: bool = False  # AdamW
    bf16: bool = False  # autocast
    checkpointing: bool = False


SHIPPED = "transformers as shipped"
TIMED = {
    "float32": {
        SHIPPED: Side(),
        "transformers, our settings": Side(settings=True),
        "transformers, our settings, fused AdamW": Side(settings=True, fused=True),
        "lean, no settings": Side(lean=True, fused=True),
        "lean": Side(lean=True, settings=True, fused=True),
        "lean, checkpointing": Side(lean=True, settings=True, fused=True, checkpointing=True),
    },
    "bf16": {
        SHIPPED: Side(),
        "transformers bf16": Side(bf16=True),
        "transformers bf16, our settings, fused AdamW": Side(settings=True, fused=True, bf16=True),
        "lean bf16": Side(lean=True, settings=True, fused=True, bf16=True),
    },
}
KEPT = {
    "transformers": Side(),
    "transformers, checkpointing": Side(checkpointing=True),
    "lean": Side(lean=True),
    "lean, checkpointing": Side(lean=True, checkpointing=True),
    "transformers bf16": Side(bf16=True),
    "lean bf16": Side(lean=True, bf16=True),
}
GOALS = {  # of what: (part, ours, theirs, at most)
    "G12 step, float32": ("float32", "lean", SHIPPED, 0.52),
    "G12 step, bf16": ("bf16", "lean bf16", SHIPPED, 0.36),
    "checkpointing, time": ("float32", "lean, checkpointing", "lean", 1.25),
    "G13 kept, no product made twice": ("kept", "lean", "transformers", 0.45),
    "G13 kept, checkpointing": ("kept", "lean, checkpointing", "transformers", 0.06),
}


def network(side: Side, quick: bool) -> Any:
    """LLaMA-60M with the same weights for all sides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA["60m"], **(QUICK if quick else {})}))
    return lean.patch(model) if side.lean else model


def batch(number: int, vocabulary: int) -> dict[str, Tensor]:
    """Tokens with the frequencies of words (Zipf), so that there is something to learn."""
    generator = torch.Generator().manual_seed(number)
    frequency = 1 / torch.arange(1, vocabulary + 1)
    ids = torch.multinomial(frequency, BATCH * LENGTH, replacement=True, generator=generator).view(BATCH, LENGTH)
    labels = torch.cat([ids[:, 1:], torch.full((BATCH, 1), -100)], 1)
    return {"input_ids": ids, "labels": labels}


class Step:
    """A model with its optimizer."""

    def __init__(self, side: Side, quick: bool):
        self.side, self.model = side, network(side, quick)
        self.vocabulary = self.model.config.vocab_size
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=side.fused or None)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """As a user of transformers has it (it shifts labels itself), or ours; the model is `self.model`."""
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.side.bf16)
        with autocast, self._checkpointing():
            if self.side.lean:
                return lean.loss(model, batch)
            return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def _checkpointing(self) -> AbstractContextManager[Any]:
        return checkpointed(self.model) if self.side.checkpointing else nullcontext()

    def __call__(self, number: int) -> tuple[float, float]:
        """(loss, CPU seconds) of one step on this batch."""
        x = batch(number, self.vocabulary)
        start = time.process_time()
        loss = self.loss(self.model, x)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach()), time.process_time() - start


def serve(side: Side, quick: bool) -> None:
    """Take a step for every line on standard input, and print its seconds."""
    with policy.tuned(threads=1) if side.settings else nullcontext():
        step = Step(side, quick)
        for number, _ in enumerate(sys.stdin):
            print(step(number)[1], flush=True)


def timed(part: str, turns: int, quick: bool, sides: list[str]) -> dict[str, float]:
    """Milliseconds of each side: `turns` rounds of one step each, after two steps of warm-up."""
    base = [sys.executable, __file__, *(["--quick"] if quick else [])]
    started = {
        name: subprocess.Popen([*base, "--serve", part, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in TIMED[part]
        if not sides or name in sides
    }
    seconds: dict[str, list[float]] = {name: [] for name in started}
    for turn in range(turns + 2):
        for name, process in started.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            taken = float(process.stdout.readline())
            if turn >= 2:
                seconds[name].append(taken)
    for process in started.values():
        process.communicate()
    return {name: round(1e3 * statistics.median(x), 1) for name, x in seconds.items()}


def kept(side: Side, quick: bool) -> dict[str, float]:
    """Megabytes of one step."""
    step = Step(side, quick)
    x = batch(0, step.vocabulary)
    with Instrument() as probe:
        loss = step.loss(step.model, x)
        early = sum(g.nbytes for g in getattr(loss.grad_fn, "grads", None) or () if g is not None)
        loss.backward()
        del loss
    found = {"kept": lean.activations(step.model, x, step.loss), "early": early, "peak": probe.peak_bytes}
    return {name: round(n / 1e6, 1) for name, n in found.items()}


def losses(steps: int, quick: bool) -> dict[str, Any]:
    """The largest relative distance between losses of the lean step and of transformers, at any of the steps.

    The settings change the order of float32 sums too, so their effect alone on transformers' losses is also reported.
    """
    sides = {
        "shipped": (Step(Side(fused=True), quick), False),
        "settings": (Step(Side(fused=True), quick), True),
        "lean": (Step(Side(lean=True, fused=True), quick), True),
    }
    seen: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(steps):
        for name, (step, settings) in sides.items():
            with policy.tuned(threads=1) if settings else nullcontext():
                seen[name].append(step(number)[0])

    def furthest(a: str, b: str) -> float:
        return max(abs(x - y) / y for x, y in zip(seen[a], seen[b], strict=True))

    return {
        "steps": steps,
        "first": seen["shipped"][0],
        "last": seen["shipped"][-1],
        "lean from transformers, both with settings": furthest("lean", "settings"),
        "lean with settings from transformers without": furthest("lean", "shipped"),
        "settings alone": furthest("settings", "shipped"),
    }


def goals(found: dict[str, Any]) -> dict[str, Any]:
    """Each goal with the ratio that was measured."""
    table: dict[str, Any] = {}
    for goal, (part, ours, theirs, most) in GOALS.items():
        if {ours, theirs} <= found.get(part, {}).keys():
            a, b = (row["kept"] if part == "kept" else row for row in (found[part][ours], found[part][theirs]))
            table[goal] = {"ratio": round(a / b, 3), "most": most, "met": a / b <= most}
    if "losses" in found:
        far = found["losses"]["lean from transformers, both with settings"]
        table["losses"] = {"distance": far, "most": 1e-5, "met": far <= 1e-5}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two layers and a small vocabulary, three turns, five steps"
    )
    parser.add_argument("--only", default="time,kept,losses", help="parts, by comma")
    parser.add_argument("--sides", default="", help="of `time`, by semicolon; all, a gigabyte or two each, by default")
    parser.add_argument("--turns", type=int, help="steps timed of each side (7)")
    parser.add_argument("--steps", type=int, help="steps whose losses are compared (50)")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.serve:
        return serve(TIMED[a.serve[0]][a.serve[1]], a.quick)
    parts = a.only.split(",")
    found: dict[str, Any] = {"torch": torch.__version__, "tokens": [BATCH, LENGTH], "quick": a.quick}
    if "kept" in parts:
        found["kept"] = {name: kept(side, a.quick) for name, side in KEPT.items()}
    if "time" in parts:
        turns, sides = a.turns or (3 if a.quick else 7), [name for name in a.sides.split(";") if name]
        found |= {part: timed(part, turns, a.quick, sides) for part in TIMED}
    if "losses" in parts:
        found["losses"] = losses(a.steps or (5 if a.quick else 50), a.quick)
    print(json.dumps({**found, "goals": goals(found)}, indent=2))


if __name__ == "__main__":
    main()
