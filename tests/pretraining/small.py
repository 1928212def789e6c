"""What the tests of pre-training share: a text of a few kilobytes, and a LLaMA that trains on it in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "model": "llama_9m",
    "model_options": {"hidden": 16, "mlp": 24, "layers": 2, "heads": 2, "vocab_size": 320, "positions": 64},
    "tokenizer": "bytes", "max_length": 16, "batch_size": 8, "steps": 12, "lr": 0.01, "log_every": 1,
    "eval_every": 5, "eval_tokens": 500, "warmup": 2, "shuffle": 16,
}  # fmt: skip


def text(folder: Path) -> str:
    """A file of documents of a few words each, the same for all tests."""
    draw = random.Random(0)
    words = ["split", "slice", "train", "wire", "round", "client", "server", "model"]
    file = folder / "text.jsonl"
    if not file.exists():
        rows = [" ".join(draw.choices(words, k=draw.randint(2, 12))) for _ in range(60)]
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(file)


def typed(**settings: Any) -> list[str]:
    """The settings as words of the command line."""
    flat = {k: v for k, v in {**SMALL, **settings}.items() if not isinstance(v, dict)}
    options = {f"model.{k}": v for k, v in SMALL["model_options"].items()}
    own = {f"optimizer.{k}": v for k, v in settings.get("optimizer_options", {}).items()}
    shown = {True: "true", False: "false"}
    return [f"{k}={shown.get(v, v) if isinstance(v, bool) else v}" for k, v in {**flat, **options, **own}.items()]


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what a clock or the system's memory decides."""
    clock = ("seconds", "tokens_per_second", "examples_per_second", "peak_memory_bytes")
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]
