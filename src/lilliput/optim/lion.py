"""Lion (Chen et al., NeurIPS 2023, https://arxiv.org/abs/2302.06675): the sign of an interpolated momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.optim.projection import Projection, project
from lilliput.optim.rules import Moments, Options, Rule


def moments(shape: tuple[int, ...], options: Options) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state of a gradient of this shape."""
    return {"exp_avg": shape}


def direction(grad: Tensor, state: Moments, step: int, lr: float, options: Options) -> Tensor:
    """b1 m + (1 - b1) g, whose sign is the update; then m = b2 m + (1 - b2) g."""
    beta1, beta2 = options["betas"]
    update = torch.lerp(grad, state["exp_avg"], beta1)
    state["exp_avg"].lerp_(grad, 1 - beta2)
    return update


def turn(state: Moments, change: Projection, step: int, options: Options) -> None:
    """Take the momentum to a new basis."""
    state["exp_avg"].copy_(project(state["exp_avg"], change))


LION = Rule("lion", moments, direction, turn, sign=True)
