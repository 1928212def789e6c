"""Adafactor (Shazeer & Stern, ICML 2018, https://arxiv.org/abs/1804.04235): second moments as row and column means."""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.optim.projection import Projection, project
from lilliput.optim.rules import Moments, Options, Rule


def moments(shape: tuple[int, ...], options: Options) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state of a gradient of this shape."""
    first = {} if options["beta1"] is None else {"exp_avg": shape}
    if len(shape) < 2:
        return {**first, "exp_avg_sq": shape}
    return {**first, "exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], shape[-1])}


def direction(grad: Tensor, state: Moments, step: int, lr: float, options: Options) -> Tensor:
    """The gradient over the root of its factored mean square, clipped in its root mean square."""
    forget = step ** options["decay_rate"]  # 1 - beta2 at this step
    square = grad.square().add_(options["eps"][0])
    if "exp_avg_sq_row" in state:
        row = state["exp_avg_sq_row"].lerp_(square.mean(-1), forget)
        col = state["exp_avg_sq_col"].lerp_(square.mean(-2), forget)
        row_factor = (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        update = grad * row_factor * col.rsqrt().unsqueeze(-2)
    else:
        update = grad * state["exp_avg_sq"].lerp_(square, forget).rsqrt()
    update.div_((_rms(update) / options["clip_threshold"]).clamp_min_(1.0))
    return update if options["beta1"] is None else _momentum(update, state["exp_avg"], lr, options)


def _momentum(update: Tensor, average: Tensor, lr: float, options: Options) -> Tensor:
    official = options.get("compat") == "official"  # there the average is of updates already times lr
    average.lerp_(update * lr if official else update, 1 - options["beta1"])
    return average / lr if official and lr else average.clone()


def turn(state: Moments, change: Projection, step: int, options: Options) -> None:
    """The means of squares of a compressed dimension mix by the squared turn; the other dimension is untouched."""
    if change.left is not None:
        state["exp_avg_sq_row"].copy_(change.left.matrix.square() @ state["exp_avg_sq_row"])
    if change.right is not None:
        state["exp_avg_sq_col"].copy_(change.right.matrix.square() @ state["exp_avg_sq_col"])
    if "exp_avg" in state:
        state["exp_avg"].copy_(project(state["exp_avg"], change))


def rate(weight: Tensor, step: int, lr: float, options: Options) -> float:
    """lr, by the step count if `relative_step`, times the weight's root mean square if `scale_parameter`."""
    if options["relative_step"]:
        lr = min(1e-6 * step if options["warmup_init"] else 1e-2, step**-0.5)
    return lr * max(options["eps"][1], float(_rms(weight))) if options["scale_parameter"] else lr


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) / x.numel() ** 0.5


ADAFACTOR = Rule("adafactor", moments, direction, turn, rate, elementwise=False)
