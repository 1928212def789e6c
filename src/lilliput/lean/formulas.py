"""The cheap formulas: norms and activations as transformers and torch compute them, to the bit.

A formula without a gradient of its own is differentiated by autograd, as all of them are when that gradient is to be
differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Formula(NamedTuple):
    """`make(*sources, *options)`; `slope(grad, *sources, *options)` gives the gradient of each source."""

    make: Callable[..., Tensor]
    slope: Callable[..., tuple[Tensor, ...]] | None = None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rms_norm_slope(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    unit = wide * scale
    along = grad * unit
    mean = (along @ weight.to(along.dtype) / x.shape[-1]).unsqueeze(-1)
    gx = unit.mul_(-mean).addcmul_(grad, weight).mul_(scale)
    return gx.to(x.dtype), along.flatten(0, -2).sum(0).to(weight.dtype)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _swiglu_slope(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


# weight * x / rms(x) over the last axis, in float32 or wider; option: eps.  LLaMA, Mistral, Qwen.
RMS_NORM = Formula(_rms_norm, _rms_norm_slope)
# silu(gate) * up.
SWIGLU = Formula(_swiglu, _swiglu_slope)
# Option: "none" or "tanh", as torch's.
GELU = Formula(_gelu)
# Option: eps.
LAYER_NORM = Formula(_layer_norm)
