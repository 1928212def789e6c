"""Online PCA: a projection that learns (Online Subspace Descent, Liang et al. 2024, https://arxiv.org/abs/2408.12857).

The loss of B (r, n) on a gradient G is ||G/|G| B^T B - G/|G| ||^2 + orthogonality ||B B^T - I||^2, and its gradient has
a closed form that shares Y = G B^T with the projection itself:

    (2/|G|^2) [ (Y^T Y) B + (B B^T) Z - 2 Z ] + 4 orthogonality (B B^T - I) B        with Z = Y^T G

It costs one product of m n r where autograd takes two or three of m n^2.  The left factor is the same, transposed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lilliput.optim.adafactor import ADAFACTOR
from lilliput.optim.adam import ADAM
from lilliput.optim.lion import LION
from lilliput.optim.projection import Projection
from lilliput.optim.rules import Moments, Options, Rule

SGD = Rule("sgd", lambda shape, options: {}, lambda grad, state, step, lr, options: grad, lambda *_: None)

# Torch's, bitsandbytes' and transformers' own defaults, which the published program leaves in place.
OPTIMIZERS: dict[str, tuple[Rule, dict[str, Any]]] = {
    "continuous": (ADAM, {"betas": (0.9, 0.999), "eps": 1e-8}),
    "continuous_adam8bit": (ADAM, {"betas": (0.9, 0.999), "eps": 1e-8, "states": "8bit"}),
    "continuous_lion": (LION, {"betas": (0.9, 0.99)}),
    "continuous_sgd": (SGD, {}),
    "continuous_adafactor": (
        ADAFACTOR,
        {"eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None, "relative_step": False,
         "scale_parameter": False, "warmup_init": False},
    ),
}  # fmt: skip
OFFICIAL_DECAY = {"continuous": 0.01}  # torch AdamW's default, which pulls P to zero


def gradient(G_mn: Tensor, R: Tensor, projection: Projection, norm2: Tensor, orthogonality: float = 0.0) -> Tensor:
    """The gradient for P, the one factor of a projection; R = project(G, projection), norm2 = ||G||^2 > 0."""
    if projection.left is not None:
        return _rows(G_mn.mT, R.mT, projection.left.matrix, norm2, orthogonality).mT
    assert projection.right is not None
    return _rows(G_mn, R, projection.right.matrix, norm2, orthogonality)


def _rows(G_mn: Tensor, Y_mr: Tensor, B_rn: Tensor, norm2: Tensor, orthogonality: float) -> Tensor:
    Z_rn = (Y_mr.mT.to(G_mn.dtype) @ G_mn).to(B_rn.dtype)
    BB_rr = B_rn @ B_rn.mT
    eye = torch.eye(len(BB_rr), dtype=BB_rr.dtype, device=BB_rr.device)
    # The penalty's 4 o (B B^T - I) B shares the product with B.
    with_B = (Y_mr.mT @ Y_mr).mul_(2.0 / norm2).add_(BB_rr - eye, alpha=4.0 * orthogonality)
    with_Z = BB_rr.sub_(eye, alpha=2.0).mul_(2.0 / norm2)
    return (with_B @ B_rn).addmm_(with_Z, Z_rn)


def step_(P: Tensor, grad: Tensor, moments: Moments, step: int, lr: float, proj_type: str, options: Options) -> None:
    """One step of P's own optimizer, in place; step counts from 1."""
    rule, constants = OPTIMIZERS[proj_type]
    constants = {**constants, "compat": None}
    update = rule.direction(grad.contiguous(), moments, step, lr, constants)
    lr = rule.rate(P, step, lr, constants)
    if options["compat"] == "official":
        P.mul_(1 - lr * OFFICIAL_DECAY.get(proj_type, 0.0))
    P.add_(update.sign() if rule.sign else update, alpha=-lr)
