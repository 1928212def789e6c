"""Parameters that are not projected: the rule in full, by torch's fused kernel where that can be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lilliput.optim.adam import ADAM, fused_
from lilliput.optim.projection import shrink_
from lilliput.optim.rules import Moments, Options, Rule
from lilliput.optim.states import opened, working_dtype
from lilliput.optim.update import decays_after

# Elements at a time where states are coded: on a CPU the scratch stays in cache, elsewhere below half a gigabyte.
CHUNK = 2**17
LARGE_CHUNK = 2**24


def step_(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Mapping[str, Any]], rule: Rule, options: Options
) -> None:
    """One step of each parameter, in place; each state already counts it in `step`."""
    together: dict[int, list[int]] = {}
    for i, (p, grad, state) in enumerate(zip(params, grads, states, strict=True)):
        if rule is ADAM and options["states"] == "float32" and _fusable(p):
            together.setdefault(state["step"], []).append(i)
        else:
            _single(p, grad, state, rule, options)
    for step, some in together.items():
        weights = [params[i] for i in some]
        _fused(weights, [grads[i].contiguous() for i in some], [states[i] for i in some], step, options)


def _fusable(p: Tensor) -> bool:
    return p.is_contiguous() and p.dtype == working_dtype(p.dtype)


def _fused(
    weights: list[Tensor], grads: list[Tensor], states: Sequence[Mapping[str, Any]], step: int, options: Options
) -> None:
    lr, decay, after = float(options["lr"]), options["weight_decay"], decays_after(options)
    fused_(weights, grads, states, step, lr, 0.0 if after else decay, options)
    if after and decay:
        torch._foreach_mul_(weights, 1 - lr * decay)


def _single(p: Tensor, grad: Tensor, state: Mapping[str, Any], rule: Rule, options: Options) -> None:
    step, names = state["step"], rule.moments(tuple(p.shape), options)
    lr = rule.rate(p, step, float(options["lr"]), options)
    dtype, grad = working_dtype(p.dtype), grad.contiguous()  # moments lie so, and fused kernels read all alike
    if not (rule.elementwise and p.is_contiguous()):
        with opened(state, names, step) as moments:
            _move(p, grad.to(dtype), moments, step, lr, rule, options)
        return
    w, g = p.view(-1), grad.reshape(-1)
    for part in _parts(p):
        with opened(state, names, step, part) as moments:
            _move(w[part], g[part].to(dtype), moments, step, lr, rule, options)


def _move(w: Tensor, g: Tensor, moments: Moments, step: int, lr: float, rule: Rule, options: Options) -> None:
    if rule is ADAM and _fusable(w):
        _fused([w], [g], [moments], step, options)
        return
    u = rule.direction(g, moments, step, lr, options)
    keep = 1 - lr * options["weight_decay"]
    shrink_(w, keep).add_(u.sign_() if rule.sign else u, alpha=-lr * (keep if decays_after(options) else 1.0))


def _parts(p: Tensor) -> Iterator[slice]:
    size = CHUNK if p.device.type == "cpu" else LARGE_CHUNK
    return (slice(i, min(i + size, p.numel())) for i in range(0, p.numel(), size))
