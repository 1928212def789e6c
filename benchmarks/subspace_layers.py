"""Forward and backward of SubspaceLinear and nn.Linear.  Goal: at a quarter of the width no slower, and cd faster.

    OMP_NUM_THREADS=1 python benchmarks/subspace_layers.py [--repeats 15]

The shapes are LLaMA-60M's, for batch 4 x 256.  All layers take turns in one loop, so that other load on the machine
affects them alike.  Prints medians of CPU seconds, ratios to nn.Linear, and the bytes kept for the backward pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lilliput.subspace import SubspaceLinear, seeded_basis

TOKENS, SHAPES = 4 * 256, ((512, 512), (1376, 512), (512, 1376))  # (out, in)


def layers(out: int, width: int, share: float) -> dict[str, nn.Module]:
    """nn.Linear and its replacements."""
    rank = int(share * width)
    plain = {"linear": nn.Linear(width, out, bias=False)}
    return plain | {
        kind: SubspaceLinear(nn.Linear(width, out, bias=False), seeded_basis(kind, rank, width, "benchmark"))
        for kind in ("cd", "ss")
    }


def step(layer: nn.Module, x: Tensor, slope: Tensor) -> Callable[[], None]:
    """Forward and backward, to the weights and to the input."""

    def run() -> None:
        layer.zero_grad()
        layer(x).backward(slope)

    return run


def kept(layer: nn.Module, x: Tensor) -> int:
    """The bytes kept for the backward pass, without the layer's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    for out, width in SHAPES:
        x, slope = torch.randn(4, TOKENS // 4, width, requires_grad=True), torch.randn(4, TOKENS // 4, out)
        made = layers(out, width, 0.25)
        steps = {name: step(layer, x, slope) for name, layer in made.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(repeats + 2):
            for name, run in steps.items():
                began = time.process_time()
                run()
                if turn > 1:
                    seconds[name].append(time.process_time() - began)
        linear = statistics.median(seconds["linear"])
        for name, values in seconds.items():
            middle = statistics.median(values)
            shape = {"layer": name, "out": out, "in": width, "rank": width // 4, "tokens": TOKENS}
            cost = {"cpu_ms": round(1e3 * middle, 2), "to_linear": round(middle / linear, 3)}
            line = {**shape, **cost, "kept_bytes": kept(made[name], x)}
            print(json.dumps(line))


if __name__ == "__main__":
    main()
