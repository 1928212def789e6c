"""The training steps whose memory is measured."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lilliput import lean, optim
from lilliput.core.labels import labels
from lilliput.footprint.scratch import renew
from lilliput.subspace import Columns, SubspaceLayer
from lilliput.tasks.recompute import checkpointed
from lilliput.tasks.supervised import cross_entropy
from lilliput.training import step
from lilliput.training.passes import Loss
from lilliput.training.settings import Training
from lilliput.training.updates import Wrapped


class Steps:
    """Training of one module, as `run` and `pretrain` take their steps.

    config:    settings of the training; its optimizer and learning rate count only if no `optimizer` is given.
    loss:      (model, batch, context) -> (scalar, metrics).
    optimizer: of the module's parameters; ours or torch's.
    """

    def __init__(self, model: nn.Module, config: Training, loss: Loss, optimizer: torch.optim.Optimizer | None = None):
        self.model, self.config, self.loss, self.optimizer = model, config, loss, optimizer
        update = None if optimizer is None else Wrapped(optimizer, step.trained(model))
        self.trainer = step.Trainer(model, config, config.lr, update=update, hooks=self._hooks())
        self.params = self.trainer.params

    def _hooks(self) -> Any:
        if self.optimizer is None or not self.config.per_layer:
            return None
        if not isinstance(self.optimizer, optim.SubspaceOptimizer):
            raise ValueError(f"per_layer=true works with our own optimizers, not {type(self.optimizer).__name__}")
        return optim.per_layer(self.optimizer, self.config.accumulate)

    @property
    def updates(self) -> tuple[Any, tuple[str, ...]]:
        """The object that updates the weights, and the names of its methods that do so."""
        if self.optimizer is None:
            return self.trainer, ("apply",)
        return self.optimizer, ("step", "update", "prepare", "finish")

    def state(self) -> Any:
        """The optimizer's state, and the duals and bases of subspace layers: nested mappings of tensors."""
        state = self.trainer.update.state() if self.optimizer is None else self.optimizer.state
        return {"optimizer": state, **subspace_state(self.model)}

    def prepare(self) -> None:
        """Make all optimizer state without a forward pass, and make every subspace due for renewal in the next step."""
        self.trainer.apply(self.trainer.everything, [torch.empty_like(p) for p in self.params])
        if self.optimizer is not None:
            renew(self.optimizer)

    def step(self, batch: Any) -> None:
        """One optimizer step."""
        with checkpointed(self.model) if self.config.checkpointing else nullcontext():
            step.step(self.model, self.trainer, self.loss, batch)


def subspace_state(model: nn.Module) -> dict[str, Any]:
    """Of each subspace layer, its dual, the sum of the gradients it saw, and its basis under the name `P`."""
    by_layer: dict[str, Any] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SubspaceLayer):
            basis = layer.basis
            tensors = (basis.index, basis.sign) if isinstance(basis, Columns) else (basis.matrix,)
            by_layer[name] = {"dual": layer.dual, "seen": layer.seen, "P": dict(enumerate(tensors))}
    return by_layer


def supervised_loss(model: nn.Module, batch: Any, context: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in float32 of the model on a batch: a dict with `labels`, or (inputs, labels)."""
    if isinstance(batch, dict) and lean.patched(model):
        return lean.loss(model, batch), {}
    if isinstance(batch, dict):
        out = model(**{name: x for name, x in batch.items() if name != "labels"})
    else:
        out = model(batch[0])
    return cross_entropy((out["logits"] if isinstance(out, Mapping) else out).float(), labels(batch)), {}
