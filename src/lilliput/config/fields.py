"""The fields of a node, read off the dataclass or the signature that it configures: there is no second description."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

REQUIRED = inspect.Parameter.empty
_KINDS = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting: its type as annotated, and its default (REQUIRED if it has none)."""

    name: str
    hint: Any
    default: Any


@functools.cache
def fields_of(target: Callable[..., Any]) -> Mapping[str, Field]:
    """The fields of a dataclass, or the parameters of a function or class that have names and defaults."""
    if isinstance(target, functools.partial):
        inner, given = fields_of(target.func), target.keywords
        return {name: dataclasses.replace(f, default=given.get(name, f.default)) for name, f in inner.items()}
    if not isinstance(target, type) and not inspect.isroutine(target):
        return {}  # a data set or a module of a user's own, ready made
    if dataclasses.is_dataclass(target) and isinstance(target, type):
        defaults = {f.name: _default(f) for f in dataclasses.fields(target) if f.init}
    else:
        parameters = inspect.signature(target).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.kind in _KINDS and p.default is not REQUIRED}
    hints = _hints(target)
    return {name: Field(name, _hint(hints.get(name), default), default) for name, default in defaults.items()}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else REQUIRED


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = target.__init__ if isinstance(target, type) and not dataclasses.is_dataclass(target) else target  # type: ignore[misc]
    try:
        return typing.get_type_hints(function)
    except Exception:  # an annotation may name what only a type checker imports; the default then tells the type
        return {}


def _hint(hint: Any, default: Any) -> Any:
    if hint is not None:
        return hint
    return type(default) if isinstance(default, bool | int | float | str | list | tuple | dict) else Any


def docs(target: Any) -> dict[str, str]:
    """What each field means: the comment on its line in the source, else its entry in the docstring."""
    target = target.func if isinstance(target, functools.partial) else target
    found: dict[str, str] = {}
    for base in reversed(inspect.getmro(target)) if isinstance(target, type) else (target,):
        for line in _source(base):
            if match := re.match(r"\s+(\w+)\s*:[^#]*#\s*(.+)", line):
                found[match[1]] = match[2].strip()
        found = _entries(base.__doc__ or "") | found
    return found


def _entries(docstring: str) -> dict[str, str]:
    """The `name: words` entries of a docstring, `a, b: words` for both; lines further in go on with the words."""
    found: dict[str, str] = {}
    names: list[str] = []
    indent = 0
    for line in inspect.cleandoc(docstring).splitlines():
        own = len(line) - len(line.lstrip())
        if names and line.strip() and own > indent:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        elif match := re.match(r"\s*`{0,2}(\w+(?:, \w+)*)`{0,2}(?:=\"(\w+)\")?: (.+)$", line):
            words = f"{match[2]}: {match[3]}" if match[2] else match[3]
            names, indent = [name for name in match[1].split(", ") if name not in found], own
            found |= dict.fromkeys(names, words.strip())
        else:
            names = []
    return found


def _source(target: Any) -> list[str]:
    try:
        return inspect.getsource(target).splitlines()
    except (OSError, TypeError):
        return []


def summary(target: Any) -> str:
    """The first sentence of an object's docstring, else of its module's: what `lilliput list` prints."""
    if isinstance(target, functools.partial) and "__doc__" in vars(target):
        return str(target.__doc__)
    inner = target.func if isinstance(target, functools.partial) else target
    text = inner.__doc__ if inner.__doc__ and not _made_by_dataclass(inner) else inspect.getmodule(inner).__doc__ or ""  # type: ignore[union-attr]
    paragraph = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)\]])\.\s", paragraph + " ")[0].rstrip(". ")


def _made_by_dataclass(target: Any) -> bool:
    return dataclasses.is_dataclass(target) and (target.__doc__ or "").startswith(f"{getattr(target, '__name__', '')}(")
