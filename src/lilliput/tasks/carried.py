"""What training can carry of a model: which parameters it can train, which buffers can travel, which have a mean.

What it cannot is refused by name before a run begins: a method would fail at it only in its first round.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lilliput.tasks.resident import buffers
from lilliput.wire.header import CODES

TRAINED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A change of narrower or unsigned whole numbers may not fit into them, and a mean of such changes is wrong.
AVERAGED = (*TRAINED, torch.complex64, torch.int64, torch.int32)


def check_model(model: nn.Module) -> None:
    """Raise ValueError for a trainable parameter, or a buffer of the model's state, that no method can carry.

    Frozen parameters and buffers registered with persistent=False never travel, and may be anything.
    """
    held = buffers(model)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(x):
            raise ValueError(f"{name!r} has no shape yet; run a batch through the model before making the task")
        if x.layout not in (torch.strided, torch.sparse_coo):
            raise ValueError(f"{name!r} is {_named(x.layout)}, which torch does not copy with its model; make it "
                             "to_sparse_coo()")  # fmt: skip
    for name, p in model.named_parameters():
        why = _untrainable(p) if p.requires_grad else None
        if why is not None:
            raise ValueError(f"parameter {name!r} {why}, or freeze it by requires_grad_(False)")
    for name, b in held.items():
        why = _untransferable(b)
        if why is not None:
            raise ValueError(f"buffer {name!r} {why}, or register it with persistent=False if it is the same for all")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ValueError(
                f"the gradient of {name + '.weight' if name else 'weight'!r} is sparse, which optimizers, clipping and "
                "averages here are not; make the embedding with sparse=False"
            )


def check_averaged(held: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a buffer that has no mean over clients."""
    for name, b in held.items():
        if b.dtype not in AVERAGED:
            kind = "true or false" if b.dtype == torch.bool else f"{_named(b.dtype)}, which overflows"
            raise ValueError(
                f"buffer {name!r} is {kind} and has no mean over clients; make it int64 or float32, set buffers=local "
                "or none, or register it with persistent=False if it never changes"
            )


def _untrainable(p: Tensor) -> str | None:
    if p.layout != torch.strided:
        return f"is sparse ({_named(p.layout)}), and only dense ones are trained; make it dense"
    if p.is_complex():
        return f"is {_named(p.dtype)}, and only real numbers are trained; hold torch.view_as_real of it"
    if p.dtype not in TRAINED:
        return f"is {_named(p.dtype)}, too narrow to train in; hold it in {', '.join(map(_named, TRAINED[1:]))}"
    return None


def _untransferable(b: Tensor) -> str | None:
    if b.layout != torch.strided:
        return f"is sparse ({_named(b.layout)}), and only dense ones travel; make it dense"
    if b.dtype not in CODES:
        return f"is {_named(b.dtype)}, which has no place in a file of tensors; hold it in another type"
    if b.is_floating_point() and b.dtype not in TRAINED:
        return f"is {_named(b.dtype)}, which has no arithmetic; hold it in {', '.join(map(_named, TRAINED[1:]))}"
    return None


def _named(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
