"""Running a training step on fake tensors as it would run on the CPU, or on an accelerator that need not be there.

The meta device stands in for an accelerator: our code takes the same paths on it, and what torch would do differently
there is replaced.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from lilliput.fake import Fake
from lilliput.optim import SubspaceOptimizer, dense, lowbit

CPU, ACCELERATOR = torch.device("cpu"), torch.device("meta")
# Tables that are made once for a device and kept: fake ones must not stay behind.
TABLES = {
    "codebook": (256, torch.float32), "_nearest": (2**16, torch.uint8), "_weyl": (lowbit.PERIOD, torch.int32),
}  # fmt: skip
_autocast, _cross_entropy = torch.autocast, F.cross_entropy


@contextmanager
def faking(accelerator: bool, autocast: bool = False, padded: bool = False) -> Iterator[None]:
    """Make and compute fake tensors only.

    accelerator: run its functions: attention that keeps no scores, and under autocast the loss in float32.
    padded:      whether sequences have padding, so that attention needs a mask.
    """
    with ExitStack() as stack:
        for table, (shape, dtype) in TABLES.items():
            stack.enter_context(patch.object(lowbit, table, _table(shape, dtype)))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        stack.enter_context(Fake(everything=True))
        if accelerator:
            stack.enter_context(patch.object(F, "scaled_dot_product_attention", _attention))
            stack.enter_context(patch.object(torch, "autocast", _no_autocast_on_meta))
        if accelerator and autocast:  # on fake tensors of the CPU: the meta device has no autocast
            stack.enter_context(patch.object(F, "cross_entropy", _float32_loss))
            stack.enter_context(patch.object(dense, "CHUNK", dense.LARGE_CHUNK))
            stack.enter_context(patch.object(SubspaceOptimizer, "_portions", lambda optimizer, params: [params]))
        masks = sys.modules.get("transformers.masking_utils")
        if masks is not None and not padded:  # it makes no mask in training, unless it believes that it is traced
            stack.enter_context(patch.object(masks, "is_tracing", lambda tensor=None: False))
        yield


def _table(size: int, dtype: torch.dtype) -> Any:
    return lambda *key: torch.empty(size, dtype=dtype, device=key[-1])


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention by a kernel that keeps no scores; the meta device would take another."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _no_autocast_on_meta(device_type: str, *args: Any, **kwargs: Any) -> Any:
    return nullcontext() if device_type == "meta" else _autocast(device_type, *args, **kwargs)


def _float32_loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _cross_entropy(logits.float(), *args, **kwargs)
