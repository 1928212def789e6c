"""Pre-training a language model on one owner's text: the recipe that the subspace optimizers exist for.

lilliput.pretrain(model="llama_60m", data="c4", tokenizer="t5-base", optimizer="galore_adamw", lr=0.01)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lilliput.pretraining.config import Pretrain
from lilliput.pretraining.result import Result

__all__ = ["Pretrain", "Result", "pretrain"]


def pretrain(
    config: Pretrain | None = None, /, *, to: str | Path | None = None, resume: bool = False,
    reporters: Sequence[Any] = (), **settings: Any,
) -> Result:  # fmt: skip
    """Train a language model as the settings say (see `Pretrain`), alone or as one of torchrun's processes.

    to:        the run's folder: metrics.jsonl, checkpoint/ and at the end model/; nothing is written without one.
    resume:    go on from the checkpoint in that folder; the run ends with the bits that it would have had.
    reporters: as of an experiment: objects with start, progress, row and end.
    Raises ValueError or CheckpointError, before the first step, for what cannot be trained.
    """
    from lilliput.pretraining.start import start

    c = config if config is not None else Pretrain(**settings)
    if config is not None and settings:
        raise ValueError(f"{next(iter(settings))} is given beside a configuration; use dataclasses.replace")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count() if torch.cuda.is_available() else 0)):
        return start(c, None if to is None else Path(to), resume, reporters)
