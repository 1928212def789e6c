"""What there is to choose and to set, as data: names with a line on each, settings with their defaults and meanings.

A setting is {name: [default as one types it, what it means and what it takes]}.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lilliput.config.axes import AXES, LOOSE, PROFILE, Axis
from lilliput.config.fields import REQUIRED, Field, docs, fields_of, summary
from lilliput.config.shared import Shared, top, training
from lilliput.config.values import describe, members, show

Told = dict[str, list[str]]

WORDS = {
    "cohort": "clients per round: a number, or a share of them below 1; all of them for null",
    "momentum": "of SGD",
    "nesterov": "Nesterov's momentum",
    "weight_decay": "pull of the optimizer towards zero",
    "optimizer": "sgd, adam, adamw, or your own: torch.optim:RMSprop, mine.py:Mine",
    "optimizer_options": "further arguments of the optimizer: optimizer_options.eps=1e-6",
    "local_steps": "steps per round, instead of epochs",
    "cut": "of split methods: the module that the server begins with, or cut.memory=200MB, ...; as published or half",
    "lora": "train low-rank adapters beside frozen weights: lora.rank=4 lora.alpha=32 lora.targets=[c_attn]",
    "device_profile": "memory, link and speed of every device: device_profile.memory_bytes=4e6",
}


def facts() -> dict[str, Any]:
    """Everything that help and lists say: the shared settings, the names of each axis, the loose nodes, the recipes."""
    from lilliput.algorithms import FedAvg
    from lilliput.recipes import RECIPES

    shared = [*top().values(), *(Field(name, Any, {} if name == PROFILE else None) for name in LOOSE if name in WORDS)]
    hours = {name: ", ".join(f"{s}: {v.hours:g} h" for s, v in r.versions.items()) for name, r in RECIPES.items()}
    return {
        "settings": told(shared, {**docs(FedAvg), **docs(Shared), **WORDS}),
        "axes": {
            axis.key: {
                "plural": axis.plural,
                "doc": axis.doc,
                "names": {choice.name: of_name(axis, choice.target) for choice in axis.nodes()},
            }
            for axis in AXES.values()
        },
        "nodes": {
            node: {"line": summary(target), "settings": told(fields_of(target).values(), docs(target))}
            for node, target in LOOSE.items()
        },
        "recipes": {name: f"{recipe.title} ({hours[name]})" for name, recipe in RECIPES.items()},
    }


def of_name(axis: Axis, target: Any) -> dict[str, Any]:
    """The line and the settings of what a name stands for; how clients train is told once, with the shared settings."""
    own = [f for f in axis.fields(target).values() if axis.key != "algorithm" or f.name not in training()]
    return {"line": summary(target), "settings": told(own, docs(target))}


def of_path(path: str) -> tuple[str, str, dict[str, Any]]:
    """(axis, name, the rest) of a user's own `file.py:Name`, on the axis that it looks made for."""
    name, target = AXES["algorithm"].choose(path)
    is_model = isinstance(target, type) and hasattr(target, "forward")
    axis = "algorithm" if hasattr(target, "round") else "model" if is_model else "dataset"
    return axis, name, of_name(AXES[axis], target)


def told(fields: Iterable[Field], words: Mapping[str, str]) -> Told:
    """Fields as data, with the words that say what each means."""
    return {
        f.name: [_default(f), " ".join(filter(None, (words.get(f.name, "").rstrip("."), _kind(f.hint))))]
        for f in fields
    }


def _kind(hint: Any) -> str:
    """The type in brackets, where it tells more than the default does."""
    telling = any(option in (int, float) or typing.get_origin(option) is Literal for option in members(hint))
    return f"({describe(hint)})" if telling else ""


def _default(f: Field) -> str:
    if f.default is REQUIRED:
        return "..."
    return show(list(f.default) if isinstance(f.default, tuple) else f.default)
