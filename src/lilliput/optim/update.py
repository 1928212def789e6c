"""From a direction to new weights: through the subspace, around it, or by scaling the whole gradient.

project      W -= lr scale A^T U B                                       GaLore (Zhao et al., ICML 2024)
fira         W -= lr scale (A^T U B + L(phi (G - A^T R B)))              Fira (Chen et al. 2024, arXiv 2410.01623)
apollo       W -= lr scale L(phi G)       phi per channel              APOLLO (Zhu et al., MLSys 2025, 2412.05270)
apollo_mini  W -= lr scale L(phi G)       one phi per matrix

phi = |U| / |R| says how much the rule scales a channel inside the subspace; the channels are the rows or columns that
the projection leaves whole.  L limits the growth of the norm of its argument to a factor per step.  Our bases are
orthonormal, so the factor sqrt(n / r) that APOLLO's Gaussian ones need is already in phi.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.optim.projection import Projection, add_back_, back, shrink_
from lilliput.optim.rules import Options

TINY = 1e-30


def apply_(
    W_mn: Tensor,
    G_mn: Tensor | None,
    R: Tensor,
    U: Tensor,
    projection: Projection,
    lr: float,
    norm: Tensor | None,
    sign: bool,
    options: Options,
) -> None:
    """Move W in place; G may be missing for `project`; norm is the state of the limiter, changed in place."""
    keep, after = 1 - lr * options["weight_decay"], decays_after(options)
    alpha = -lr * (keep if after else 1.0) * (1.0 if sign else options["scale"])
    if options["update"] == "project" and not sign:
        add_back_(W_mn, U, projection, keep, alpha, product_dtype(options))
        return
    D_mn = _direction(G_mn, R, U, projection, norm, options)
    shrink_(W_mn, keep).add_(D_mn.sign_() if sign else D_mn, alpha=alpha)


def _direction(
    G_mn: Tensor | None, R: Tensor, U: Tensor, projection: Projection, norm: Tensor | None, options: Options
) -> Tensor:
    """The direction as an m x n matrix."""
    kind, dtype = options["update"], product_dtype(options)
    if kind == "project":
        return back(U, projection, dtype)
    assert G_mn is not None and norm is not None
    phi = _ratio(U, R, projection, per_channel=kind != "apollo_mini")
    if kind == "fira":
        outside = torch.sub(G_mn, back(R, projection, dtype)).mul_(phi)
        return _limit_(outside, norm, options["limiter"]).add_(back(U, projection, dtype))
    return _limit_(G_mn * phi, norm, options["limiter"])


def _ratio(U: Tensor, R: Tensor, projection: Projection, per_channel: bool) -> Tensor:
    """|U| / |R| along the compressed dimension, 0 where R is 0; one number for the whole if both dimensions are."""
    if not per_channel or (projection.left is not None and projection.right is not None):
        up, down = torch.linalg.vector_norm(U), torch.linalg.vector_norm(R)
    else:
        dim = 1 if projection.left is None else 0
        up, down = (torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (U, R))
    return torch.where(down > 0, up / down.clamp_min(TINY), torch.zeros_like(down))


def _limit_(x: Tensor, norm: Tensor, growth: float) -> Tensor:
    """x, scaled in place so that its norm is at most `growth` times the last one; norm becomes the new one."""
    now = torch.linalg.vector_norm(x).to(norm.dtype)
    allowed = torch.where(norm > 0, torch.minimum(now, growth * norm), now)
    norm.copy_(allowed)
    return x.mul_(allowed / now.clamp_min(TINY))


def decays_after(options: Options) -> bool:
    """Whether weights decay after the step; so do the published programs, Adafactor apart."""
    return options["compat"] == "official" and options["rule"] != "adafactor"


def product_dtype(options: Options) -> torch.dtype | None:
    """The dtype of products with the projection; None for the operands' own."""
    return torch.bfloat16 if options["precision"] == "bf16" else None
