"""From a name to a thing: our own by name, a user's by file, by import path, or by entry point."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

_users: set[str] = set()  # names of modules that came from a user's files


def normal(name: str) -> str:
    """A name without case, dashes and underscores, which do not tell names apart."""
    return name.lower().replace("-", "").replace("_", "")


def spelled(word: str, names: Iterable[str]) -> str | None:
    """The name that a user's word is, whatever its case, dashes and underscores; None if it is none of them."""
    return next((name for name in names if normal(name) == normal(word)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that name the closest known name, "did you mean 'x'?", or all of them where nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(normal(name), [normal(k) for k in known], 1)
    if close:
        return f"did you mean {next(k for k in known if normal(k) == close[0])!r}?"
    return f"choose one of {', '.join(known)}" if known else "there are none"


def described(words: str, make: Callable[..., Any], *args: Any, **options: Any) -> partial[Any]:
    """`partial(make, ...)` with a docstring of its own, for one of several names that share a factory."""
    made = partial(make, *args, **options)
    made.__doc__ = words
    return made


def is_path(name: str) -> bool:
    """Whether a name points to code of a user's own: `mine.py:Thing` or `package.module:Thing`."""
    return ":" in name


def group(kind: str) -> str:
    """The group of entry points in which packages offer things of a kind: `lilliput.models`, `lilliput.losses`."""
    return f"lilliput.{kind}{'es' if kind.endswith('s') else 's'}"


def resolve(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """What `name` stands for among things of a kind (algorithm, model, dataset, ...).

    In this order: a known name; `file.py:Name`; `package.module:Name`; an entry point of the kind's `group`.
    Raises ValueError that names the nearest known one, or says why a user's own could not be loaded.
    """
    if (own := spelled(name, known)) is not None:
        return known[own]
    if is_path(name):
        return _attribute(kind, name)
    from importlib.metadata import entry_points

    points = {point.name: point for point in entry_points(group=group(kind))}
    if (foreign := spelled(name, points)) is not None:
        return points[foreign].load()
    hint = nearest(name, [*known, *points])
    raise ValueError(f"unknown {kind} {name!r}; {hint} (your own: file.py:Name or package.module:Name)")


def _attribute(kind: str, name: str) -> Any:
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ValueError(f"{name!r} is half a {kind}; write file.py:Name or package.module:Name")
    module = _file(kind, Path(where).expanduser().resolve()) if where.endswith(".py") else _module(kind, where)
    if not hasattr(module, attribute):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ValueError(f"{where} has no {attribute!r}; {nearest(attribute, public)}")
    return getattr(module, attribute)


def _file(kind: str, path: Path) -> ModuleType:
    """The module of a file, under the file's own name and importable by it: a spawned worker unpickles it by name."""
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} to take the {kind} from")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    # Hiding a library from those who import it would be worse than a refusal.
    if path.stem not in _users and _exists(path.stem, str(path)):
        raise ValueError(f"{path.name} has the name of another module, {path.stem!r}; rename the file")
    _users.add(path.stem)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    return _execute(path)


def _exists(module: str, besides: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: a module without a spec, such as __main__
        return module in sys.modules
    if spec is not None and spec.origin is None:  # a folder without __init__: of a library if it is installed
        return any(place.startswith((sys.prefix, sys.base_prefix)) for place in spec.submodule_search_locations or ())
    return spec is not None and spec.origin != besides


def _execute(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    before, module = sys.modules.get(path.stem), importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(path.stem)
        if before is not None:
            sys.modules[path.stem] = before
        raise ValueError(f"{path} does not load: {type(error).__name__}: {error}") from error
    return module


def _module(kind: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except ImportError as error:
        raise ValueError(f"the module {where!r} of the {kind} does not import: {error}") from error
