"""Arithmetic over trees: flat dictionaries of named tensors (parameters, deltas, duals).

A tree is a value: every function returns a new one, except those whose name ends in an underscore.  torch's foreach
kernels process all tensors of a tree in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Tree = dict[str, Tensor]
# What is sent, stored and checkpointed: nested dicts of Body | Tree | Tensor | int | float | bool | str | None.
# (Any, because a type checker can build a recursive union but not read from one.)
Body = dict[str, Any]
# The errors that work on a malformed body may raise.
MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _pair(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    if a.keys() != b.keys():
        raise ValueError(f"trees differ in their names: {sorted(a.keys() ^ b.keys())[:5]}")
    return list(a.values()), [b[name] for name in a]


def add(a: Tree, b: Tree, alpha: float = 1.0) -> Tree:
    """a + alpha * b."""
    if not a and not b:
        return {}
    x, y = _pair(a, b)
    if alpha != 1.0:  # integer entries (batch counters) become real numbers; alpha= would refuse them
        y = list(torch._foreach_mul(y, alpha))
    return dict(zip(a, torch._foreach_add(x, y), strict=True))


def sub(a: Tree, b: Tree) -> Tree:
    """a - b; the delta of a change, if a is after it and b before it."""
    if not a and not b:
        return {}
    x, y = _pair(a, b)
    return dict(zip(a, torch._foreach_sub(x, y), strict=True))


def scale(a: Tree, factor: float) -> Tree:
    """factor * a."""
    return dict(zip(a, torch._foreach_mul(list(a.values()), factor), strict=True)) if a else {}


def add_(a: Tree, b: Tree, alpha: float = 1.0) -> Tree:
    """a += alpha * b, in place; returns a."""
    if a or b:
        x, y = _pair(a, b)
        torch._foreach_add_(x, y, alpha=alpha)
    return a


def copy_(a: Tree, b: Tree) -> Tree:
    """Overwrite a's tensors with b's, across devices and dtypes; returns a."""
    if a or b:
        x, y = _pair(a, b)
        with torch.no_grad():
            torch._foreach_copy_(x, y)
    return a


def clone(a: Mapping[str, Tensor], device: torch.device | str | None = None) -> Tree:
    """A copy that shares no memory with a, detached from any graph, on `device` (by default a's)."""
    return {name: x.detach().to(device, copy=True) for name, x in a.items()}


def zeros_like(a: Mapping[str, Tensor]) -> Tree:
    """Zeros with a's names, shapes and dtypes."""
    return {name: torch.zeros_like(x) for name, x in a.items()}


def mean(trees: Iterable[Tree], weights: Iterable[float] | None = None) -> Tree:
    """The weighted mean of trees, in one pass and with the memory of one tree; equal weights by default.

    Raises ValueError for no trees.
    """
    total: Tree | None = None
    mass = 0.0
    for tree, weight in zip(trees, weights, strict=True) if weights is not None else ((t, 1.0) for t in trees):
        total = scale(tree, weight) if total is None else add_(total, tree, weight)
        mass += weight
    if total is None:
        raise ValueError("the mean of no trees is undefined")
    return scale(total, 1.0 / mass)


def dot(a: Tree, b: Tree) -> Tensor:
    """The inner product over all names, a float64 scalar: sums of many small products need the precision."""
    x, y = _pair(a, b)
    return sum(
        (torch.sum(u * v, dtype=torch.float64) for u, v in zip(x, y, strict=True)), torch.zeros((), dtype=torch.float64)
    )


def norm(a: Tree) -> Tensor:
    """The Euclidean norm over all names, a float64 scalar."""
    return dot(a, a).sqrt()


def norms(xs: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norm of each real or complex tensor, in float32 at least: float16's squares overflow at 256."""
    return list(torch._foreach_norm([wide(x) for x in xs])) if xs else []


def wide(x: Tensor) -> Tensor:
    """A real tensor in float32 at least."""
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


def size(body: object) -> int:
    """The bytes of all tensors in a tree or body."""
    return sum(x.nbytes for x in tensors(body))


def tensors(body: object) -> Iterable[Tensor]:
    """Every tensor of a body, depth first, in the order of its keys."""
    if isinstance(body, Tensor):
        yield body
    elif isinstance(body, Mapping):
        for value in body.values():
            if isinstance(value, Tensor):  # the common case, without the cost of a generator
                yield value
            else:
                yield from tensors(value)


def paths(body: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Tensor]]:
    """Every tensor of a body with its path, the keys joined by "/", so that errors can name it."""
    for name, value in body.items():
        if isinstance(value, Tensor):
            yield above + name, value
        elif isinstance(value, Mapping):
            yield from paths(value, f"{above}{name}/")


def mapped(body: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The body with `change` applied to each tensor; names and other values stay."""
    if isinstance(body, Tensor):
        return change(body)
    return {name: mapped(value, change) for name, value in body.items()} if isinstance(body, Mapping) else body


def shapes(a: Mapping[str, Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes as a hashable key that tells architectures apart."""
    return tuple((name, tuple(x.shape)) for name, x in a.items())
