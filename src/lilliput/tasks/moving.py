"""The state that a forward may change in a module: its buffers, even those in no state dict, and its plain attributes.

BatchNorm updates its statistics, spectral_norm its vectors, a schedule inside a model its counter.  A repeated forward
must start from the state that the first one started from, and leave no trace.  A module that serves several clients
must not carry one client's state to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_EVERY = frozenset(vars(nn.Module()))  # attributes of every module: parameters, hooks, its mode
_PLAIN = (Tensor, list, dict, set, bool, int, float, complex, str, type(None))


class Rest(NamedTuple):
    """The state of a module besides its parameters: buffers and plain attributes (`marks`), by full name."""

    buffers: dict[str, Tensor]
    marks: dict[str, Any]


class Movable:
    """Copies, compares and replaces a module's buffers and plain attributes.

    Plain attributes are tensors, numbers, strings, and lists, dicts and sets.  A tensor in a graph is detached, because
    the code that made it will make it again.
    """

    def __init__(self, module: nn.Module):
        self._owners = {f"{name}." if name else "": owner for name, owner in _owners(module)}
        shared = {id(owner._buffers): prefix for prefix, owner in reversed(self._owners.items())}
        self._with_buffers = {prefix: self._owners[prefix] for prefix in reversed(shared.values())}

    def places(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Each buffer's full name, its module, and its name in that module."""
        for prefix, owner in self._with_buffers.items():
            yield from ((prefix + own, owner, own) for own, x in owner._buffers.items() if x is not None)

    def held(self) -> Rest:
        """The current buffers and attributes: the objects themselves, not copies."""
        buffers: Any = {name: owner._buffers[own] for name, owner, own in self.places()}
        marks = {prefix + own: x for prefix, owner in self._owners.items() for own, x in _plain(owner).items()}
        return Rest(buffers, {name: _without_graph(x) for name, x in marks.items()})

    def taken(self, norms: bool = True) -> Rest:
        """Copies of the current state; `norms=False` skips the statistics of norms, which training only writes."""
        left_out = () if norms else _NormBase
        names = {name for name, owner, _ in self.places() if not isinstance(owner, left_out)}
        buffers, marks = self.held()
        return copied(Rest({name: x for name, x in buffers.items() if name in names}, marks))

    def moved(self, before: Rest) -> Rest:
        """The entries of `before` that have changed since."""
        now = self.held()
        kinds = zip(before, now, strict=True)
        return Rest(*({name: x for name, x in old.items() if not same(x, new.get(name))} for old, new in kinds))

    def put(self, rest: Rest) -> None:
        """Replace the module's state with exactly these objects."""
        for prefix, owner in self._with_buffers.items():
            for own in owner._buffers:
                owner._buffers[own] = rest.buffers.get(prefix + own)
        for prefix, owner in self._owners.items():
            for own in _plain(owner):
                if prefix + own not in rest.marks:
                    delattr(owner, own)
        for name, x in rest.marks.items():
            prefix, dot, own = name.rpartition(".")
            vars(self._owners[prefix + dot])[own] = x

    @contextmanager
    def unmoved(self, start: Rest | None = None) -> Iterator[None]:
        """Run a forward from the current state, or from `start`, and leave the module unchanged.

        The forward works on copies, so that tensors saved in a graph stay unchanged.
        """
        before, run = self.held(), self.taken()
        if start is not None:
            again = copied(start)
            run = Rest(run.buffers | again.buffers, run.marks | again.marks)
        self.put(run)
        try:
            yield
        finally:
            self.put(before)


def copied(rest: Rest) -> Rest:
    """A deep copy; a tensor that has two names stays one tensor."""
    copies: dict[int, Tensor] = {}

    def copy(x: Tensor) -> Tensor:
        return copies.setdefault(id(x), x.detach().clone())

    return Rest(_mapped(rest.buffers, copy), _mapped(rest.marks, copy))


def same(a: Any, b: Any) -> bool:
    """Whether two plain values are equal; meta tensors are if their shapes, dtypes and devices are."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return alike and (a.is_meta or type(a) is not Tensor or _equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(x, b[name]) for name, x in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b or (a != a and b != b))


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.layout == torch.sparse_coo:
        return torch.equal(a._indices(), b._indices()) and torch.equal(a._values(), b._values())
    if a.dtype == torch.complex32:  # torch does not compare it
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return torch.equal(a, b)


def with_leaves(module: nn.Module) -> dict[int, Tensor]:
    """A memo for `copy.deepcopy`, which refuses tensors in a graph: detached copies of such plain attributes."""
    values = [x for _, owner in _owners(module) for x in vars(owner).values() if isinstance(x, Tensor)]
    return {id(x): x.detach().clone() for x in values if x.grad_fn is not None}


def _owners(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name, each followed by the modules that it stores in a tuple and runs as its own code."""
    for name, owner in module.named_modules():
        yield name, owner
        for key, value in vars(owner).items():
            for i, x in enumerate(value) if isinstance(value, tuple) else ():
                if isinstance(x, nn.Module):
                    yield f"{name}.{key}:{i}" if name else f"{key}:{i}", x


def _plain(owner: nn.Module) -> dict[str, Any]:
    """Plain attributes, but for containers of parameters (an LSTM lists its weights), which stay the module's own."""
    return {
        name: x for name, x in vars(owner).items() if type(x) in _PLAIN and name not in _EVERY and not _has_parameter(x)
    }


def _has_parameter(x: Any) -> bool:
    if type(x) is dict:
        x = list(x.values())
    return any(map(_has_parameter, x)) if type(x) is list else isinstance(x, nn.Parameter)


def _without_graph(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) and x.grad_fn is not None else x


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """New plain containers, with `change` applied to each tensor in them."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        return {name: _mapped(x, change) for name, x in value.items()}
    if type(value) is list:
        return [_mapped(x, change) for x in value]
    return set(value) if type(value) is set else value
