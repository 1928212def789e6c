"""What a batch holds and which of its labels count: the one definition that losses, metrics and weights share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lilliput.core import tree

IGNORED = -100  # a label that does not count
SMALL = 256  # up to so many labels, Python counts faster than a torch kernel that has left the processor's caches


def columns(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch; an input that crosses a cut may itself be a dict of them."""
    for x in batch.values() if isinstance(batch, dict) else batch:
        if isinstance(x, Tensor):  # the common case, without the cost of a generator
            yield x
        else:
            yield from tree.tensors(x)


def cloned(batch: Any) -> Any:
    """A copy of a batch that stays in the autograd graph."""
    if isinstance(batch, dict):
        return tree.mapped(batch, Tensor.clone)
    return tuple(tree.mapped(x, Tensor.clone) for x in batch)


def count(batch: Any) -> int:
    """Examples in a batch."""
    return next(columns(batch)).shape[0]


def labels(batch: Any) -> Tensor:
    """The labels of a batch."""
    return batch["labels"] if isinstance(batch, dict) else batch[1]


def counted(y: Tensor) -> int:
    """How many labels count: the weight of a batch's mean loss and metrics beside another batch's.

    Every integer label counts unless it is -100, at any position.  With real labels every example counts as one.
    """
    if y.is_floating_point():
        return len(y)
    if type(y) is Tensor and y.is_cpu and y.dim() == 1 and y.numel() <= SMALL:
        listed = y.tolist()
        return len(listed) - listed.count(IGNORED)
    return int((y != IGNORED).sum())


def counted_in(data: Any) -> int:
    """How many labels of a client's data count: the client's weight in a mean over clients.

    data: `Batches`; without a `counted()` every example counts as one, because drawing an epoch might change the data.
    """
    return data.counted() if hasattr(data, "counted") else data.examples
