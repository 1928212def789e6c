"""What a call takes and gives, as nested dictionaries, tuples and lists with a name for every value in them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def mapped(value: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """The same nesting with `change(name, leaf)` for every leaf; names are keys and positions joined by dots."""
    under = f"{name}." if name else ""
    if isinstance(value, dict):
        items = {key: mapped(x, change, f"{under}{key}") for key, x in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, tuple | list):
        inner = [mapped(x, change, f"{under}{i}") for i, x in enumerate(value)]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return change(name, value)


def leaves(value: Any) -> dict[str, Any]:
    """Every leaf by name."""
    found: dict[str, Any] = {}

    def note(name: str, leaf: Any) -> None:
        found[name] = leaf

    mapped(value, note)
    return found


def tensors(value: Any) -> dict[str, Tensor]:
    """Every tensor by name; the one of a value that is nothing but a tensor is called ``."""
    return {name: x for name, x in leaves(value).items() if isinstance(x, Tensor)}


class Call:
    """How a module's forward names what it is called with: arguments by the names in its signature."""

    def __init__(self, module: nn.Module):
        while hasattr(module, "takes"):  # a client's part is called like the whole
            module = module.takes  # type: ignore[assignment]
        parameters = inspect.signature(module.forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name; those beyond the signature's under their position."""
        names = [*self.names, *(str(i) for i in range(len(self.names), len(args)))]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def unbind(self, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """(args, kwargs) to call with: those that the signature allows by keyword go so."""
        extra = [name for name in named if name.isdigit()]
        order = [n for n in [*(self.names if extra else self.by_position), *extra] if n in named]
        return tuple(named[n] for n in order), {n: x for n, x in named.items() if n not in order}
