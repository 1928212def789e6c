"""The ways to train that a setting is put beside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lilliput.footprint.setting import Setting
from lilliput.optim.factory import projects

RANK = 128  # of the other ways, where the setting has none
WAYS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw"},
    "8-bit AdamW": {"optimizer": "adamw8bit"},
    "LoRA": {"optimizer": "adamw", "lora": RANK},
    "GaLore": {"optimizer": "galore_adamw"},
    "Online Subspace Descent": {"optimizer": "online_subspace_adamw"},
}


def beside(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """(name, the same training by another method), of the same rank where it has one."""
    rank = _rank(setting)
    for name, changes in WAYS.items():
        options = {"rank": rank} if projects(changes["optimizer"]) else {}
        lora = rank if "lora" in changes else None
        other = replace(setting, **{**changes, "optimizer_options": options, "lora": lora, "subspace": None})
        if other != setting:
            yield name, other


def _rank(setting: Setting) -> int:
    if own := setting.lora or setting.subspace:
        return own
    named = isinstance(setting.optimizer, str) and projects(setting.optimizer)
    return int(setting.optimizer_options.get("rank", RANK)) if named else RANK
