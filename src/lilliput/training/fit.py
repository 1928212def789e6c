"""`fit`: the loop over training steps that every local method uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lilliput.core.fleet import Client
from lilliput.core.labels import count
from lilliput.core.tree import Body, Tree
from lilliput.tasks.recompute import checkpointed, frozen_norms
from lilliput.tasks.resident import buffers as buffers_of
from lilliput.tasks.supervised import to_device
from lilliput.training.passes import Loss, micro_batches
from lilliput.training.settings import Training
from lilliput.training.step import Correction, Trainer, ready, step_on


class Stats(NamedTuple):
    """What `fit` did: steps applied, examples seen, mean loss and metrics (see `counted`), buffers, projections.

    `projections` are those of a subspace optimizer, under optimizer_state=average.
    `skipped` counts steps that were left out because a gradient overflowed in fp16.
    `weights` are, by parameter, how far a gradient of one would have gone at lr 1; {} for an adaptive optimizer.
    """

    steps: int
    examples: int
    metrics: dict[str, float]
    buffers: Tree
    projections: Tree = {}  # noqa: RUF012 - a NamedTuple's default, never written to
    skipped: int = 0
    weights: dict[str, float] = {}  # noqa: RUF012

    @property
    def weight(self) -> float:
        """|a_i|_1, the weight of a gradient held constant over the round; 0 if none of its steps was applied."""
        return max(self.weights.values(), default=0.0)


def fit(
    client: Client,
    params: Tree,
    opt: Body | None = None,
    *,
    config: Training,
    buffers: Tree | None = None,
    loss: Loss | None = None,
    corrections: Sequence[Correction] = (),
    after_step: Callable[[nn.Module], None] | None = None,
    context: Any = None,
) -> tuple[Tree, Body, Stats]:
    """Train from `params` on the client's data: (parameters after, optimizer state after, stats).

    opt:         what a `Trainer` goes on from; a fresh optimizer for None.
    buffers:     BatchNorm statistics to start from; without them batches are normalised by themselves alone.
    loss:        (model, batch, context) -> (scalar, metrics); the task's by default.
    corrections: applied to each step's gradients.
    after_step:  called with the model after each step that was applied.
    What is returned lies on the CPU and shares no memory with the model or the arguments.
    Raises ValueError if every step overflowed in fp16.
    """
    model = client.task.resident(params, buffers, "train", client.device)
    trainer = Trainer(model, config, config.lr_at(client.round, client.rounds), corrections, params, config.lr)
    if opt:
        trainer.load(opt)
    examples = 0
    seen: dict[str, list[tuple[int, Tensor]]] = {}
    with ExitStack() as stack:
        model.train()
        if not buffers:
            stack.enter_context(frozen_norms(model))
        stack.enter_context(ready(model, trainer))
        if config.checkpointing:
            stack.enter_context(checkpointed(model))
        for batch in round_batches(client, config):
            examples += count(batch)
            # Labels are counted where the batch is: to ask a GPU would be to wait for it.
            parts = [(to_device(x, client.device, model), n) for x, n in micro_batches(batch, config.accumulate)]
            before = trainer.steps
            value, metrics = step_on(model, trainer, loss or client.task.loss, parts, context)
            weight = sum(n for _, n in parts)
            for name, x in {"loss": value, **metrics}.items() if weight else ():
                seen.setdefault(name, []).append((weight, x))
            if after_step is not None and trainer.steps > before:
                after_step(model)
    if trainer.skipped and not trainer.steps:
        raise ValueError(
            f"all {trainer.skipped} steps overflowed in fp16, so that nothing was learnt; use precision=bf16"
        )
    means = {name: _mean(values) for name, values in seen.items()}
    own = buffers_of(model) if buffers else {}
    after = {n: p for n, p in zip(trainer.names, trainer.params, strict=True)}
    moved = _plain(own, buffers or {})
    stats = Stats(trainer.steps, examples, means, moved, trainer.projections(), trainer.skipped, trainer.weights())
    return _plain(after, params), trainer.state(), stats


def _mean(values: Sequence[tuple[int, Tensor]]) -> float:
    """The mean of scalars by weight.  They leave their device here, once, not at every step."""
    scalars = torch.stack([x for _, x in values]).tolist()
    return sum(n * x for (n, _), x in zip(values, scalars, strict=True)) / sum(n for n, _ in values)


def _plain(tensors: Tree, like: Tree) -> Tree:
    """Copies on the CPU, contiguous, in the order of `like`."""
    return {name: tensors[name].detach().to("cpu", memory_format=torch.contiguous_format, copy=True) for name in like}


def round_batches(client: Client, config: Training) -> Iterator[Any]:
    """The batches that a round trains on, over all local epochs."""
    epochs = config.local_epochs if config.local_steps is None else config.local_steps
    taken = 0
    for epoch in range(epochs):
        for batch in client.data.epoch(client.generator("shuffle", epoch)):
            if taken == config.local_steps:
                return
            yield batch
            taken += 1
