"""Gradients as backward passes leave them: in their parameters' order of memory, and at times two in one memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.optim.sharded import is_sharded

ALONE = 2  # holders of a gradient's memory: itself, and what asks how many there are


def own(grad: Tensor) -> Tensor:
    """The gradient, copied if its memory holds another's too, so that it may be changed in place.

    Those of a and b in `a.view(2, 2) + b.view(2, 2)` share theirs.  Accumulation, clipping and sums over processes
    would change both (torch 2.13 does: its own accumulation gives each of them three times the gradient, not twice).
    """
    if is_sharded(grad) or grad.layout != torch.strided:
        return grad
    return grad.clone() if torch._C._storage_Use_Count(grad.untyped_storage()._cdata) > ALONE else grad
