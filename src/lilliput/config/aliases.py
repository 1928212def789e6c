"""Settings as the published programs write them, in our words, so that their commands run here as they are typed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lilliput.config.published import FEDERATED, FEDSUB, OFF, PRETRAINING, Option
from lilliput.core.registry import normal


def _by_key(*tables: tuple[Option, ...]) -> dict[str, tuple[Option, str]]:
    """(the option, the setting that it is) of every key that is read, refused or idle."""
    options = (option for table in tables for option in table if option.kind != "told")
    return {key: (option, ours) for option in options for key, ours in option.settings()}


RUN, PRETRAIN = _by_key(FEDERATED, FEDSUB), _by_key(PRETRAINING)
_BY_NORMAL = {".".join(map(normal, key.split("."))): known for key, known in RUN.items()}

# FedSub's names of whole methods, under the key of an optimizer.
_METHODS = {"subscafsgd": "fedsub", "fedavgsgd": "fedavg"}


def meant(key: str, value: Any) -> list[tuple[str, Any]]:
    """A setting of `lilliput run` in our words, several or none; a key's case, `-` and `_` do not matter.

    A key that ends in `?` is one that the published program ignores where it has no use.
    Raises ValueError for a published key that has no counterpart, with what to write instead.
    """
    if normal(key) == "optimizer" and normal(str(value)) in _METHODS:
        return [("algorithm", _METHODS[normal(str(value))]), ("optimizer", "sgd")]
    known = _BY_NORMAL.get(".".join(map(normal, key.split("."))))
    if known is None:
        return [(key, value)]
    option, ours = known
    if option.kind == "refused":
        if not ours:
            raise ValueError(f"{key} does nothing here: {option.said()}; leave it out")
        raise ValueError(f"{key} is counted otherwise here; write {ours}=..., {option.said()}")
    made = option.value(value)
    return [] if made is OFF else [(ours + "?" * (option.kind == "lenient"), made)]


def pretraining(layer: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the layer of `lilliput pretrain` in our words, remarks on keys that do nothing here).

    Beside `total_batch_size` or `gradient_accumulation`, `batch_size` is what it is there: sequences of one pass of one
    process.
    """
    made, remarks = _batch(layer), []
    for key, value in layer.items():
        option, ours = PRETRAIN.get(key, (None, key))
        if option is not None and option.kind == "idle":
            remarks.append(f"{key} does nothing here: {option.said()}")
            continue
        translated = [(ours, option.value(value))] if option is not None else _together(key, value, layer)
        for name, changed in translated:
            made.setdefault(name, changed)
    return made, remarks


def _together(key: str, value: Any, layer: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """A setting whose key or value decides several, or that depends on others."""
    optimizer = str(layer.get("optimizer", ""))
    if key == "model_config":
        path = Path(str(value))
        return [("model", str(path) if path.exists() else path.stem)]
    if key == "optimizer" and optimizer.endswith("_per_layer"):
        return [("optimizer", optimizer.removesuffix("_per_layer")), ("per_layer", True)]
    if key == "save_dir":
        return [("folder", str(Path(str(value)).parent)), ("name", Path(str(value)).name)]
    if key == "beta1":
        name = "optimizer.momentum" if optimizer == "sgd" else "optimizer.beta1"
        return [(name, value)] if value else []
    return [({"total_batch_size": "batch_size", "gradient_accumulation": "accumulate"}.get(key, key), value)]


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
