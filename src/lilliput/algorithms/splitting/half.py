"""A part of the model in training: what both ends of split learning are made of.

No autograd graph survives between calls: a forward that is needed again is run again, under the same random labels,
from what the first one found in buffers and counters, and without moving them.  What crosses a cut is a payload: a
tensor, or a flat dict of tensors whose dimension 0 is the example.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from lilliput.core import random, tree
from lilliput.core.labels import cloned, columns
from lilliput.core.meter import metered
from lilliput.core.tree import Body
from lilliput.tasks import Supervised, frozen_norms
from lilliput.tasks.moving import Rest, same
from lilliput.training.autocast import autocast, exact_convolutions
from lilliput.training.passes import check_learns
from lilliput.training.settings import Training
from lilliput.training.step import Grads, Trainer, aligned, norm

Out = TypeVar("Out")
Payload = Any  # Tensor | Tree
_UNWRITTEN = (list, dict, set, complex)


class Half:
    """A part of the model in training: weights of its own, their optimizer, and a module to run them.

    held:   `params`, `buffers` (without any, batches are normalised by themselves alone) and `opt`; they are copied.
            `rest`, of a part in the middle of its round: buffers that are not carried, counters, and what these were
            before each forward that will be repeated.  `waiting`: see `hold`.
    trains: False for a part that only passes gradients on.
    undecayed: parameters that `weight_decay` is not for, because the other end has them too and decays them.

    All halves of a part and role share the module, which is lent the weights of the one whose turn it is.
    """

    def __init__(
        self, part: Supervised, held: Body, config: Training, lr: float, role: str,
        device: torch.device | str = "cpu", trains: bool = True, peak: float | None = None,
        undecayed: Collection[str] = (),
    ):  # fmt: skip
        self.part, self.held, self.device = part, held, torch.device(device)
        self._resident = part.lendable(held["params"], role, self.device)
        self.model = self._resident.module.train()
        self._inplace = part.inplace or any(getattr(module, "inplace", False) for module in self.model.modules())
        self._given = held.get("buffers") or {}
        rest = held.get("rest") or {"buffers": {}, "marks": {}, "before": {}}
        self._before = {key: Rest(**found) for key, found in rest["before"].items()}
        buffers = self._given | rest["buffers"]
        self._weights, self._rest = self._resident.copied(held["params"], buffers, rest["marks"])
        self._take()
        self._fixed = [p for name, p in self.model.named_parameters() if name not in self._weights]
        only = held["params"] if trains else ()
        self.trainer = Trainer(self.model, config, lr, only=only, peak=peak, undecayed=undecayed)
        self.params = self.trainer.params
        if held.get("opt"):
            self.trainer.load(held["opt"])
        self._waiting: Body = held.get("waiting", {})

    def _take(self) -> None:
        self._resident.lend(self, self._weights, self._rest)

    def output(self, batch: Any, key: Sequence[object], again: bool = False) -> Payload:
        """The part's output on a batch.  `key` names its randomness; `again` repeats the forward that `sent` ran."""
        with self._rules(key, again):
            return self.part.forward(self.model, self._own(batch))

    def _own(self, batch: Any) -> Any:
        """The batch, or a copy for a part that may change it: it is another's, and torch changes no leaf in place."""
        return cloned(batch) if self._inplace else batch

    def loss(self, batch: Any, key: Sequence[object], again: bool = False) -> Tensor:
        """The part's mean loss on (payload, labels); `again` leaves the part as it is."""
        with self._rules(key, again):
            return self.part.loss(self.model, self._own(batch))[0]

    def sent(self, batch: Any, key: Sequence[object]) -> Payload:
        """What goes to the other end of a batch: the part's output, without a graph."""
        self._take()
        before = self._resident.movable.taken(norms=False)
        with torch.no_grad():
            out = self.metered([batch], lambda: plain(self.output(batch, key)))
        moved = self._resident.movable.moved(before)
        if any(moved):
            self._before[str(key)] = moved
        return out

    def pull(self, batch: Any, key: Sequence[object], gradient: Payload, *inputs: Tensor) -> Grads:
        """Gradients of the part's parameters, and of `inputs`, from the one at its output; the forward is run again."""
        again = self.output(batch, key, again=True)
        pairs = [(again, gradient)] if isinstance(gradient, Tensor) else [(again[n], g) for n, g in gradient.items()]
        pairs = [(x, torch.empty_like(x).copy_(g)) for x, g in pairs if x.requires_grad]
        return gradients([x for x, _ in pairs], [*self.params, *inputs], [g for _, g in pairs])

    def metered(self, batches: Iterable[Any], run: Callable[[], Out], *others: Half) -> Out:
        """Run a step on batches, for the ledger to measure; `others` are held beside this part."""
        what = getattr(run, "func", run).__qualname__
        label = (what, *(x.shape for batch in batches for x in columns(batch)))
        return metered(label, lambda: [x for half in (self, *others) for x in half._tensors()], run)

    def _tensors(self) -> Iterator[Tensor]:
        yield from self._weights.values()
        yield from self._rest.buffers.values()
        yield from self._fixed
        yield from tree.tensors(self.trainer.update.state())
        yield from tree.tensors(self._waiting)

    def apply(self, grads: Grads, squares: float | None = None) -> None:
        """One optimizer step by these gradients of the part's parameters; one without a gradient is left alone.

        squares: the squared norm to clip by, where other parts' gradients are clipped together with these.
        """
        self._take()
        if self.params:
            self.trainer.apply(self.trainer.everything, aligned(grads, self.params), squares)

    def hold(self, grads: Grads) -> None:
        """Keep gradients for a step that waits until the norm of other parts' is known."""
        there = {n: g for n, g in zip(self.trainer.names, grads, strict=True) if g is not None}
        self._waiting = {"grads": there, "squares": norm(list(there.values())).item() ** 2} if there else {}

    @property
    def squares(self) -> float:
        """The squared norm of the gradients that wait."""
        return self._waiting.get("squares", 0.0)

    def drop(self) -> None:
        """Take no step by the gradients that wait."""
        self._waiting = {}

    def release(self, squares: float) -> None:
        """Take the step that waits, clipped by this squared norm of all parts' gradients."""
        grads, self._waiting = self._waiting.get("grads", {}), {}
        self.apply([grads.get(n) for n in self.trainer.names], squares)

    def live(self) -> Body:
        """`params`, `buffers`, `opt`, and `rest` and `waiting` if any: the very tensors in use, which steps change."""
        self._take()
        now = self._resident.gather()
        held: Body = {"params": self._weights, "buffers": {name: now.buffers[name] for name in self._given}}
        waiting = {"waiting": self._waiting} if self._waiting else {}
        return {**held, "opt": self.trainer.live(), **self._left(now), **waiting}

    def _left(self, now: Rest) -> Body:
        """What the round goes on from besides: what is not carried and differs from the first, if it can travel."""
        first = self._resident.first
        kinds = zip(now, first, strict=True)
        changed = [{n: x for n, x in own.items() if n not in self._given and not same(x, old.get(n, self))}
                   for own, old in kinds]  # fmt: skip
        before = {key: _written(found) for key, found in self._before.items()}
        return {"rest": {**_written(Rest(*changed)), "before": before}} if any(changed) or before else {}

    def is_of(self, held: Body) -> bool:
        """Whether a state holds the very tensors that are in use here."""
        return all(x is self._weights.get(name) for name, x in held["params"].items())

    def after(self) -> Body:
        """`params`, `buffers` and `opt` as they are now, on the CPU, sharing no memory with those in use."""
        return plain(self.live())

    @contextmanager
    def _rules(self, key: Sequence[object], again: bool) -> Iterator[None]:
        self._take()
        with ExitStack() as stack:
            stack.enter_context(random.seeded(*key))
            if self.device.type == "cuda":  # dropout draws from the GPU's own generator there
                stack.enter_context(torch.random.fork_rng([self.device]))
                stack.enter_context(torch.cuda.device(self.device))
                torch.cuda.manual_seed(random.key(*key))
            if not self._given:
                stack.enter_context(frozen_norms(self.model))
            if again:
                stack.enter_context(self._resident.movable.unmoved(self._before.pop(str(key), None)))
            stack.enter_context(exact_convolutions(self.model, self.device, self.trainer.config.precision))
            stack.enter_context(autocast(self.device, self.trainer.config.precision))
            yield


