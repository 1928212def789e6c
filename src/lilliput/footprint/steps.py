"""The training steps whose footprint is taken: of a plain loop, as in pre-training, and of a federated client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lilliput import lean, optim, step
from lilliput.footprint.scratch import renew
from lilliput.labels import columns, labels
from lilliput.subspace import Columns, SubspaceLayer
from lilliput.tasks.recompute import checkpointed
from lilliput.tasks.supervised import cross_entropy
from lilliput.training import Training

Loss = Callable[[nn.Module, Any], Tensor]


class Steps(Protocol):
    """Training of one module."""

    params: list[Tensor]
    updates: tuple[Any, tuple[str, ...]]  # the object, and its methods, in which weights are updated

    def state(self) -> Any:
        """The optimizer's state, and what layers in a subspace have besides b: mappings, nested, down to tensors."""

    def prepare(self) -> None:
        """Make all optimizer state, without a forward pass, and let every subspace be renewed in the next step."""

    def step(self, batch: Any) -> None:
        """One optimizer step."""


class Loop:
    """Backward passes over the parts of a batch, then `optimizer.step()`; or updates in them, by `optim.per_layer`."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, accumulate: int = 1,
        per_layer: bool = False, checkpointing: bool = False, autocast: bool = False,
    ):  # fmt: skip
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.updates: tuple[Any, tuple[str, ...]] = (optimizer, ("step", "update", "prepare", "finish"))
        self.accumulate, self.per_layer = accumulate, per_layer
        self._recomputed: Any = checkpointed(model) if checkpointing else nullcontext()
        self._autocast = autocast
        if per_layer:
            if not isinstance(optimizer, optim.SubspaceOptimizer):
                raise ValueError(f"per_layer=true works with our own optimizers, not {type(optimizer).__name__}")
            optim.per_layer(optimizer, accumulate)

    def state(self) -> Any:
        return {"optimizer": self.optimizer.state, **kept(self.model)}

    def prepare(self) -> None:
        for p in self.params:
            p.grad = torch.empty_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad()
        renew(self.optimizer)

    def step(self, batch: Any) -> None:
        with self._recomputed:
            for part in _parts(batch, self.accumulate):
                with torch.autocast(self.params[0].device.type, torch.bfloat16) if self._autocast else nullcontext():
                    loss = self.loss(self.model, part)
                (loss / self.accumulate).backward()
                del loss
        if not self.per_layer:
            self.optimizer.step()
            self.optimizer.zero_grad()


class Client:
    """`step.step` as federated training calls it; loss: (model, batch, context) -> (scalar, metrics)."""

    def __init__(self, model: nn.Module, config: Training, loss: step.Loss):
        self.trainer = step.Trainer(model, config, config.lr)
        self.model, self.config, self.loss = model, config, loss
        self.params: list[Tensor] = self.trainer.params
        self.updates: tuple[Any, tuple[str, ...]] = (self.trainer, ("apply",))

    def state(self) -> Any:
        return {"optimizer": self.trainer.update.state(), **kept(self.model)}

    def prepare(self) -> None:
        for i, p in enumerate(self.params):
            self.trainer.apply([i], [torch.empty_like(p)])

    def step(self, batch: Any) -> None:
        with checkpointed(self.model) if self.config.checkpointing else nullcontext():
            step.step(self.model, self.trainer, self.loss, batch)


def kept(model: nn.Module) -> dict[str, Any]:
    """Of layers in a subspace, the duals, and the bases under the name `P`."""
    found: dict[str, Any] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SubspaceLayer):
            basis = layer.basis
            held = (basis.index, basis.sign) if isinstance(basis, Columns) else (basis.matrix,)
            found[name] = {"dual": layer.dual, "P": dict(enumerate(held))}
    return found


def supervised_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy in float32 of what the model says to a batch: a dict with `labels`, or (inputs, labels)."""
    if isinstance(batch, dict) and lean.patched(model):
        return lean.loss(model, batch)
    if isinstance(batch, dict):
        out = model(**{name: x for name, x in batch.items() if name != "labels"})
    else:
        out = model(batch[0])
    return cross_entropy((out["logits"] if isinstance(out, Mapping) else out).float(), labels(batch))


def _parts(batch: Any, pieces: int) -> Iterator[Any]:
    parts = zip(*(x.chunk(pieces) for x in columns(batch)), strict=True)
    return (dict(zip(batch, part, strict=True)) for part in parts) if isinstance(batch, dict) else iter(parts)
