"""One execution of pre-training: the loop over steps, from the start or a checkpoint to the end."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.core import random
from lilliput.core.labels import counted, labels
from lilliput.core.meter import process_memory
from lilliput.data.ahead import Ahead
from lilliput.data.corpus import Corpus
from lilliput.data.sequences import Batch, Sequences
from lilliput.experiment import checkpoint
from lilliput.experiment.logs import Log
from lilliput.pretraining import network, optimizers, parallel, saved
from lilliput.pretraining.config import Pretrain
from lilliput.pretraining.evaluation import evaluate
from lilliput.pretraining.parallel import World
from lilliput.pretraining.saved import Progress
from lilliput.pretraining.schedule import factor
from lilliput.tasks.recompute import checkpointed
from lilliput.training.passes import Part
from lilliput.training.step import ready, step_on

Row = dict[str, Any]


class Run:
    """What changes while a run goes: weights, optimizer, place in the text, and the lines of metrics.jsonl."""

    def __init__(
        self, c: Pretrain, model: nn.Module, tokenizer: Any, texts: tuple[Corpus, Corpus], world: World,
        folder: Path | None = None, reporters: Sequence[Any] = (),
    ):  # fmt: skip
        self.c, self.model, self.world, self.texts, self.tokenizer = c, model, world, texts, tokenizer
        self.folder, self.reporters = folder, list(reporters) if world.first else []
        self.log: Log | None = None  # of the first process, where there is a folder
        self.parted = ""  # how training and validation text were parted, in words
        self.part = c.share(world.size)
        self.progress, self.rows = Progress(), []  # type: ignore[var-annotated]
        self.identity = identity(c, tokenizer, texts)
        self.loss: nn.Module = network.LanguageLoss(model).to(world.device)
        if c.parallel == "fsdp" and world.size > 1:
            self.loss = parallel.shard(self.loss, world)
        self.optimizer = optimizers.build(model, c)
        self.trainer = optimizers.trainer(self.loss, self.optimizer, c, world)
        self._recomputed: Any = checkpointed(model) if c.checkpointing else nullcontext()
        self.stream = self._ahead()
        self._written, self._cost = time.perf_counter(), 0.0

    def stream_of(self, corpus: Corpus, **options: Any) -> Sequences:
        """This process's sequences of a text."""
        c, world = self.c, self.world
        given: dict[str, Any] = {"seed": c.seed, "shuffle": c.shuffle, "rank": world.rank, "world": world.size}
        return Sequences(corpus, self.tokenizer, c.max_length, packing=c.packing, **{**given, **options})

    def _ahead(self, **options: Any) -> Ahead:
        return Ahead(self.stream_of(self.texts[0], **options), self.part, self.c.prefetch)

    def restore(self, before: saved.Saved) -> None:
        """Go on from a checkpoint; raises CheckpointError for another run's."""
        before.check(self.identity)
        if before.progress.step > self.c.total_steps:
            raise checkpoint.CheckpointError(
                f"{before.folder} has done {before.progress.step} steps, more than steps={self.c.total_steps}; "
                f"ask for more"
            )
        if len(steps := set(self.world.gathered(before.progress.step))) > 1:
            raise checkpoint.CheckpointError(
                f"processes see checkpoints of steps {sorted(steps)}; share {before.folder}"
            )
        position = before.position(self.world.rank, self.world.size, self.c.packing)
        try:
            network.restore(self.model, before.read(before.model))  # type: ignore[arg-type]
            optimizers.load(self.optimizer, before.read(before.optimizer))
        except ValueError as error:
            raise checkpoint.CheckpointError(f"cannot go on from {before.folder}: {error}") from None
        self.progress, self.stream = before.progress, self._ahead(position=position)
        self._remark_jump(before)

    def _remark_jump(self, before: saved.Saved) -> None:
        """Warn if the learning rate of the next step is not the one that the run would have had."""
        was, will, step = before.progress.lr, self._lr(before.progress.step), before.progress.step
        if self.world.first and was and abs(will - was) > 0.01 * was:
            warnings.warn(
                f"lr is {will:.3g} in step {step + 1}, where the run had come to {was:.3g}: the schedule is laid out "
                f"anew; init={before.folder.parent} in a new run starts it from the beginning", stacklevel=4,
            )  # fmt: skip

    def to_the_end(self) -> list[Row]:
        """Take all steps that are left; the rows of metrics.jsonl."""
        for reporter in self.reporters:
            reporter.start(self, self.rows)
        if self.log is not None:
            self.log.begin()
        try:
            while self.progress.step < self.c.total_steps:
                self._step()
                self._report()
                self._save(due=self.progress.step == self.c.total_steps)
        finally:
            self.stream.close()
            for reporter in self.reporters:
                reporter.end(self.rows)
        return self.rows

    def _step(self) -> None:
        """One optimizer step on the next batch, by the mean loss over all processes' labels."""
        started, before = time.perf_counter(), self.progress
        self.loss.train()
        parts = [self._part() for _ in range(self.c.accumulate)]
        n = self.world.total(sum(n for _, n in parts))
        of = n / (self.world.size if self.c.parallel == "fsdp" else 1)  # FSDP2 averages over processes, where ours sums
        self._set_lr(before.step)
        # Dropout draws here: keyed by the step, so that there is no generator to save.
        torch.manual_seed(random.key(self.c.seed, "step", before.step, self.world.rank))
        with self._recomputed, ready(self.loss, self.trainer):
            share, _ = step_on(self.loss, self.trainer, _mean, parts if n else [], of=of)
        total = float(self.world.sum(share.double() * of))
        self.progress = replace(
            before, step=before.step + 1, tokens=before.tokens + n, loss=before.loss + total, labels=before.labels + n,
            examples=before.examples + self.c.batch_size, seconds=before.seconds + time.perf_counter() - started,
            lr=self._lr(before.step + 1),
        )  # fmt: skip

    def _part(self) -> Part:
        batch = self.stream.batch()
        assert batch is not None  # the training stream does not end
        return self.on_device(batch), counted(labels(batch))

    def on_device(self, batch: Batch) -> Batch:
        """The batch where the model is."""
        return {name: x.to(self.world.device, non_blocking=True) for name, x in batch.items()}

    def _lr(self, step: int) -> float:
        return self.c.lr * factor(self.c, step)

    def _set_lr(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(step)

    def _report(self) -> None:
        """A line of metrics.jsonl where one is due."""
        c, p = self.c, self.progress
        due = p.step % c.eval_every == 0 or p.step == c.total_steps
        for reporter in self.reporters:
            reporter.progress(p.step, 0, 0)
        if not due and p.step % c.log_every:
            return
        found: Row = {"round": p.step, **(evaluate(self) if due else {}), **self._measured()}
        self.progress = replace(p, loss=0.0, labels=0, examples=0, seconds=0.0)
        self._write(found)

    def _measured(self) -> Row:
        p = self.progress
        row: Row = {
            "train_loss": p.loss / max(p.labels, 1), "lr": self._lr(p.step - 1), "tokens": p.tokens,
            "epoch": self.stream.position.epoch, "seconds": p.seconds, "examples": p.examples,
            "tokens_per_second": p.labels / p.seconds, "examples_per_second": p.examples / p.seconds,
            "peak_memory_bytes": process_memory(self.world.device),
            "state_bytes": optimizers.state_bytes(self.optimizer),
        }  # fmt: skip
        skipped = optimizers.skipped(self.optimizer)
        return {**row, "skipped": skipped} if skipped else row

    def _write(self, row: Row) -> None:
        self.rows.append(row)
        if self.log is not None:
            self.log.write(json.dumps(row))
        for reporter in self.reporters:
            reporter.row(row)

    def _save(self, due: bool) -> None:
        """Save, if it is due anyway, or by the interval, or because it has become cheap."""
        if self.folder is None:
            return
        every = self.c.save_every
        if not due and every is None:
            cheap = self.world.first and time.perf_counter() - self._written >= 20 * self._cost
            due = self.world.agreed(cheap)  # one clock decides for all
        if due or (every is not None and self.progress.step % every == 0):
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        assert self.folder is not None
        started = time.perf_counter()
        positions = [saved.Position(**p) for p in self.world.gathered(asdict(self.stream.position))]
        model, optimizer = network.tensors(self.model), optimizers.state(self.optimizer)
        if self.world.first:
            saved.save(self.folder / "checkpoint", self.identity, self.progress, positions, model, optimizer)  # type: ignore[arg-type]
        self.world.wait()  # whoever goes on finds it written
        self._written = time.perf_counter()
        self._cost = self._written - started


def identity(c: Pretrain, tokenizer: Any, texts: tuple[Corpus, Corpus]) -> dict[str, Any]:
    """What must be the same for a run to go on: its model, its text and how that is cut."""
    words = hashlib.blake2b(json.dumps(sorted(tokenizer.get_vocab().items())).encode(), digest_size=12).hexdigest()
    same = ("model", "model_options", "max_length", "packing", "shuffle", "seed", "optimizer", "lora", "dtype")
    return {**{name: getattr(c, name) for name in same}, "tokenizer": words, "data": texts[0].fingerprint()}


def _mean(loss: nn.Module, batch: Batch, context: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return loss(**batch), {}
