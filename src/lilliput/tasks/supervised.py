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
    """Mean cross-entropy for classifiers and language models; labels of -100 do not count.

    Takes logits [..., classes] and int64 labels [...].  If no label counts it is nan, like torch's; a training step
    skips such a batch (see `counted`).
    """
    if logits.dim() > 2:
        logits, labels = logits.flatten(0, -2), labels.flatten()
    return F.cross_entropy(logits, labels)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of labels whose logit is the largest; labels of -100 do not count."""
    return (logits.argmax(-1) == labels)[labels != IGNORED].float().mean()


@dataclass(frozen=True)
class Derived:
    """A metric that is not a mean itself but a function of another metric's mean over all examples."""

    source: str
    of: Callable[[float], float]


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # the largest float is about exp(709)


perplexity = Derived("loss", _exp)


class Supervised:
    """A module, a loss and metrics.  A batch is (inputs, labels), or a dict with `labels` if the model takes keywords.

    model:    any `nn.Module`; training starts from its weights.  Its forward returns logits, or a dict of named outputs
              with `logits` (and `features`, `exits`).  Only parameters that require gradients are trained and sent.
    loss:     (logits, labels) -> scalar mean over the batch.  For language models that `lean.patch` supports,
              cross-entropy is computed in chunks, so the full logits never exist.
    metrics:  name -> (logits, labels) -> scalar mean over the batch, or a metric `Derived` from such a mean.
    features: the submodule whose output is the features; by default the input of the last Linear.
    tokens_per_example: how many tokens an example of text has; if given, rows include tokens per second.
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
        self.inplace = False  # whether its forward is known to change its input
        self._residents = Residents(model)
        if features is not None and features not in dict(model.named_modules()):
            raise ValueError(f"features={features!r} is not a submodule of {type(model).__name__}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_residents": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _residents=Residents(state["model"]))

    def init(self) -> Body:
        """The weights from which training starts: trainable `params` and `buffers` (BatchNorm statistics).

        Raises ValueError if a parameter cannot be trained or a buffer cannot be sent (see `carried`).
        """
        check_model(self.model)
        params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {"params": _plain(params), "buffers": _plain(buffers(self.model))}

    def resident(
        self, params: Tree, held: Tree | None = None, role: str = "train", device: torch.device | str = "cpu"
    ) -> nn.Module:
        """The resident module of this architecture, loaded with params and the buffers `held`.

        The next call with the same role loads the same module again; use different roles for modules side by side.
        """
        return self.lendable(params, role, device).load(params, held)

    def lendable(self, params: Tree, role: str, device: torch.device | str = "cpu") -> Resident:
        """The resident of this architecture and role, which can run on the caller's own tensors without a copy."""
        return self._residents.get(params, role, torch.device(device))

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """The model's output for a batch."""
        if isinstance(batch, dict):
            return model(**{k: v for k, v in batch.items() if k != "labels"})
        return model(batch[0])

    def outputs(self, model: nn.Module, batch: Any) -> Outputs:
        """The named outputs of a forward; only `with_features` adds `features`."""
        out = self.forward(model, batch)
        return dict(out) if isinstance(out, dict) else {"logits": out}

    def with_features(self, model: nn.Module, batch: Any) -> Outputs:
        """The named outputs with `features` [examples, width], even if the module does not return them.

        Raises ValueError if no layer gives the features.
        """
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
                raise ValueError(f"the layer that gives the features of {type(model).__name__} did not run")
            out["features"] = seen[-1].flatten(0, -2) if seen[-1].dim() > 2 else seen[-1]
        return out

    def loss(self, model: nn.Module, batch: Any, context: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(mean loss of the batch, metrics).  Ignores `context`, which is for losses that need more than the batch."""
        if self.criterion is cross_entropy and isinstance(batch, dict) and lean.patched(model):
            return lean.loss(model, batch), {}
        return self.loss_of(self.outputs(model, batch), batch), {}

    def loss_of(self, outputs: Outputs, batch: Any) -> Tensor:
        """The mean loss of the outputs of a forward on this batch."""
        return self.criterion(outputs["logits"], labels(batch))

    @torch.no_grad()
    def evaluate(
        self, params: Tree, held: Tree | None, data: Any, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """Mean loss and metrics over all labels of `data` that count; without buffers, norms use batch statistics.

        Raises ValueError if no label counts.
        """
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
        values = {name: float(total) / mass for name, total in totals.items()}
        return values | {n: m.of(values[m.source]) for n, m in self.metrics.items() if isinstance(m, Derived)}


def _plain(params: Mapping[str, Tensor]) -> Tree:
    return {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in params.items()}


def to_device(batch: Any, device: torch.device | str, model: nn.Module) -> Any:
    """Move a batch to the device; tensors of four dimensions become channels_last."""

    def move(x: Tensor) -> Tensor:
        x = x.to(device, non_blocking=True)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    if isinstance(batch, dict):
        return {name: move(x) for name, x in batch.items()}
    return tuple([move(x) if isinstance(x, Tensor) else tree.mapped(x, move) for x in batch])
