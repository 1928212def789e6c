"""Checks a model before a run: which parameters can be trained, which buffers can be sent, and which have a mean.

A method would fail at the others only in its first round; these checks name them before the run begins.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lilliput.tasks.resident import buffers
from lilliput.wire.header import CODES

TRAINED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A change of narrower or unsigned integers may overflow, and then the mean of such changes is wrong.
AVERAGED = (*TRAINED, torch.complex64, torch.int64, torch.int32)


def check_model(model: nn.Module) -> None:
    """Raise ValueError if a parameter cannot be trained, or a buffer of the model's state cannot be sent.

    Frozen parameters and buffers registered with persistent=False are never sent, and may be anything.
    """
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
    for name, b in buffers(model).items():
        why = _untransferable(b)
        if why is not None:
            raise ValueError(f"buffer {name!r} {why}, or register it with persistent=False if it is the same for all")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ValueError(
                f"the gradient of {name + '.weight' if name else 'weight'!r} is sparse, which optimizers, clipping and "
                "averages here are not; make the embedding with sparse=False"
            )


def check_averaged(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a buffer has no mean over clients."""
    for name, b in state.items():
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
        return f"is {_named(p.dtype)}, and only real numbers are trained; store torch.view_as_real of it"
    if p.dtype not in TRAINED:
        return f"is {_named(p.dtype)}, too narrow to train in; store it as {', '.join(map(_named, TRAINED[1:]))}"
    return None


def _untransferable(b: Tensor) -> str | None:
    if b.layout != torch.strided:
        return f"is sparse ({_named(b.layout)}), and only dense ones are sent; make it dense"
    if b.dtype not in CODES:
        return f"is {_named(b.dtype)}, which safetensors cannot store; use another dtype"
    if b.is_floating_point() and b.dtype not in TRAINED:
        return f"is {_named(b.dtype)}, which has no arithmetic; store it as {', '.join(map(_named, TRAINED[1:]))}"
    return None


def _named(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
