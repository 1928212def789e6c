"""Layers of settings read against one dataclass, for commands that choose no method: `lilliput pretrain`.

A field `model_options` is also written `model.…`: what a choice has of its own stands under the choice's key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lilliput.config.fields import Field, fields_of
from lilliput.config.layers import Layer
from lilliput.config.values import convert
from lilliput.core.registry import nearest, spelled

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
    name = (spelled(f"{first}{_OPTIONS}", known) if item else None) or spelled(first, known)
    if name is None:
        hint = nearest(first, known)
        hint = hint if hint.startswith("did you mean") else f"`lilliput {command} --help` tells what there is"
        raise ValueError(f"there is no setting {first!r}; {hint}")
    put(given, known[name], item, value, key if item else name)


def put(given: dict[str, Any], f: Field, item: str, value: Any, key: str) -> None:
    """Set a field, or with `item` one entry of a field that is a mapping, to a value of the field's type.

    Raises ValueError that names the key.
    """
    if not item:
        given[f.name] = convert(value, f.hint, key)
    elif isinstance(f.default, Mapping):
        given[f.name] = {**given.get(f.name, f.default), item: value}
    else:
        raise ValueError(f"there is no setting {key!r}: {f.name} has no parts")
