"""What a run is: all that decides its bits, in plain words by name, so that a message can say which of it differs.

The structure of a model is what its modules say of themselves (`extra_repr`), with a digest of the source of classes
and functions that are a user's own: comments and layout do not count, another activation inside a forward does.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_LIBRARIES = ("torch.", "transformers.", "lilliput.", "builtins", "functools", "operator")
_DEEP = 6  # how far into objects of a user's own


def identity(experiment: Any) -> dict[str, Any]:
    """What must be the same for a checkpoint to be this experiment's; all of it can be written as JSON."""
    e = experiment
    params = e.task.init()["params"]
    return {
        "algorithm": type(e.algorithm).__name__,
        "settings": _settings(e.algorithm),
        "model": {name: [*x.shape, str(x.dtype).removeprefix("torch.")] for name, x in params.items()},
        "structure": _structures(e.task),
        "loss": described(getattr(e.task, "criterion", None)),
        "data": _data(e.data),
        "profiles": _profiles(e.profiles),
        "seed": e.seed,
        "codec": described(e.codec),
    }


def differences(then: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, then, now) of what differs.  What is newer than the record and off is no difference."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in [*then, *(key for key in now if key not in then)]:
            inner = f"{name}.{key}" if name else str(key)
            if key not in then:
                if now[key]:
                    yield inner, None, now[key]
            elif key not in now:
                yield inner, then[key], None
            else:
                yield from differences(then[key], now[key], inner)
    elif then != now:
        yield name, then, now


def told(found: Iterator[tuple[str, Any, Any]] | list[tuple[str, Any, Any]], most: int = 3) -> str:
    """`its lr is 0.1, not 0.5; its seed is 0, not 1 (and 4 more)`: what differs, the first few of it."""
    found = list(found)
    shown = [f"its {name.removeprefix('settings.')} is {_short(then)}, not {_short(now)}" for name, then, now in found]
    more = f" (and {len(shown) - most} more)" if len(shown) > most else ""
    return "; ".join(shown[:most]) + more


def described(value: Any, deep: int = _DEEP) -> Any:
    """A value as JSON that is the same in every process: no addresses, tensors by their digest."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Tensor):
        return f"tensor {[*value.shape]} {_digest(_bytes(value))}"
    if isinstance(value, Mapping):
        return {str(key): described(item, deep - 1) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [described(item, deep - 1) for item in value]
    if isinstance(value, nn.Module):
        return structure(value)
    return _object(value, deep)


def structure(model: nn.Module) -> dict[str, Any]:
    """What each module of a tree is, by its name, and what a configuration says that the modules do not show."""
    found: dict[str, Any] = {
        name or "(model)": f"{_kind(type(m))}({_ADDRESS.sub('', m.extra_repr())})" for name, m in model.named_modules()
    }
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        passing = ("transformers_version", "dtype", "torch_dtype")
        given = json.loads(json.dumps(config.to_dict(), default=repr))
        found["config"] = {k: v for k, v in given.items() if not k.startswith("_") and k not in passing}
    return found


def _structures(task: Any) -> dict[str, Any]:
    """Of the model and, for a model that is cut, of every part."""
    model = getattr(task, "model", None)
    found = {"model": structure(model)} if isinstance(model, nn.Module) else {}
    parts = {name: getattr(part, "model", None) for name, part in vars(task).items() if name.endswith("_part")}
    return found | {name: structure(part) for name, part in parts.items() if isinstance(part, nn.Module)}


def _settings(algorithm: Any) -> Any:
    """A method's fields, but for trees of tensors that are values and not settings."""
    if not is_dataclass(algorithm):
        return described(algorithm)
    given = vars(algorithm)
    trees = {k for k, v in given.items() if isinstance(v, dict) and any(hasattr(x, "shape") for x in v.values())}
    return {k: described(v) for k, v in given.items() if k not in trees}


def _data(data: Mapping[int, Any]) -> dict[str, Any]:
    """How many clients and examples there are, and a digest of how each client's data is cut into batches."""
    words = functools.lru_cache(maxsize=None)(_in_words)
    cuts: set[str] = set()
    digest = hashlib.blake2b(digest_size=12)
    for c in sorted(data):
        cut = _cut(data[c])
        try:
            text = words(cut)
        except TypeError:  # a transform of a user's own may be unhashable
            text = _in_words(cut)
        cuts.add(text)
        digest.update(f"{c} {data[c].examples} {text}\n".encode())
    some = {"batches": cuts.pop()} if len(cuts) == 1 else {}
    examples = sum(batches.examples for batches in data.values())
    return {"clients": len(data), "examples": examples, **some, "division": digest.hexdigest()}


def _in_words(cut: tuple[Any, ...]) -> str:
    return json.dumps(described(cut))


def _cut(batches: Any) -> tuple[Any, ...]:
    """How data is cut into batches and changed on the way; of a class that does not say it, by its first batch."""
    if hasattr(batches, "cut"):
        return tuple(batches.cut())
    first: Any = next(iter(batches.epoch(None)), ())
    column = next(iter(first.values() if isinstance(first, dict) else first), ())
    return len(batches), len(column)


def _profiles(profiles: Any) -> Any:
    if not isinstance(profiles, Mapping):
        return described(profiles)
    return _digest(json.dumps([[c, described(profiles[c])] for c in sorted(profiles)]).encode())


def _object(value: Any, deep: int) -> Any:
    if isinstance(value, type):
        return _kind(value)
    if isinstance(value, functools.partial):
        parts = {"of": value.func, "args": value.args, "keywords": value.keywords}
        return {name: described(part, deep - 1) for name, part in parts.items()}
    if inspect.ismethod(value):
        return {"method": value.__name__, "of": described(value.__self__, deep - 1)}
    if inspect.isfunction(value):
        cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        inner = {name: described(_content(cell), deep - 1) for name, cell in cells.items()} if deep > 0 else {}
        return {"function": _kind(value), **inner} if inner else _kind(value)
    given = {f.name: getattr(value, f.name) for f in fields(value)} if is_dataclass(value) else _vars(value)
    if given is None or deep <= 0:
        return _ADDRESS.sub("", repr(value))
    return {"kind": _kind(type(value)), **{name: described(item, deep - 1) for name, item in given.items()}}


def _vars(value: Any) -> dict[str, Any] | None:
    return {name: item for name, item in vars(value).items() if name[0] != "_"} if hasattr(value, "__dict__") else None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _kind(target: Any) -> str:
    """The name of a class or function, and of a user's own a digest of its source."""
    return _named(target)


@functools.lru_cache(maxsize=4096)
def _named(target: Any) -> str:
    name = getattr(target, "__qualname__", type(target).__name__)
    module = getattr(target, "__module__", None) or ""
    if f"{module}.".startswith(_LIBRARIES):
        return name
    digest = _source(target)
    return f"{name} {digest}" if digest else name


def _source(target: Any) -> str:
    """A digest of the syntax of a class or function; of its code where there is no source that stands alone."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(target)))
        return _digest(ast.dump(tree).encode())
    except (OSError, TypeError, SyntaxError, ValueError):
        if isinstance(target, type):
            return "".join(_source(method) for method in vars(target).values() if inspect.isfunction(method))
        code = getattr(target, "__code__", None)
        return "" if code is None else _digest(code.co_code + repr((code.co_names, code.co_varnames)).encode())


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()


def _short(value: Any, most: int = 60) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
