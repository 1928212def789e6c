"""The loss of a language model from its hidden states, without its logits ever existing whole.

The logits of a chunk of tokens are made, turned into their own gradient, multiplied into the gradients of the hidden
states and of the weight, and forgotten.  So the gradients exist after the forward pass already: no product is done
twice, and the weight's gradient is one that the backward pass would make before any other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.core.labels import IGNORED
from lilliput.lean.remake import autocast_dtype, no_autocast, transformed

CHUNK = 2**23  # logits at a time, 32 MiB of float32: from there on larger products are hardly faster
STRIPE = 2**12  # classes whose gradient is added at a time under autocast
Parts = tuple[Tensor, Tensor, Tensor | None]  # hidden [tokens, n], weight [classes, n], bias [classes]
Grads = tuple[Tensor | None, ...]


def cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, tokens: int | None = None
) -> Tensor:
    """Mean cross-entropy of hidden [..., n] @ weight [classes, n].T + bias [classes] against int64 labels [...].

    Labels of -100 do not count; without any that counts it is nan, as torch's.  Under autocast products are in its type
    and the rest in float32.  tokens: logits are made for so many at a time, by default as many as fill 32 MiB.
    Raises ValueError if hidden and labels differ in shape.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels {list(labels.shape)} do not fit hidden states {list(hidden.shape)}, which have one axis more"
        )
    dtype = autocast_dtype(hidden)
    parts, labels = (hidden.flatten(0, -2), weight, bias), labels.flatten()
    if transformed():
        return _plain(parts, labels, dtype)
    size = tokens or max(64, CHUNK // weight.shape[0] // 64 * 64)  # whole tiles of the kernels
    return _CrossEntropy.apply(*parts, labels, size, torch.is_grad_enabled(), dtype)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, size: int, recorded: bool,
        dtype: torch.dtype | None,
    ) -> Tensor:  # fmt: skip
        ctx.size, ctx.dtype = size, dtype
        ctx.save_for_backward(hidden, weight, bias, labels)
        wanted = ctx.needs_input_grad[:3] if recorded else (False, False, False)
        with no_autocast(hidden, dtype):
            loss, ctx.grads = _sweep((hidden, weight, bias), labels, size, dtype, wanted)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        *parts, labels = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # to be differentiated again: by the plain operations
            return *_gradients(parts, labels, ctx.dtype, grad, wanted), None, None, None, None
        grads, ctx.grads = ctx.grads, None  # handed out once, so that they can be scaled in place
        if grads is None:  # asked for again
            _, grads = _sweep(parts, labels, ctx.size, ctx.dtype, wanted)
        scale = grad / _count(labels).clamp(min=1)
        scaled = [None if g is None else g.mul_(scale).to(x.dtype) for g, x in zip(grads, parts, strict=True)]
        return *scaled, None, None, None, None


def _sweep(
    parts: Parts, labels: Tensor, size: int, dtype: torch.dtype | None, wanted: tuple[bool, ...]
) -> tuple[Tensor, Grads]:
    """The mean loss, and those gradients of the summed loss that are wanted, in float32 or wider."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    grads = tuple(
        torch.zeros_like(x, dtype=wide) if x is not None and want else None
        for x, want in zip(parts, wanted, strict=True)
    )
    h, W, b = _cast(parts, dtype)
    losses = torch.empty_like(labels, dtype=wide)
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        of_rows = tuple(g if g is None or i else g[rows] for i, g in enumerate(grads))
        _chunk((h[rows], W, b), labels[rows, None], losses[rows], of_rows)
    return losses.sum() / _count(labels), grads


def _chunk(parts: Parts, labels: Tensor, losses: Tensor, grads: Grads) -> None:
    """Fill in the losses of a chunk, and add its gradients."""
    h, W, b = parts
    gh, gw, gb = grads
    counted = labels != IGNORED
    targets = labels.where(counted, 0)
    logits = F.linear(h, W, b)
    p = torch.softmax(logits, -1, dtype=losses.dtype)
    # log(sum(exp(logits))) from the likeliest class, where both are exact: no second pass of exponentials.
    total = logits.amax(1, keepdim=True) - p.amax(1, keepdim=True).log_()
    losses.copy_((total - logits.gather(1, targets)).where(counted, 0).squeeze(1))
    del logits
    slope = p.scatter_add_(1, targets, -torch.ones_like(targets, dtype=p.dtype)).to(W.dtype)
    # The small factors carry the mask, not the slope.
    if gh is not None:
        gh.copy_((slope @ W) * counted)
    if gw is not None and slope.dtype == gw.dtype:
        gw.addmm_(slope.mT, h * counted)
    elif gw is not None:  # by stripes of classes: the product, and on a CPU its copy in the wider type, stay small
        rows = h * counted
        for part, classes in zip(gw.split(STRIPE), slope.split(STRIPE, 1), strict=True):
            part += classes.mT @ rows
    if gb is not None:
        gb += (slope * counted).sum(0)


def _plain(parts: Parts, labels: Tensor, dtype: torch.dtype | None) -> Tensor:
    logits = F.linear(*_cast(parts, dtype))
    return F.cross_entropy(logits.to(torch.promote_types(parts[0].dtype, torch.float32)), labels)


def _gradients(
    parts: Parts, labels: Tensor, dtype: torch.dtype | None, grad: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """Of the plain operations, with their graph."""
    chosen = [x for x, want in zip(parts, wanted, strict=True) if x is not None and want]
    grads = iter(torch.autograd.grad(_plain(parts, labels, dtype), chosen, grad, create_graph=True))
    return [next(grads) if want else None for want in wanted]


def _cast(parts: Parts, dtype: torch.dtype | None) -> Parts:
    hidden, weight, bias = parts
    return (
        hidden.to(dtype or hidden.dtype),
        weight.to(dtype or weight.dtype),
        None if bias is None else bias.to(dtype or bias.dtype),
    )


def _count(labels: Tensor) -> Tensor:
    return (labels != IGNORED).sum()
