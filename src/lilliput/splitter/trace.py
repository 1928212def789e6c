"""In which order a model calls its modules, and which parameters each side has for a given cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lilliput.core import random
from lilliput.splitter.names import states, tensors
from lilliput.splitter.parts import ShapeForward


@contextmanager
def calls(model: nn.Module) -> Iterator[list[str]]:
    """After the block, the list has the name of each module that ran to its end, once for each time it was called.

    Modules of the other part are left out: they do not run, they only work out shapes.
    """
    with events(model) as seen:
        order: list[str] = []
        yield order
    other = {name for name, module in model.named_modules() if isinstance(module.__dict__.get("forward"), ShapeForward)}
    order.extend(name for name, entered in seen if not entered and name not in other and not _below(name, other))


@contextmanager
def events(model: nn.Module) -> Iterator[list[tuple[str, bool]]]:
    """Within the block, (name, True) is appended when a module is called and (name, False) when it returns."""
    seen: list[tuple[str, bool]] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter = lambda m, args, name=name: seen.append((name, True))  # noqa: E731
            leave = lambda m, args, out, name=name: seen.append((name, False))  # noqa: E731
            stack.enter_context(module.register_forward_pre_hook(enter))
            stack.enter_context(module.register_forward_hook(leave))
        yield seen


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a model, and leave its buffers and modes, and the random state, as they were."""
    buffers = [(x, x.detach().clone()) for x in model.buffers()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        with seeded("split", model):
            yield
    finally:
        with torch.no_grad():
            for x, before in buffers:
                x.copy_(before)
        for module, training in modes:
            module.training = training


@contextmanager
def seeded(label: str, *modules: nn.Module) -> Iterator[None]:
    """Random numbers by this label, wherever the modules are; afterwards as if none had been drawn."""
    gpus = {p.device for m in modules for p in m.parameters() if p.device.type == "cuda"}
    with random.seeded(label), torch.random.fork_rng(sorted(gpus, key=str), enabled=bool(gpus)):
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(random.key(label))
        yield


class Owners(NamedTuple):
    """State-dict names by side, and what the server replays of the client's without running it.

    client, server: names of parameters and buffers; together all of the model's.
    lent:           buffers of the server's that the client reads too.
    finished:       outermost modules that have returned before the cut.
    """

    client: frozenset[str]
    server: frozenset[str]
    lent: frozenset[str]
    finished: tuple[str, ...]


def owners(model: nn.Module, at: str, run: Any) -> Owners:
    """Which side owns what if the model is cut before module `at`; `run()` is one forward of the model.

    Raises ValueError if the cut is never reached, or if something that has parameters is used on both sides of it.
    """
    with torch.no_grad(), events(model) as seen:
        run()
    entries = [name for name, entered in seen if entered]
    if entries.count(at) != 1:
        times = f"called {entries.count(at)} times" if at in entries else "not called"
        raise ValueError(f"{at!r} is {times} in a forward; a cut needs a module that is called once")
    cut = seen.index((at, True))
    entered = [name for name, entered in seen[:cut] if entered]
    returned = {name for name, entered in seen[:cut] if not entered}
    running, after = set(entered) - returned, {name for name, entered in seen[cut:] if entered}
    _refuse_shared(model, at, returned & after)
    finished = dict.fromkeys(n for n in entered if n in returned and not _below(n, returned))
    sides: dict[str, set[str]] = {"client": set(), "server": set(), "running": set()}
    for name, *_ in states(model):
        called = _nearest(name.rpartition(".")[0], running | returned | after)
        sides["running" if called in running else "client" if called in returned else "server"].add(name)
    direct = _used_before(model, at, run, sides["running"])
    buffers = {name for name, x, _, kind in states(model) if kind == "_buffers"}
    rest = sides["running"] - direct
    return Owners(
        frozenset(sides["client"] | direct), frozenset(sides["server"] | rest), frozenset(rest & buffers),
        tuple(finished),
    )  # fmt: skip


def _refuse_shared(model: nn.Module, at: str, both: set[str]) -> None:
    for name in sorted(both):
        if any(True for _ in model.get_submodule(name).parameters()):
            raise ValueError(f"{name!r} is called both before and after {at!r}; a cut needs its blocks on one side")


def _below(name: str, others: set[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others if other != name)


def _nearest(name: str, called: set[str]) -> str:
    while name and name not in called:
        name = name.rpartition(".")[0]
    return name


def _used_before(model: nn.Module, at: str, run: Any, names: set[str]) -> set[str]:
    """Of parameters that modules still running at the cut use directly, those that what reaches the cut depends on."""
    params = {name: x for name, x in model.named_parameters() if name in names}
    if not params:
        return set()
    before: set[int] = set()
    flags = {name: p.requires_grad for name, p in params.items()}

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        before.update(_graph_leaves(tensors((args, kwargs)).values()))

    try:
        for p in params.values():
            p.requires_grad_(p.is_floating_point())
        with torch.enable_grad(), model.get_submodule(at).register_forward_pre_hook(enter, with_kwargs=True):
            run()
    finally:
        for name, p in params.items():
            p.requires_grad_(flags[name])
    return {name for name, p in params.items() if id(p) in before}


def _graph_leaves(outputs: Iterable[Tensor]) -> set[int]:
    """The identities of leaves that the graphs of these tensors end in."""
    stack = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen, ends = set(stack), {id(x) for x in outputs if x.grad_fn is None and x.requires_grad}
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            ends.add(id(node.variable))
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return ends
