"""From settings to a run: text, tokenizer, model and checkpoint, each checked before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lilliput.data.corpus import corpora
from lilliput.data.tokenizer import tokenizer as load_tokenizer
from lilliput.experiment import checkpoint
from lilliput.experiment.logs import Log
from lilliput.lean.policy import tuned
from lilliput.pretraining import network, parallel, saved
from lilliput.pretraining.checks import check_memory, check_model, check_text
from lilliput.pretraining.config import Pretrain
from lilliput.pretraining.parallel import World
from lilliput.pretraining.result import Result
from lilliput.pretraining.run import Run


def start(c: Pretrain, folder: Path | None, resume: bool, reporters: Sequence[Any]) -> Result:
    """Run to the end: from the start, from the checkpoint in the folder, or from that of `continue_from`."""
    before = _before(c, folder, resume)
    # On an accelerator the setting for large products would mean TF32.
    with parallel.joined(c.device) as world, tuned(large_products=world.device.type == "cpu"):
        c.share(world.size)
        check_memory(c, world)
        train, validation, parted = corpora(c.data, c.validation, c.held_out, c.text_key)
        check_text(c, train, validation)
        tokenizer = load_tokenizer(c.tokenizer)
        model = network.build(c)
        check_model(c, model, tokenizer)
        run = Run(c, model, tokenizer, (train, validation), world, folder, reporters)
        run.parted = parted
        if before is not None:
            run.restore(before)
        if folder is not None:
            file, done = folder / "metrics.jsonl", run.progress.step
            run.log = world.by_the_first(lambda: Log.of(file, done, every=False))
            run.rows = run.log.rows if run.log is not None else []
        rows = run.to_the_end()
        if folder is not None:
            _export(model, tokenizer, folder, world)
        return Result(rows, model, folder)


def _before(c: Pretrain, folder: Path | None, resume: bool) -> saved.Saved | None:
    """The checkpoint to go on from.  Raises ValueError or CheckpointError if it is missing or in the way."""
    if resume and folder is None:
        raise ValueError("there is nothing to resume without a folder; give to=")
    own = saved.load(folder / "checkpoint") if folder is not None else None
    if own is not None and not resume:
        raise checkpoint.CheckpointError(f"{folder} holds a run already; resume it, or choose another folder")
    if own is not None or c.continue_from is None:
        return own
    found = saved.load(Path(c.continue_from) / "checkpoint")
    if found is None:
        raise ValueError(f"{c.continue_from} holds no checkpoint to go on from; name a run's folder")
    return found


def _export(model: nn.Module, tokenizer: Any, folder: Path, world: World) -> None:
    """Put the model where transformers reads it from: model/ with config.json, model.safetensors and the tokenizer."""
    model = network.plain(model)
    tensors = network.tensors(model)
    if not world.first:
        return
    from safetensors.torch import save_file

    place = folder / "model"
    beside = folder / ".model"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    save_file({n: x.cpu().contiguous() for n, x in tensors.items()}, beside / "model.safetensors", {"format": "pt"})
    if hasattr(model, "config"):
        model.config.save_pretrained(beside)  # type: ignore[union-attr, operator]
    tokenizer.save_pretrained(beside)
    shutil.rmtree(place, ignore_errors=True)
    beside.rename(place)
