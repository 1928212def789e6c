"""The learning rate over the steps of a run, as a factor of its largest value."""

from __future__ import annotations

from lilliput.pretraining.config import Pretrain
from lilliput.training.settings import fallen


def factor(c: Pretrain, step: int) -> float:
    """What lr is multiplied by in a step, counted from 0: a warm-up from 0, then the schedule down to the minimum.

    cosine, linear: from 1 to min_lr_ratio over the steps after the warm-up.
    cosine_restarts: the cosine, which every `restart_every` steps is met again from zero (ReLoRA, Lialin et al., 2023).
    """
    warmup = c.warmup_steps
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / (c.total_steps - warmup))
    if c.schedule == "constant":
        return 1.0
    value = fallen("linear" if c.schedule == "linear" else "cosine", done, c.min_lr_ratio)
    if c.restart_every is None or step < c.restart_every:
        return value
    since = step % c.restart_every
    return value * min(1.0, since / c.restart_warmup) if c.restart_warmup else value
