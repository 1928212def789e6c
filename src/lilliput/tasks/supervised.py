"""Supervised learning with any module: the task behind image classification and next-token prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput import lean
from lilliput.core import tree
from lilliput.core.labels import IGNORED, counted, labels
from lilliput.core.layers import is_linear
from lilliput.core.tree import Body, Tree
from lilliput.tasks.carried import check_model
from lilliput.tasks.recompute import frozen_norms
from lilliput.tasks.resident import Resident, Residents, buffers

Outputs = dict[str, Any]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy: logits [..., classes] against int64 labels [...]; labels of -100 do not count.

    Without any that counts it is nan, as torch's; a training step leaves such a batch out (see `counted`).
    """
    if logits.dim() > 2:
        logits, labels = logits.flatten(0, -2), labels.flatten()
    return F.cross_entropy(logits, labels)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of labels that have the largest logit; labels of -100 do not count."""
    return (logits.argmax(-1) == labels)[labels != IGNORED].float().mean()


@dataclass(frozen=True)
class Derived:
    """A metric that is a function of another's mean over all examples, not a mean itself."""

    source: str
    of: Callable[[float], float]


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # the largest that a float holds is about exp(709)


perplexity = Derived("loss", _exp)


class Supervised:
    """A module, a loss and metrics.  A batch is (inputs, labels), or a dict with `labels` for a model of keywords.

    model:    any `nn.Module`; the weights it has are where training starts.  Its forward gives logits, or a dict of
              named outputs with `logits` (and `features`, `exits`).  Only parameters that require gradients take part.
    loss:     (logits, labels) -> scalar mean over the batch.  Cross-entropy of a language model that `lean.patch` knows
              is had without its logits ever being whole.
    metrics:  name -> (logits, labels) -> scalar mean over the batch, or what is `Derived` from such a mean.
    features: the submodule whose output counts as the features; the input of the last Linear by default.
    tokens_per_example: how many tokens an example of text has; where it is given, rows tell tokens per second.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor] | Derived] | None = None,
        features: str | None = None,
        tokens_per_example: int | None = None,
    ):
        self.model = model
        self.criterion = loss
        self.metrics = dict(metrics if metrics is not None else {"accuracy": accuracy} if loss is cross_entropy else {})
        self.features = features
        self.tokens_per_example = tokens_per_example
        self.inplace = False  # whether its forward is known to change what it is given
        self._residents = Residents(model)
        if features is not None and features not in dict(model.named_modules()):
            raise ValueError(f"features={features!r} names no submodule of {type(model).__name__}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_residents": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _residents=Residents(state["model"]))

    def init(self) -> Body:
        """The weights training starts from: trainable `params` and `buffers` (BatchNorm statistics).

        Raises ValueError for what no method can train or send (see `carried`).
        """
        check_model(self.model)
        params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {"params": _plain(params), "buffers": _plain(buffers(self.model))}

    def resident(
        self, params: Tree, held: Tree | None = None, role: str = "train", device: torch.device | str = "cpu"
    ) -> nn.Module:
        """The resident module of this architecture, loaded with params and buffers.

        The same module is loaded again by the next call of the same role; several live side by side under other roles.
        """
        return self.lendable(params, role, device).load(params, held)

    def lendable(self, params: Tree, role: str, device: torch.device | str = "cpu") -> Resident:
        """The resident of this architecture and role, to run on tensors of the caller's own without a copy."""
        return self._residents.get(params, role, torch.device(device))

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """What the model returns for a batch."""
        if isinstance(batch, dict):
            return model(**{k: v for k, v in batch.items() if k != "labels"})
        return model(batch[0])

    def outputs(self, model: nn.Module, batch: Any) -> Outputs:
        """Named outputs of a forward; `features` is filled in on demand by `with_features`."""
        out = self.forward(model, batch)
        return dict(out) if isinstance(out, dict) else {"logits": out}

    def with_features(self, model: nn.Module, batch: Any) -> Outputs:
        """Outputs that have `features` [examples, width] whatever the module returns."""
        seen: list[Tensor] = []
        if self.features is not None:
            module: nn.Module = model.get_submodule(self.features)
            hook = module.register_forward_hook(lambda m, args, out: seen.append(out))
        else:
            linears = [m for m in model.modules() if is_linear(m)]
            if not linears:
                raise ValueError(
                    f"{type(model).__name__} has no Linear layer; name the layer whose output is the features"
                )
            hook = linears[-1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        with hook:
            out = self.outputs(model, batch)
        if "features" not in out:
            if not seen:
                raise ValueError(f"the layer that gives the features of {type(model).__name__} was not reached")
            out["features"] = seen[-1].flatten(0, -2) if seen[-1].dim() > 2 else seen[-1]
        return out

    def loss(self, model: nn.Module, batch: Any, context: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(mean loss of the batch, metrics).  `context` is for losses that need more than the batch; unused here."""
        if self.criterion is cross_entropy and isinstance(batch, dict) and lean.patched(model):
            return lean.loss(model, batch), {}
        return self.loss_of(self.outputs(model, batch), batch), {}

    def loss_of(self, outputs: Outputs, batch: Any) -> Tensor:
        """Mean loss of outputs that a forward on this batch gave."""
        return self.criterion(outputs["logits"], labels(batch))

    @torch.no_grad()
    def evaluate(
        self, params: Tree, held: Tree | None, data: Any, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """Mean loss and metrics over all labels of `data` that count; a model without buffers uses batch statistics."""
        model = self.resident(params, held, "evaluate", device)
        totals: dict[str, Tensor | float] = {}
        mass = 0
        means = {"loss": self.criterion} | {n: m for n, m in self.metrics.items() if not isinstance(m, Derived)}
        with ExitStack() as stack:
            model.eval()
            if not held:
                stack.enter_context(frozen_norms(model))
            for batch in data.epoch(None):
                batch = to_device(batch, device, model)
                logits, y = self.outputs(model, batch)["logits"], labels(batch)
                n = counted(y)
                for name, metric in means.items() if n else ():
                    totals[name] = totals.get(name, 0.0) + n * metric(logits, y).double()
                mass += n
        if not mass:
            raise ValueError("there is nothing to evaluate on: the data has no examples, or no label that counts")
        found = {name: float(total) / mass for name, total in totals.items()}
        return found | {n: m.of(found[m.source]) for n, m in self.metrics.items() if isinstance(m, Derived)}


def _plain(params: Mapping[str, Tensor]) -> Tree:
    return {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in params.items()}


def to_device(batch: Any, device: torch.device | str, model: nn.Module) -> Any:
    """The batch where the model is; images in channels_last for models that have convolutions."""

    def move(x: Tensor) -> Tensor:
        x = x.to(device, non_blocking=True)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    if isinstance(batch, dict):
        return {name: move(x) for name, x in batch.items()}
    return tuple([move(x) if isinstance(x, Tensor) else tree.mapped(x, move) for x in batch])
