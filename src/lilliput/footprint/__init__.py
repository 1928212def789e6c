"""The memory that training needs, before anything is allocated: by formulas, or certified by a step on fake tensors.

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
    """The memory of one training step; `settings` are those of `Setting`.

    model:   a name, a folder, a config.json, or a module, which stays as it is.
    certify: True runs the step on fake tensors: exact, and slower for larger models.  False takes formulas, which
             answer at once and cover LLaMA, Mistral and Qwen with our own optimizers.  None takes formulas where
             they apply, and runs the step otherwise.
    Raises ValueError for a setting that cannot be trained, and if certify=False finds no formula.
    """
    return measured(Setting(model=model, **settings), certify)


def measured(setting: Setting, certify: bool | None = None) -> Footprint:
    """The memory of one training step of this setting; see `estimate`."""
    model = setting.module()
    footprint = None if certify else by_formula(setting, model)
    if footprint is None and certify is False:
        raise ValueError(f"there are no formulas for {setting.model} with {setting.optimizer}; use certify=true")
    return footprint or trace(model, setting.steps, setting.example(model), setting.device, setting.autocast)


def advice(model: Any, memory: int | str, **settings: Any) -> str:
    """One sentence: how much is needed, and how much of `memory` (bytes, "24GB") is left or what would make it fit."""
    from lilliput.footprint.verdict import sentence

    setting = Setting(model=model, **settings)
    return sentence(setting, measured(setting), parsed(memory), measured)


def check(model: Any, memory: int | str | None = None, **settings: Any) -> Footprint | None:
    """The memory that training needs, once it is sure to fit into `memory`, by default what is free on the device.

    Returns None if the device does not tell what is free; also, with a warning, if the estimate fails.
    Raises ValueError if it does not fit, saying how much is missing and which option would make it fit.
    """
    from lilliput.footprint.verdict import sentence

    setting = Setting(model=model, **settings)
    limit = parsed(memory) if memory is not None else _free(setting)
    if limit is None:
        return None
    try:
        footprint = measured(setting)
    except Exception as error:
        name = model if isinstance(model, str) else type(model).__name__
        warnings.warn(
            f"how much memory {name} needs cannot be told beforehand ({type(error).__name__}: {line(error)})",
            stacklevel=2,
        )
        return None
    if footprint.peak > limit:
        raise ValueError(sentence(setting, footprint, limit, measured))
    return footprint


def _free(setting: Setting) -> int | None:
    """Bytes that are free on the device, plus those of the model's weights that are already there."""
    free = available(setting.device)
    if free is None or isinstance(setting.model, str):
        return free
    kind = torch.device(setting.device).type
    return free + sum(p.nbytes for p in setting.model.parameters() if p.device.type == kind)
