"""What training needs of memory, before anything is allocated: by formulas, or certified by a step without numbers.

footprint.estimate("llama_7b", optimizer="galore_adamw8bit", dtype="bf16", per_layer=True).peak
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from lilliput.core.sources import line
from lilliput.footprint.formula import estimate as by_formula
from lilliput.footprint.result import Footprint
from lilliput.footprint.setting import Setting
from lilliput.footprint.sizes import available
from lilliput.footprint.steps import Steps
from lilliput.footprint.trace import trace
from lilliput.splitter.budget import parsed

__all__ = [
    "Footprint",
    "Setting",
    "Steps",
    "advice",
    "available",
    "check",
    "estimate",
    "measured",
    "trace",
]


def estimate(model: Any, *, certify: bool | None = None, **settings: Any) -> Footprint:
    """What one training step needs; `settings` are those of `Setting`.

    model:   a name, a folder, a config.json, or a module, which is left as it is.
    certify: run the step on fake tensors: exact, in seconds.  False takes formulas, at once, which exist for LLaMA
             and our own optimizers; None does where they exist.
    Raises ValueError for what cannot be trained, and where certify=False finds no formula.
    """
    return measured(Setting(model=model, **settings), certify)


def measured(setting: Setting, certify: bool | None = None) -> Footprint:
    """The same of a setting."""
    model = setting.module()
    found = None if certify else by_formula(setting, model)
    if found is None and certify is False:
        raise ValueError(f"there are no formulas for {setting.model} with {setting.optimizer}; use certify=true")
    return found or trace(model, setting.steps, setting.example(model), setting.device, setting.autocast)


def advice(model: Any, memory: int | str, **settings: Any) -> str:
    """One sentence: how much is needed, how much of `memory` (bytes, "24GB") is left, or what would make it fit."""
    from lilliput.footprint.verdict import sentence

    setting = Setting(model=model, **settings)
    return sentence(setting, measured(setting), parsed(memory), measured)


def check(model: Any, memory: int | str | None = None, **settings: Any) -> Footprint | None:
    """What training needs, if it fits into `memory`, by default what is free on the device; None where nobody knows.

    An estimate that fails warns, and gives None.  Raises ValueError, saying how much is missing and which option would
    make it fit.
    """
    from lilliput.footprint.verdict import sentence

    setting = Setting(model=model, **settings)
    limit = parsed(memory) if memory is not None else _free(setting)
    if limit is None:
        return None
    try:
        found = measured(setting)
    except Exception as error:
        name = model if isinstance(model, str) else type(model).__name__
        warnings.warn(
            f"how much memory {name} needs cannot be told beforehand ({type(error).__name__}: {line(error)})",
            stacklevel=2,
        )
        return None
    if found.peak > limit:
        raise ValueError(sentence(setting, found, limit, measured))
    return found


def _free(setting: Setting) -> int | None:
    """What is free on the device, and what the model has taken there already."""
    free = available(setting.device)
    if free is None or isinstance(setting.model, str):
        return free
    kind = torch.device(setting.device).type
    return free + sum(p.nbytes for p in setting.model.parameters() if p.device.type == kind)
