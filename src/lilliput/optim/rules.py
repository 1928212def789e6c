"""What a rule of optimization is, whatever it is applied to: a dense weight, a low-rank gradient, a projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lilliput.optim.projection import Projection

Moments = dict[str, Tensor]
Options = Mapping[str, Any]


def _same_rate(weight: Tensor, step: int, lr: float, options: Options) -> float:
    return lr


@dataclass(frozen=True)
class Rule:
    """A rule as pure functions.

    moments(shape, options): names and shapes of its state.
    direction(grad, moments, step, lr, options): u with `W -= lr * u`, moments updated in place; step counts from 1.
    turn(moments, change, step, options): the moments read in another basis, in place; step = steps taken so far.
    rate(weight, step, lr, options): the learning rate that acts.
    elementwise: u[i] depends on grad[i] alone.  sign: the update is the sign of u, taken last.
    """

    name: str
    moments: Callable[[tuple[int, ...], Options], dict[str, tuple[int, ...]]]
    direction: Callable[[Tensor, Moments, int, float, Options], Tensor]
    turn: Callable[[Moments, Projection, int, Options], None]
    rate: Callable[[Tensor, int, float, Options], float] = _same_rate
    elementwise: bool = True
    sign: bool = False
