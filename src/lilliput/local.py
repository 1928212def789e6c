"""Training on a device: one step, and `fit`, the loop over it that every local method uses.

Two step paths exist and give the same numbers: all gradients at once with foreach kernels, or (`per_layer`) each
parameter updated in a backward hook as soon as its gradient is there, so that no two gradients live at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lilliput import optim, tree, updates
from lilliput.fleet import Client
from lilliput.ledger import metered
from lilliput.tasks.recompute import checkpointed, frozen_norms
from lilliput.tasks.resident import buffers as buffers_of
from lilliput.tasks.supervised import columns, count, counted, labels, to_device
from lilliput.training import Training
from lilliput.tree import Body, Tree

Loss = Callable[[nn.Module, Any, Any], tuple[Tensor, dict[str, Tensor]]]


# Corrections change gradients before the optimizer sees them.  Each takes the names of some parameters, the parameters
# and their gradients, and changes the gradients in place.
Correction = Callable[[Sequence[str], list[Tensor], list[Tensor]], None]


def pull_to(x: Tree, mu: float) -> Correction:
    """Add mu * (w - x) to the gradient: the gradient of mu/2 * |w - x|^2 (FedProx, eq. 2)."""

    def correct(names: Sequence[str], params: list[Tensor], grads: list[Tensor]) -> None:
        torch._foreach_add_(grads, params, alpha=mu)
        torch._foreach_add_(grads, [x[name].to(g.device) for name, g in zip(names, grads, strict=True)], alpha=-mu)

    return correct


def shift(by: Tree) -> Correction:
    """Add a fixed tree to the gradient (SCAFFOLD adds c - c_i)."""

    def correct(names: Sequence[str], params: list[Tensor], grads: list[Tensor]) -> None:
        torch._foreach_add_(grads, [by[name].to(g.device) for name, g in zip(names, grads, strict=True)])

    return correct


class Trainer:
    """A model, the update of its parameters, and what happens to a gradient on the way."""

    def __init__(
        self, model: nn.Module, config: Training, lr: float, corrections: Sequence[Correction] = (), only: Any = None
    ):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and (only is None or n in only)]
        self.model, self.config, self.corrections = model, config, list(corrections)
        self.names = [n for n, _ in named]
        self.params: list[Tensor] = [p for _, p in named]
        self.everything = range(len(named))
        self.scale = 2.0**16 if config.precision == "fp16" else 1.0
        self.good_steps = 0
        self.update = updates.make(
            config.optimizer, self.params, lr, momentum=config.momentum, weight_decay=config.weight_decay,
            nesterov=config.nesterov, options=config.optimizer_options,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.params[0].device if self.params else torch.device("cpu")

    def state(self) -> Body:
        """The optimizer's state, on the CPU, sharing no memory with the one in use."""
        return tree.mapped(self.live(), lambda x: x.detach().to("cpu", copy=True))

    def live(self) -> Body:
        """The optimizer's state: the very tensors in use, which later steps change."""
        return {"update": self.update.state(), "scale": self.scale, "good_steps": self.good_steps}

    def projections(self) -> Tree:
        """The subspaces that the optimizer trains in, where they are to be averaged."""
        return optim.projections(self._subspace()) if self.config.optimizer_state == "average" else {}

    def _subspace(self) -> optim.SubspaceOptimizer:
        if not isinstance(self.update, updates.Wrapped):
            raise ValueError(f"optimizer_state=average needs a subspace optimizer, not {self.config.optimizer}")
        return self.update.subspace()

    def load(self, state: Body) -> None:
        if "projections" in state:
            optim.assign_projections(self._subspace(), state["projections"])
            return
        self.update.load(state["update"])
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])

    @torch.no_grad()
    def apply(self, indices: Sequence[int], grads: list[Tensor]) -> None:
        """Correct, clip and apply gradients of the parameters at these positions."""
        if self.corrections:
            names, params = [self.names[i] for i in indices], [self.params[i] for i in indices]
            for correct in self.corrections:
                correct(names, params, grads)
        if self.config.clip is not None:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            torch._foreach_mul_(grads, (self.config.clip / (norm + 1e-6)).clamp(max=1.0))
        self.update.apply(indices, grads)

    def held(self) -> list[Tensor]:
        """The tensors of the model and of its optimizer's state."""
        return [*self.model.parameters(), *self.model.buffers(), *tree.tensors(self.update.state())]


