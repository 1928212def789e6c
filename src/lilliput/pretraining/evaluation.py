"""The loss on the validation text, over all processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from lilliput.core.labels import IGNORED, counted, labels
from lilliput.data.corpus import count
from lilliput.data.sequences import Batch
from lilliput.training.autocast import autocast

if TYPE_CHECKING:
    from lilliput.pretraining.run import Run


@torch.no_grad()
def evaluate(run: Run) -> dict[str, Any]:
    """Mean loss per token and perplexity on the validation text, up to `eval_tokens`, in evaluation mode."""
    run.loss.eval()
    stream = run.stream_of(run.texts[1], shuffle=0, repeat=False)
    totals = torch.zeros(2, dtype=torch.float64, device=run.world.device)
    budget, seen = count(run.c.eval_tokens, "eval_tokens"), 0
    while seen < budget:
        batch = stream.batch(run.part)
        if not run.world.agreed(batch is not None):
            break
        # A process whose text has ended takes part in the others' forward passes with nothing that counts.
        batch = batch or _nothing(run.c.max_length)
        n, batch = counted(labels(batch)), run.on_device(batch)
        with autocast(run.world.device, run.c.precision):
            totals += torch.stack([run.loss(**batch).double() * n, totals.new_tensor(n)])
        seen += run.part * run.world.size * run.c.max_length
    loss, n = run.world.sum(totals).tolist()
    mean = loss / max(n, 1)
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "eval_tokens": int(n)}


def _nothing(length: int) -> Batch:
    ids = torch.zeros(1, length, dtype=torch.int64)
    return {"input_ids": ids, "labels": torch.full_like(ids, IGNORED)}
