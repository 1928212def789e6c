"""A training step under fp16's loss scale, which torch.amp.GradScaler keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lilliput.training.passes import Loss, Part, backward, drop, separate

if TYPE_CHECKING:
    from lilliput.training.step import Trainer

SMALLEST_SCALE = 2.0**-24  # a gradient that overflows fp16 even so is not finite itself


def scaled(
    model: nn.Module, opt: Trainer, loss: Loss, parts: Sequence[Part], context: Any, of: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """A step under fp16's loss scale; one that overflows is left out.

    Until a first step is applied, the batch is repeated at half the scale instead: a round may have no other.
    """
    assert opt.scaler is not None
    before = [x.clone() for x in model.buffers()] if not opt.steps else []
    while True:
        try:
            means = backward(model, opt, loss, parts, context, of)
            applied = _unscaled(opt)
        finally:
            drop(opt.params)
        if applied:
            opt.steps += 1
            return means.result()
        if opt.steps or opt.scaler.get_scale() < SMALLEST_SCALE:
            opt.skipped += 1
            return means.result()
        for x, was in zip(model.buffers(), before, strict=True):
            x.copy_(was)


class _AsOptimizer:
    """A trainer, as GradScaler wants to see an optimizer."""

    def __init__(self, opt: Trainer):
        self.param_groups = [{"params": opt.params}]
        self.applied = False
        self._opt = opt

    def step(self) -> None:
        self._opt.apply(self._opt.everything, [p.grad for p in self._opt.params])
        self.applied = True


def _unscaled(opt: Trainer) -> bool:
    """Undo the loss scale and apply the gradients; False if one overflowed, which halves the scale."""
    assert opt.scaler is not None
    if all(p.grad is None for p in opt.params):
        return True
    separate(opt.params)
    seen: Any = _AsOptimizer(opt)
    opt.scaler.unscale_(seen)
    opt.scaler.step(seen)
    opt.scaler.update()
    return seen.applied
