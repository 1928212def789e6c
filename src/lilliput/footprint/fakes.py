"""Fake tensors: shapes and storages without numbers, on which the real code runs at no cost of memory.

What the code asks of a number (is the gradient finite?) is answered as in an ordinary step.  An accelerator that is not
here is stood in for by the meta device: it takes the same paths through our code, and what torch would do otherwise on
it is put right.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lilliput.optim import SubspaceOptimizer, dense, lowbit

CPU, ACCELERATOR = torch.device("cpu"), torch.device("meta")
# Tables that are made once for a device: none without numbers may stay behind.
TABLES = {
    "codebook": (256, torch.float32), "_nearest": (2**16, torch.uint8), "_weyl": (lowbit.PERIOD, torch.int32),
}  # fmt: skip
_autocast, _cross_entropy = torch.autocast, F.cross_entropy


@contextmanager
def faking(accelerator: bool, autocast: bool = False, padded: bool = False) -> Iterator[None]:
    """Make and compute fake tensors only.

    accelerator: functions as one runs them: attention without scores, and under autocast the loss in float32.
    padded: whether sequences have padding, so that attention needs a mask.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with ExitStack() as stack:
        for table, (shape, dtype) in TABLES.items():
            stack.enter_context(patch.object(lowbit, table, _table(shape, dtype)))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if accelerator:
            stack.enter_context(patch.object(F, "scaled_dot_product_attention", _attention))
            stack.enter_context(patch.object(torch, "autocast", _no_autocast_on_meta))
        if accelerator and autocast:  # on the CPU's fake tensors: the meta device knows no autocast
            stack.enter_context(patch.object(F, "cross_entropy", _float32_loss))
            stack.enter_context(patch.object(dense, "CHUNK", dense.LARGE_CHUNK))
            stack.enter_context(patch.object(SubspaceOptimizer, "_portions", lambda optimizer, params: [params]))
        masks = sys.modules.get("transformers.masking_utils")
        if masks is not None and not padded:  # it builds none in training, but does where it believes to be compiled
            stack.enter_context(patch.object(masks, "is_tracing", lambda tensor=None: False))
        yield


class Answers(TorchDispatchMode):
    """Answers for code that asks a fake tensor for its number."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype  # finite and not zero; yes; one
            return 1.0 if dtype.is_floating_point else True if dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


def twin(model: nn.Module, place: torch.device) -> nn.Module:
    """A copy with fake tensors; what is tied stays tied.  Nothing is read but shapes."""
    memo: dict[int, Any] = {id(b): blank(b, place) for b in model.buffers()}
    memo |= {id(p): nn.Parameter(blank(p, place), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def blank(x: Tensor, place: torch.device) -> Tensor:
    """An empty tensor like x elsewhere."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=place)


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
