"""Loads the configuration and weights of Hugging Face models from a folder, a config.json or a name on the hub."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lilliput.core.sources import from_hub, is_place, line, place, quiet, transformers


def configured(source: str) -> tuple[dict[str, Any], str | None]:
    """(the configuration in its file, the place of the weights or None).  Raises ValueError if it cannot be loaded."""
    if source.endswith(".json"):
        return _read(place(source, "configuration")), None
    if is_place(source):
        folder = place(source, "model")
        weights = [file for kind in ("*.safetensors", "pytorch_model*.bin") for file in folder.glob(kind)]
        return _read(folder / "config.json"), str(folder) if weights else None
    library = transformers()
    try:
        return from_hub(library.PretrainedConfig.get_config_dict, source)[0], source
    except Exception as error:  # the hub and the network raise errors of many types
        hint = "go online, name a folder, or choose a model of `lilliput list`"
        raise ValueError(f"model {source!r} cannot be loaded from the hub ({line(error)}); {hint}") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no config.json in {file.parent}; name the folder of a saved model") from None
    except ValueError as error:
        raise ValueError(f"{file} is damaged or not JSON: {error}") from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise ValueError(f"{file} has no model_type; it is not a configuration of Hugging Face transformers")
    return raw


def filled(source: str, auto: Any, config: Any, home: str, attention: str) -> nn.Module:
    """Load the model with its weights.  Raises ValueError unless they fill everything but the head for the data."""
    load, local = auto.from_pretrained, {"local_files_only": True} if is_place(home) else {}
    if not local:
        load = partial(from_hub, load)
    try:
        with quiet():
            model, info = load(
                home, config=config, attn_implementation=attention, dtype=torch.float32, output_loading_info=True,
                ignore_mismatched_sizes=True, **local,
            )  # fmt: skip
    except Exception as error:  # damaged files and the network raise errors of many types
        raise ValueError(f"the weights of {source} cannot be loaded: {line(error)}") from error
    inside = "" if model.base_model is model else f"{model.base_model_prefix}."
    for name, *shapes in sorted(info["mismatched_keys"]):
        if name.startswith(inside):
            raise ValueError(f"{name!r} of {source} has shape {tuple(shapes[0])}, not {tuple(shapes[1])}; set no sizes")
    missing = sorted(name for name in info["missing_keys"] if name.startswith(inside) and "pooler" not in name)
    if missing:
        raise ValueError(f"{source} has no weights for {missing[0]!r}; set no more layers than it has")
    return model
