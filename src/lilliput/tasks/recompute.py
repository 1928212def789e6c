"""Forwards without an update of BatchNorm's statistics, and recomputation instead of stored activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lilliput.tasks.moving import Movable, Rest


@contextmanager
def frozen_norms(module: nn.Module) -> Iterator[None]:
    """Make BatchNorm (and InstanceNorm) normalise by the batch, without changing its running statistics.

    For models that have no statistics to use.
    """
    norms = [(m, m.training, m.momentum, m.num_batches_tracked) for m in module.modules() if isinstance(m, _NormBase)]
    for m, *_ in norms:
        # Momentum 0 keeps every bit of the statistics.
        m.training, m.momentum, m.num_batches_tracked = True, 0.0, None
    try:
        yield
    finally:
        for m, training, momentum, counter in norms:
            m.training, m.momentum, m.num_batches_tracked = training, momentum, counter


class checkpointed:
    """Recompute each block's activations in the backward pass; blocks are the elements of Sequentials and ModuleLists.

    If a block ran several times, each recomputation starts from the state of that time, and it changes no state.
    Raises ValueError if the model has no blocks.
    """

    def __init__(self, model: nn.Module):
        from torch.utils.checkpoint import checkpoint

        self._checkpoint = checkpoint
        containers = [m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
        inner = {id(x) for c in containers for x in c for x in x.modules() if x is not None}
        # Only the outermost containers, because a block inside a block would be recomputed twice.
        blocks = [b for c in containers if id(c) not in inner for b in c if any(True for _ in b.parameters())]
        self._blocks = {id(b): (b, Movable(b)) for b in blocks}.values()
        self._before: list[tuple[nn.Module, Any]] = []
        if not self._blocks:
            raise ValueError(f"{type(model).__name__} has no Sequential or ModuleList of blocks to checkpoint")

    def __enter__(self) -> None:
        self._before = [(block, vars(block).get("forward")) for block, _ in self._blocks]
        for block, movable in self._blocks:
            block.forward = self._wrap(movable, block.forward)

    def __exit__(self, *error: object) -> None:
        for block, forward in self._before:
            if forward is None:
                del block.forward
            else:
                block.forward = forward

    def _wrap(self, movable: Movable, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            before: list[Rest] = []
            contexts = lambda: (_noting(movable, before), _from(movable, before))  # noqa: E731
            return self._checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        return run


@contextmanager
def _noting(movable: Movable, before: list[Rest]) -> Iterator[None]:
    """Record the old values of the state that a forward changes, except norms' statistics, which it never reads."""
    start = movable.taken(norms=False)
    yield
    before.append(movable.moved(start))


@contextmanager
def _from(movable: Movable, before: list[Rest]) -> Iterator[None]:
    with movable.unmoved(before[0]):
        yield
