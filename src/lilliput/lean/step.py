"""The loss of a language model on a batch, and the bytes that its forward pass keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.lean.modules import LABELS, patched


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of a causal model of transformers; logits never exist whole if `patch` knew the model.

    batch: `input_ids` and what else the forward takes, [examples, tokens], and `labels` of that shape, already shifted:
    the label at position t is the token at t + 1, and -100 does not count.  Wrapped (DDP, FSDP, PEFT) models work too.
    """
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    if not patched(model):
        logits = model(**inputs, use_cache=False).logits.flatten(0, -2)
        wide = torch.promote_types(logits.dtype, torch.float32)  # as transformers does
        return F.cross_entropy(logits.to(wide), batch["labels"].flatten())
    token = LABELS.set(batch["labels"])
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        LABELS.reset(token)


def activations(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor] = loss) -> int:
    """Bytes that the forward pass of this loss keeps for the backward pass: storages counted once, parameters not.

    Gradients of parameters are not counted either, as `cross_entropy` makes that of the last layer early.  Works under
    autocast, and on meta or fake tensors.
    """
    params = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage()._cdata] = x = x.detach()  # else the graph would keep itself, and never be freed
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss(model, batch)
    return sum(x.untyped_storage().nbytes() for key, x in saved.items() if key not in params)
