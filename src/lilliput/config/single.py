"""Layers of settings read against one dataclass, for commands that choose no method: `lilliput pretrain`.

A field `model_options` is also written `model.…`: what a choice has of its own stands under the choice's key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lilliput.config.fields import Field, fields_of
from lilliput.config.layers import Layer
from lilliput.config.values import convert
from lilliput.core.registry import nearest, normal

T = TypeVar("T")
_OPTIONS = "_options"


def read(target: Callable[..., T], *layers: Layer, command: str = "run") -> T:
    """An object of the dataclass with the fields that these layers give, the last counting most.

    Raises ValueError that names the setting, the rule and the remedy.
    """
    known = fields_of(target)
    given: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            _put(given, key, value, known, command)
    return target(**given)


def _put(given: dict[str, Any], key: str, value: Any, known: Mapping[str, Field], command: str) -> None:
    first, _, item = key.partition(".")
    f = _field(f"{first}{_OPTIONS}", known) or _field(first, known) if item else _field(first, known)
    if f is None:
        hint = nearest(first, known)
        hint = hint if hint.startswith("did you mean") else f"`lilliput {command} --help` tells what there is"
        raise ValueError(f"there is no setting {first!r}; {hint}")
    if not item:
        given[f.name] = convert(value, f.hint, f.name)
        return
    if not isinstance(f.default, Mapping):
        raise ValueError(f"there is no setting {key!r}: {f.name} has no parts")
    given[f.name] = {**given.get(f.name, {}), item: value}


def _field(name: str, known: Mapping[str, Field]) -> Field | None:
    return next((f for f in known.values() if normal(f.name) == normal(name)), None)
