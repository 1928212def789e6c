"""Names for every value that a model takes and gives, and for every tensor that it has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


def mapped(value: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """Nested dictionaries, tuples and lists with `change(name, leaf)` for every leaf.

    The name of a leaf is the keys and positions that lead to it, joined by dots.
    """
    under = f"{name}." if name else ""
    if isinstance(value, dict):
        items = {key: mapped(x, change, f"{under}{key}") for key, x in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, tuple | list):
        inner = [mapped(x, change, f"{under}{i}") for i, x in enumerate(value)]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return change(name, value)


def mapped_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nesting with every tensor changed and all else as it is."""
    return mapped(value, lambda name, x: change(x) if isinstance(x, Tensor) else x)


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf by name."""
    if not isinstance(value, dict | tuple | list):
        return {name: value}
    under = f"{name}." if name else ""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {n: x for key, item in items for n, x in leaves(item, f"{under}{key}").items()}


def tensors(value: Any) -> dict[str, Tensor]:
    """Every tensor by name; the empty name stands for a value that is a single tensor."""
    return {name: x for name, x in leaves(value).items() if isinstance(x, Tensor)}


def states(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module, str]]:
    """Parameters and buffers of the state dict: (name, tensor, module, which of the module's dictionaries)."""
    for prefix, module in model.named_modules():
        for kind in ("_parameters", "_buffers"):
            for local, x in list(module.__dict__[kind].items()):
                if x is not None and local not in module._non_persistent_buffers_set:
                    yield (f"{prefix}.{local}" if prefix else local), x, module, kind


class Signature:
    """The arguments of a module's forward by name."""

    def __init__(self, module: nn.Module):
        while hasattr(module, "takes"):  # a client's part is called like the whole model
            module = module.takes  # type: ignore[assignment]
        parameters = inspect.signature(module.forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name; those beyond the signature are named by their position."""
        names = [*self.names, *(str(i) for i in range(len(self.names), len(args)))]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def unbind(self, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """(args, kwargs) to call with: by keyword wherever the signature allows it."""
        extra = [name for name in named if name.isdigit()]
        order = [n for n in [*(self.names if extra else self.by_position), *extra] if n in named]
        return tuple(named[n] for n in order), {n: x for n, x in named.items() if n not in order}
