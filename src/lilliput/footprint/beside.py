"""Other ways to train the model of a setting, to compare it with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lilliput.footprint.setting import Setting
from lilliput.optim.factory import projects

RANK = 128  # of the other ways, if the setting has none
WAYS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw"},
    "8-bit AdamW": {"optimizer": "adamw8bit"},
    "LoRA": {"optimizer": "adamw", "lora": RANK},
    "GaLore": {"optimizer": "galore_adamw"},
    "Online Subspace Descent": {"optimizer": "online_subspace_adamw"},
}


def beside(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """(name, the same training by another method), at the same rank if the setting has one."""
    rank = _rank(setting)
    for name, changes in WAYS.items():
        options = {"rank": rank} if projects(changes["optimizer"]) else {}
        lora = rank if "lora" in changes else None
        other = replace(setting, **{**changes, "optimizer_options": options, "lora": lora, "subspace": None})
        if other != setting:
            yield name, other


def _rank(setting: Setting) -> int:
    if rank := setting.lora or setting.subspace:
        return rank
    named = isinstance(setting.optimizer, str) and projects(setting.optimizer)
    return int(setting.optimizer_options.get("rank", RANK)) if named else RANK
