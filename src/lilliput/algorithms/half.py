"""A part of the model in training: what both ends of split learning are made of.

No autograd graph survives between calls: a forward that is needed again is run again, under the same random labels and
without touching BatchNorm's statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from lilliput import random
from lilliput.ledger import metered
from lilliput.local import Trainer
from lilliput.tasks import Supervised, frozen_norms
from lilliput.tasks.resident import buffers as buffers_of
from lilliput.tasks.supervised import columns
from lilliput.training import Training
from lilliput.tree import Body, Tree

Out = TypeVar("Out")


class Half:
    """A part of the model in training: its resident module and its optimizer.

    held: `params`, `buffers` (without any, batches are normalised by themselves alone) and `opt`.
    """

    def __init__(
        self, part: Supervised, held: Body, config: Training, lr: float, role: str, device: torch.device | str = "cpu"
    ):
        self.part, self.held, self.device = part, held, torch.device(device)
        self.model = part.resident(held["params"], held.get("buffers"), role, self.device).train()
        self.trainer = Trainer(self.model, config, lr, only=held["params"])
        self.params = self.trainer.params
        if held.get("opt"):
            self.trainer.load(held["opt"])

    def output(self, batch: Any, key: Sequence[object], again: bool = False) -> Tensor:
        """The part's output on a batch.  `key` names its randomness; `again` says that this repeats a forward."""
        with self._rules(key, again):
            return self.part.outputs(self.model, batch)["logits"]

    def loss(self, batch: Any, key: Sequence[object], again: bool = False) -> Tensor:
        """The part's mean loss on (activations, labels)."""
        with self._rules(key, again):
            return self.part.loss(self.model, batch)[0]

    def cut(self, batch: Any, key: Sequence[object]) -> Tensor:
        """What the device sends of a batch: its part's output, without a graph."""
        with torch.no_grad():
            return self.metered([batch], lambda: plain(self.output(batch, key)))

    def pull(self, batch: Any, key: Sequence[object], gradient: Tensor) -> list[Tensor]:
        """The part's gradients from the one at its output, by running the batch's forward again."""
        again = self.output(batch, key, again=True)
        return gradients(again, self.params, gradient.to(again, copy=True))

    def metered(self, batches: Iterable[Any], run: Callable[[], Out], *others: Half) -> Out:
        """Run a step on batches, for the ledger to measure; `others` are held beside this part."""
        what = getattr(run, "func", run).__qualname__
        label = (what, *(x.shape for batch in batches for x in columns(batch)))
        return metered(label, lambda: sum(half.trainer.held_bytes() for half in (self, *others)), run)

    def apply(self, grads: Sequence[Tensor]) -> None:
        """One optimizer step by these gradients of the part's parameters."""
        self.trainer.apply(self.trainer.everything, list(grads))

    def after(self) -> Body:
        """`params`, `buffers` and `opt` as they are now, on the CPU, sharing no memory with those in use."""
        params = dict(zip(self.trainer.names, self.params, strict=True))
        return {
            "params": {n: plain(params[n]) for n in self.held["params"]},
            "buffers": self.buffers(),
            "opt": self.trainer.state(),
        }

    def buffers(self) -> Tree:
        """BatchNorm's statistics as they are now, of those that were given."""
        own = buffers_of(self.model)
        return {n: plain(own[n]) for n in self.held.get("buffers") or {}}

    @contextmanager
    def _rules(self, key: Sequence[object], again: bool) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(random.seeded(*key))
            if self.device.type == "cuda":  # dropout draws from the GPU's own generator there
                stack.enter_context(torch.random.fork_rng([self.device]))
                stack.enter_context(torch.cuda.device(self.device))
                torch.cuda.manual_seed(random.key(*key))
            if again or not self.held.get("buffers"):
                stack.enter_context(frozen_norms(self.model))
            if self.trainer.config.precision == "bf16":
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            yield


def plain(x: Tensor) -> Tensor:
    """A contiguous copy on the CPU, out of any graph."""
    return x.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)


def gradients(value: Tensor, inputs: Sequence[Tensor], at: Tensor | None = None, graph: bool = False) -> list[Tensor]:
    """d value / d inputs, times `at` where value is no scalar; `graph` lets the result be differentiated again."""
    return list(torch.autograd.grad(value, inputs, at, create_graph=graph, allow_unused=True, materialize_grads=True))