def _written(rest: Rest) -> Body:
    """A rest as a body, without lists, dicts and sets."""
    return {"buffers": rest.buffers, "marks": {n: x for n, x in rest.marks.items() if not isinstance(x, _UNWRITTEN)}}


def plain(value: Any) -> Any:
    """A tensor, or a body of them, as contiguous copies on the CPU, out of any graph."""
    return tree.mapped(value, lambda x: x.detach().to("cpu", memory_format=torch.contiguous_format, copy=True))


def received(payload: Payload, device: torch.device) -> Payload:
    """A payload where a part is, images in channels_last.

    Copies: what came over the wire may lie at any address, and matrix products round by alignment.
    """

    def copied(x: Tensor) -> Tensor:
        order = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        return x.detach().to(device, memory_format=order, copy=True)

    return tree.mapped(payload, copied)


def gradients(values: Any, inputs: Sequence[Tensor], at: Any = None, graph: bool = False) -> Grads:
    """d values / d inputs, times `at` where values are no scalars; None for an input that no value depends on.

    graph: let the result be differentiated again.
    """
    if not inputs or (isinstance(values, list) and not values):
        return [None] * len(inputs)
    if isinstance(values, Tensor):
        check_learns(values)
    return list(torch.autograd.grad(values, inputs, at, create_graph=graph, allow_unused=True))
