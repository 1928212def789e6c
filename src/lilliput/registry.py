"""From a name to a thing: our own by name, a user's by file, by import path, or by entry point."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def normal(name: str) -> str:
    """A name without case, dashes and underscores, which do not tell names apart."""
    return name.lower().replace("-", "").replace("_", "")


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that name the closest known names: "; did you mean 'x'?", or the list where nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(normal(name), [normal(k) for k in known], 1)
    if close:
        return f"did you mean {next(k for k in known if normal(k) == close[0])!r}?"
    return f"choose one of {', '.join(known)}" if known else "there are none"


def is_path(name: str) -> bool:
    """Whether a name points to code of a user's own: `mine.py:Thing` or `package.module:Thing`."""
    return ":" in name


def resolve(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """What `name` stands for among things of a kind (algorithm, model, dataset, ...).

    In this order: a known name; `file.py:Name`; `package.module:Name`; an entry point of the group `lilliput.<kind>s`.
    Raises ValueError that names the nearest known one, or says why a user's own could not be loaded.
    """
    by_normal = {normal(k): v for k, v in known.items()}
    if normal(name) in by_normal:
        return by_normal[normal(name)]
    if is_path(name):
        return _attribute(kind, name)
    from importlib.metadata import entry_points

    points = {point.name: point for point in entry_points(group=f"lilliput.{kind}s")}
    for point in points.values():
        if normal(point.name) == normal(name):
            return point.load()
    hint = nearest(name, [*known, *points])
    raise ValueError(f"unknown {kind} {name!r}; {hint} (your own: file.py:Name or package.module:Name)")


def _attribute(kind: str, name: str) -> Any:
    where, _, attribute = name.rpartition(":")
    module = _file(kind, where) if where.endswith(".py") else _module(kind, where)
    if not hasattr(module, attribute):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ValueError(f"{where} has no {attribute!r}; {nearest(attribute, public)}")
    return getattr(module, attribute)


def _file(kind: str, where: str) -> Any:
    path = Path(where).resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {where!r} to take the {kind} from")
    # One module per file and process, under a name that pickling in a spawned worker can find again.
    label = f"lilliput_file_{path.stem}_{abs(hash(str(path))):x}"
    if label in sys.modules:
        return sys.modules[label]
    spec = importlib.util.spec_from_file_location(label, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[label] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[label]
        raise ValueError(f"{where} does not load: {type(error).__name__}: {error}") from error
    return module


def _module(kind: str, where: str) -> Any:
    try:
        return importlib.import_module(where)
    except ImportError as error:
        raise ValueError(f"the module {where!r} of the {kind} does not import: {error}") from error