def step(
    model: nn.Module, opt: Trainer, loss: Loss, batch: Any, context: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """One optimizer step on one batch: (mean loss, metrics), both detached.

    model: in training mode; opt: its `Trainer`; loss: (model, batch, context) -> (scalar, metrics).
    """

    path = _step_in_hooks if opt.config.per_layer else _step_at_once
    label = (getattr(loss, "__qualname__", type(loss).__name__), *(x.shape for x in columns(batch)))
    with torch.enable_grad():
        return metered(label, opt.held, partial(path, model, opt, loss, batch, context))


def _forward(opt: Trainer, model: nn.Module, loss: Loss, batch: Any, context: Any) -> tuple[Tensor, dict[str, Tensor]]:
    if opt.config.precision == "float32":
        return loss(model, batch, context)
    with torch.autocast(opt.device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[opt.config.precision]):
        return loss(model, batch, context)


def _parts(batch: Any, pieces: int) -> Iterator[tuple[Any, float]]:
    """Micro-batches with their share of the batch's loss (see `counted`)."""
    if pieces == 1:
        yield batch, 1.0
        return
    total = counted(labels(batch))
    keys = list(batch) if isinstance(batch, dict) else None
    for columns_of_part in zip(*(x.chunk(pieces) for x in columns(batch)), strict=True):
        part = dict(zip(keys, columns_of_part, strict=True)) if keys else columns_of_part
        yield part, counted(labels(part)) / total


def _step_at_once(
    model: nn.Module, opt: Trainer, loss: Loss, batch: Any, context: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    if opt.config.accumulate == 1:
        value, metrics, grads = _gradients(model, opt, loss, batch, context, 1.0)
    else:
        value, metrics, grads = _accumulated(model, opt, loss, batch, context)
    if opt.config.precision != "fp16" or _unscale(opt, grads):
        opt.apply(opt.everything, grads)
    return value, metrics


def _gradients(
    model: nn.Module, opt: Trainer, loss: Loss, batch: Any, context: Any, share: float
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Loss and metrics of a batch, detached, and the gradients of `share` times the loss, times the fp16 scale."""
    value, metrics = _forward(opt, model, loss, batch, context)
    weight = share * opt.scale
    grads = torch.autograd.grad(value if weight == 1.0 else value * weight, opt.params, allow_unused=True)
    used = [torch.zeros_like(p) if g is None else g for p, g in zip(opt.params, grads, strict=True)]
    return value.detach(), {name: x.detach() for name, x in metrics.items()}, used


def _accumulated(
    model: nn.Module, opt: Trainer, loss: Loss, batch: Any, context: Any
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """The same over the micro-batches of a batch."""
    grads: list[Tensor] = []
    means: dict[str, Any] = {}
    for part, share in _parts(batch, opt.config.accumulate):
        value, metrics, new = _gradients(model, opt, loss, part, context, share)
        if grads:
            torch._foreach_add_(grads, new)
        else:
            grads = new
        for name, x in {**metrics, "": value}.items():
            means[name] = means.get(name, 0.0) + share * x
    return means.pop(""), means, grads


def _unscale(opt: Trainer, grads: list[Tensor]) -> bool:
    """Undo the loss scale; False if it overflowed, which skips the step and halves the scale."""
    torch._foreach_mul_(grads, 1.0 / opt.scale)
    if not all(bool(g.isfinite().all()) for g in grads):
        opt.scale, opt.good_steps = opt.scale / 2, 0
        return False
    opt.good_steps += 1
    if opt.good_steps % 2000 == 0:
        opt.scale *= 2
    return True


def _step_in_hooks(
    model: nn.Module, opt: Trainer, loss: Loss, batch: Any, context: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    parts = list(_parts(batch, opt.config.accumulate))
    means: dict[str, Any] = {}
    with ExitStack() as stack:
        for number, (part, share) in enumerate(parts):
            value, seen = _forward(opt, model, loss, part, context)
            if number == len(parts) - 1:
                for i, p in enumerate(opt.params):
                    stack.enter_context(p.register_post_accumulate_grad_hook(_apply_and_free(opt, i)))
            torch.autograd.backward(value * share if share != 1.0 else value, inputs=opt.params)
            for name, x in {**seen, "": value}.items():
                means[name] = means.get(name, 0.0) + share * x.detach()
    return means.pop(""), means


def _apply_and_free(opt: Trainer, i: int) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        grad, p.grad = p.grad, None
        assert grad is not None
        opt.apply([i], [grad])

    return hook


class Stats(NamedTuple):
    """What `fit` did: steps, examples seen, mean loss and metrics (see `counted`), buffers and projections after.

    `projections` are those of a subspace optimizer, under optimizer_state=average.
    """

    steps: int
    examples: int
    metrics: dict[str, float]
    buffers: Tree
    projections: Tree = {}  # noqa: RUF012 - a NamedTuple's default, never written to


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

    opt:         optimizer state to go on from, or `projections` alone; a fresh optimizer for None.
    buffers:     BatchNorm statistics to start from; without them batches are normalised by themselves alone.
    loss:        (model, batch, context) -> (scalar, metrics); the task's by default.
    corrections: applied to each step's gradients.
    after_step:  called with the model after each step.
    What is returned lies on the CPU and shares no memory with the model or the arguments.
    """
    model = client.task.resident(params, buffers, "train", client.device)
    trainer = Trainer(model, config, config.lr_at(client.round, client.rounds), corrections, only=params)
    if opt:
        trainer.load(opt)
    counts: list[int] = []
    seen: dict[str, list[tuple[int, Tensor]]] = {}
    with ExitStack() as stack:
        model.train()
        if not buffers:
            stack.enter_context(frozen_norms(model))
        if config.checkpointing:
            stack.enter_context(checkpointed(model))
        for batch in round_batches(client, config):
            weight = counted(labels(batch))  # where it is: to ask a GPU would be to wait for it
            batch = to_device(batch, client.device, model)
            value, metrics = step(model, trainer, loss or client.task.loss, batch, context)
            counts.append(count(batch))
            for name, x in {"loss": value, **metrics}.items():
                seen.setdefault(name, []).append((weight, x))
            if after_step is not None:
                after_step(model)
    means = {name: _mean(values) for name, values in seen.items()}
    own = buffers_of(model) if buffers else {}
    after = {n: p for n, p in zip(trainer.names, trainer.params, strict=True)}
    return (
        _plain(after, params), trainer.state() if config.optimizer_state == "keep" else {},
        Stats(len(counts), sum(counts), means, _plain(own, buffers or {}), trainer.projections()),
    )  # fmt: skip


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
