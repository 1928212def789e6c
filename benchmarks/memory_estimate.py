"""Estimated memory of training, compared with the report of torch's allocator on the same training, on this CPU.

The report is torch.profiler's: it sums every allocation and release of the CPU allocator, independently of our meter.
Prints JSON: for each configuration both peaks in bytes and their ratio, by a step on fake tensors and by formulas.

    python benchmarks/memory_estimate.py [--model llama_60m] [--batch 4] [--length 256] [--rank 128]
    python benchmarks/memory_estimate.py --published         compares with the papers' tables; nothing is trained
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from allocator import peak, trained
from lilliput import footprint
from lilliput.footprint import Setting, measured

REFRESH = {"update_proj_gap": 2}  # so that the third step renews every subspace with all state there
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "AdamW": {"lean": False},
    "GaLore": {"optimizer": "galore_adamw", "optimizer_options": REFRESH, "lean": False},
    "GaLore 8-bit, per layer": {
        "optimizer": "galore_adamw8bit", "optimizer_options": REFRESH, "per_layer": True, "lean": False,
    },
    "AdamW, bf16, checkpointing": {"dtype": "bf16", "checkpointing": True, "lean": False},
    "AdamW, lean": {},
    "AdamW, autocast, lean": {"precision": "bf16"},
    "GaLore 8-bit, bf16, per layer, checkpointing, lean": {
        "optimizer": "galore_adamw8bit", "optimizer_options": REFRESH, "dtype": "bf16", "per_layer": True,
        "checkpointing": True,
    },
}  # fmt: skip
# Weights and states in GiB of bfloat16 (GaLore, Zhao et al. 2024, table 2; 1B at rank 512, 7B not in the table).
PUBLISHED = {
    "60m": (128, {"adamw": 0.36, "galore_adamw": 0.24}),
    "130m": (256, {"adamw": 0.76, "galore_adamw": 0.52}),
    "350m": (256, {"adamw": 2.06, "galore_adamw": 1.22}),
    "1b": (512, {"adamw": 7.80, "galore_adamw": 4.38}),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--published", action="store_true")
    args = parser.parse_args()
    if args.published:
        print(json.dumps(published(), indent=1))
        return
    rows = {}
    for name, changes in CONFIGURATIONS.items():
        given = {"batch_size": args.batch, "max_length": args.length, "device": "cpu", **changes}
        if "optimizer_options" in given:
            given["optimizer_options"] = {**given["optimizer_options"], "rank": args.rank}
        rows[name] = compared(Setting(model=args.model, **given))
    print(json.dumps({**vars(args), "rows": rows}, indent=1))


def compared(setting: Setting) -> dict[str, Any]:
    """Estimates and measurement of one setting."""
    allocator = peak(lambda: trained(setting, setting.module()))
    found: dict[str, Any] = {"allocator_bytes": allocator}
    for name, certify in (("certified", True), ("formula", None)):
        started = time.perf_counter()
        estimate = measured(setting, certify).peak
        seconds = round(time.perf_counter() - started, 2)
        found[name] = {"bytes": estimate, "ratio": round(estimate / allocator, 4), "seconds": seconds}
    return found


def published() -> dict[str, Any]:
    """Weights and states as the papers count them: 2 bytes per number, without buffers and activations."""
    rows: dict[str, Any] = {}
    for size, (rank, figures) in PUBLISHED.items():
        for optimizer, figure in figures.items():
            options = {"rank": rank} if optimizer != "adamw" else {}
            found = footprint.estimate(
                f"llama_{size}", optimizer=optimizer, optimizer_options=options, lean=False, certify=False
            )
            numbers = (found.weights + found.states + found.projections) / 4
            rows[f"{size} {optimizer}"] = {"GiB": round(2 * numbers / 2**30, 2), "published": figure}
    return rows


if __name__ == "__main__":
    main()
