"""The options of GaLore's and Online Subspace Descent's training script in our words, so that they run as typed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RENAMED = {
    "model_config": "model", "gradient_accumulation": "accumulate", "total_batch_size": "batch_size",
    "scheduler": "schedule", "activation_checkpointing": "checkpointing", "warmup_steps": "warmup",
    "num_training_steps": "steps", "max_train_tokens": "tokens", "grad_clipping": "clip",
    "rank": "optimizer.rank", "update_proj_gap": "optimizer.update_proj_gap", "galore_scale": "optimizer.scale",
    "proj_type": "optimizer.proj_type",
}  # fmt: skip
IDLE = {
    "use_hf_model": "every model is Hugging Face's",
    "workers": "a thread prepares batches ahead, as prefetch says",
    "single_gpu": "without torchrun there is one process",
    "log_details": "metrics.jsonl has all there is",
}
PER_LAYER = "_per_layer"  # at the end of a published optimizer's name


def ours(layer: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the layer with published keys and values in our words, remarks on keys that do nothing here).

    Beside `total_batch_size` or `gradient_accumulation`, `batch_size` is what it is there: sequences of one pass of one
    process.
    """
    given = {key: value for key, value in layer.items() if key not in IDLE}
    remarks = [f"{key} does nothing here: {why}" for key, why in IDLE.items() if key in layer]
    made: dict[str, Any] = _batch(given)
    for key, value in given.items():
        for name, changed in _one(key, value, given):
            made.setdefault(name, changed)
    return made, remarks


def _one(key: str, value: Any, given: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """One setting in our words."""
    optimizer = str(given.get("optimizer", ""))
    if key == "model_config":
        path = Path(str(value))
        return [("model", str(path) if path.exists() else path.stem)]
    if key == "optimizer" and optimizer.endswith(PER_LAYER):
        return [("optimizer", optimizer.removesuffix(PER_LAYER)), ("per_layer", True)]
    if key == "save_dir":
        return [("folder", str(Path(str(value)).parent)), ("name", Path(str(value)).name)]
    if key == "beta1":
        name = "optimizer.momentum" if optimizer == "sgd" else "optimizer.beta1"
        return [(name, value)] if value else []
    if key == "dtype":
        return [(key, {"bfloat16": "bf16"}.get(str(value), value))]
    if key == "grad_clipping":
        return [("clip", value or None)]
    return [(RENAMED.get(key, key), value)]


def _batch(given: Mapping[str, Any]) -> dict[str, Any]:
    """`batch_size` and `accumulate` from the published three; empty where none of theirs was typed."""
    total, passes, part = (given.get(k) for k in ("total_batch_size", "gradient_accumulation", "batch_size"))
    if part is None or (total is None and passes is None):
        return {}
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if total is None:
        return {"batch_size": part * passes * world, "accumulate": passes}
    if passes is None and total % (part * world):
        raise ValueError(f"total_batch_size={total} does not divide into {world} x batch_size={part}; choose multiples")
    return {"batch_size": total, "accumulate": total // (part * world) if passes is None else passes}
