"""Running a forward again: without moving BatchNorm's statistics, and instead of keeping activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_norms(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by the batch at hand and leave its running statistics alone.

    For a forward that repeats an earlier one, and for models that have no statistics to use.
    """
    norms = [(m, m.training, m.momentum, m.num_batches_tracked) for m in module.modules() if isinstance(m, _BatchNorm)]
    for m, *_ in norms:
        # Momentum 0 keeps the statistics to the bit, and the graph the same as that of the forward that is repeated.
        m.training, m.momentum, m.num_batches_tracked = True, 0.0, None
    try:
        yield
    finally:
        for m, training, momentum, counter in norms:
            m.training, m.momentum, m.num_batches_tracked = training, momentum, counter


class checkpointed:
    """Recompute each block's activations in the backward pass: the blocks are the elements of Sequentials and lists."""

    def __init__(self, model: nn.Module):
        from torch.utils.checkpoint import checkpoint

        self._checkpoint = checkpoint
        containers = [m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
        inner = {id(x) for c in containers for x in c for x in x.modules() if x is not None}
        # Outermost containers only: a block inside a block would be recomputed twice.
        self._blocks = [b for c in containers if id(c) not in inner for b in c if any(True for _ in b.parameters())]
        if not self._blocks:
            raise ValueError(f"{type(model).__name__} has no Sequential or ModuleList of blocks to checkpoint")

    def __enter__(self) -> None:
        for block in self._blocks:
            block.forward = self._wrap(block, block.forward)

    def __exit__(self, *error: object) -> None:
        for block in self._blocks:
            del block.forward

    def _wrap(self, block: nn.Module, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            # The second forward must not move BatchNorm's statistics again.
            contexts = lambda: (nullcontext(), frozen_norms(block))  # noqa: E731
            return self._checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        return run
