"""Layers of settings: what was typed, what a file says.  A layer maps dotted keys to values, in the order given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lilliput.config.aliases import meant
from lilliput.config.shared import top
from lilliput.config.values import parse
from lilliput.core.registry import normal

Layer = Mapping[str, Any]


def words(overrides: Iterable[str]) -> dict[str, Any]:
    """`key=value` words as a layer.  Raises ValueError for what is no setting."""
    layer: dict[str, Any] = {}
    for word in overrides:
        key, sign, text = word.partition("=")
        key = key.strip().lstrip("+")
        if not sign or not key or key.startswith("~"):
            raise ValueError(f"{word!r} is no setting; write key=value")
        layer.pop(key, None)  # the last word counts, in its own place
        try:
            layer[key] = parse(text)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return layer


def given(overrides: Iterable[str], file: str | None) -> list[dict[str, Any]]:
    """The layers of a command line: the configuration file, if any, below what was typed."""
    return [*([from_file(file)] if file is not None else []), words(overrides)]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings, as YAML has them, as a layer."""
    layer: dict[str, Any] = {}
    for key, value in tree.items():
        layer |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return layer


def from_file(path: str | Path) -> dict[str, Any]:
    """A YAML (or JSON) file as a layer.  Raises ValueError that names the file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no configuration file {path}")
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"{path} holds no settings; write lines of `key: value`")
    return flat(tree)


def named(layers: Iterable[Layer]) -> list[tuple[str, Any]]:
    """(key, value) of all layers, first to last, with top-level keys as we write them and published keys replaced."""
    ours = {normal(name): name for name in top()}
    found = []
    for layer in layers:
        for typed, given in layer.items():
            for key, value in meant(typed, given):
                first, dot, rest = key.partition(".")
                found.append((ours.get(normal(first), first) + dot + rest, value))
    return found
