"""A part of the model in training, on either end of split learning.

No autograd graph survives between calls.  A forward that is needed again runs again with the same random labels, from
the buffers and counters that the first one started from, and without changing them.  A payload crosses the cut: a
tensor, or a flat dict of tensors, whose dimension 0 is the example.
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
    """A part of the model in training: its own weights, their optimizer, and a module to run them.

    state:  `params`, `buffers` (without any, norms use batch statistics) and `opt`, which are copied.  In the middle of
            a round also `rest`: buffers that are not carried, counters, and their values before each forward that will
            be repeated.  `waiting`: see `hold`.
    trains: False for a part that only passes gradients on.
    undecayed: parameters without `weight_decay`, because the other end has them too and decays them.

    All halves of a part and role share one module, which runs on the weights of the half that uses it.
    """

    def __init__(
        self, part: Supervised, state: Body, config: Training, lr: float, role: str,
        device: torch.device | str = "cpu", trains: bool = True, peak: float | None = None,
        undecayed: Collection[str] = (),
    ):  # fmt: skip
        self.part, self.device = part, torch.device(device)
        self._resident = part.lendable(state["params"], role, self.device)
        self.model = self._resident.module.train()
        self._inplace = part.inplace or any(getattr(module, "inplace", False) for module in self.model.modules())
        self._given = state.get("buffers") or {}
        rest = state.get("rest") or {"buffers": {}, "marks": {}, "before": {}}
        self._before = {key: Rest(**before) for key, before in rest["before"].items()}
        buffers = self._given | rest["buffers"]
        self._weights, self._rest = self._resident.copied(state["params"], buffers, rest["marks"])
        self._take()
        self._fixed = [p for name, p in self.model.named_parameters() if name not in self._weights]
        only = state["params"] if trains else ()
        self.trainer = Trainer(self.model, config, lr, only=only, peak=peak, undecayed=undecayed)
        self.params = self.trainer.params
        if state.get("opt"):
            self.trainer.load(state["opt"])
        self._waiting: Body = state.get("waiting", {})

    def _take(self) -> None:
        self._resident.lend(self, self._weights, self._rest)

    def output(self, batch: Any, key: Sequence[object], again: bool = False) -> Payload:
        """The part's output on a batch.  `key` labels its randomness; `again` repeats the forward of `sent`."""
        with self._rules(key, again):
            return self.part.forward(self.model, self._own(batch))

    def _own(self, batch: Any) -> Any:
        """The batch, or a copy if the part may change its input, which others use and torch may refuse to change."""
        return cloned(batch) if self._inplace else batch

    def loss(self, batch: Any, key: Sequence[object], again: bool = False) -> Tensor:
        """The part's mean loss on (payload, labels); with `again` the forward changes no buffers."""
        with self._rules(key, again):
            return self.part.loss(self.model, self._own(batch))[0]

    def sent(self, batch: Any, key: Sequence[object]) -> Payload:
        """The part's output on a batch, without a graph, to send to the other end."""
        self._take()
        before = self._resident.movable.taken(norms=False)
        with torch.no_grad():
            out = self.metered([batch], lambda: plain(self.output(batch, key)))
        moved = self._resident.movable.moved(before)
        if any(moved):
            self._before[str(key)] = moved
        return out

    def pull(self, batch: Any, key: Sequence[object], gradient: Payload, *inputs: Tensor) -> Grads:
        """Gradients of the part's parameters and of `inputs`, given that of its output; runs the forward again."""
        again = self.output(batch, key, again=True)
        pairs = [(again, gradient)] if isinstance(gradient, Tensor) else [(again[n], g) for n, g in gradient.items()]
        pairs = [(x, torch.empty_like(x).copy_(g)) for x, g in pairs if x.requires_grad]
        return gradients([x for x, _ in pairs], [*self.params, *inputs], [g for _, g in pairs])

    def metered(self, batches: Iterable[Any], run: Callable[[], Out], *others: Half) -> Out:
        """Run a step on batches under the meter; `others` are halves that are in memory at the same time."""
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
        """One optimizer step with these gradients; does not change a parameter without a gradient.

        squares: the squared norm to clip by, if other parts' gradients are clipped together with these.
        """
        self._take()
        if self.params:
            self.trainer.apply(self.trainer.everything, aligned(grads, self.params), squares)

    def hold(self, grads: Grads) -> None:
        """Keep gradients for a step that waits for the norm of other parts' gradients."""
        there = {n: g for n, g in zip(self.trainer.names, grads, strict=True) if g is not None}
        self._waiting = {"grads": there, "squares": norm(list(there.values())).item() ** 2} if there else {}

    @property
    def squares(self) -> float:
        """The squared norm of the gradients that wait."""
        return self._waiting.get("squares", 0.0)

    def drop(self) -> None:
        """Discard the gradients that wait."""
        self._waiting = {}

    def release(self, squares: float) -> None:
        """Take the step that waits, clipped by the squared norm of all parts' gradients."""
        grads, self._waiting = self._waiting.get("grads", {}), {}
        self.apply([grads.get(n) for n in self.trainer.names], squares)

    def live(self) -> Body:
        """`params`, `buffers`, `opt`, and `rest` and `waiting` if any: the tensors in use, which steps will change."""
        self._take()
        now = self._resident.gather()
        model: Body = {"params": self._weights, "buffers": {name: now.buffers[name] for name in self._given}}
        waiting = {"waiting": self._waiting} if self._waiting else {}
        return {**model, "opt": self.trainer.live(), **self._left(now), **waiting}

    def _left(self, now: Rest) -> Body:
        """`rest`: buffers and attributes that are not carried but differ from their initial values, if sendable."""
        first = self._resident.first
        kinds = zip(now, first, strict=True)
        changed = [{n: x for n, x in own.items() if n not in self._given and not same(x, old.get(n, self))}
                   for own, old in kinds]  # fmt: skip
        before = {key: _written(values) for key, values in self._before.items()}
        return {"rest": {**_written(Rest(*changed)), "before": before}} if any(changed) or before else {}

    def is_of(self, state: Body) -> bool:
        """Whether a state holds the same tensor objects that this half uses."""
        return all(x is self._weights.get(name) for name, x in state["params"].items())

    def after(self) -> Body:
        """Copies of `live()` on the CPU that share no memory with the tensors in use."""
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
    """A tensor or body as contiguous copies on the CPU, detached from any graph."""
    return tree.mapped(value, lambda x: x.detach().to("cpu", memory_format=torch.contiguous_format, copy=True))


def received(payload: Payload, device: torch.device) -> Payload:
    """A copy of a payload on a part's device, images in channels_last.

    It copies because a tensor from the wire may have any alignment, which changes the rounding of matrix products.
    """

    def copied(x: Tensor) -> Tensor:
        order = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        return x.detach().to(device, memory_format=order, copy=True)

    return tree.mapped(payload, copied)


def gradients(values: Any, inputs: Sequence[Tensor], at: Any = None, graph: bool = False) -> Grads:
    """d values / d inputs, multiplied by `at` if values are not scalars; None for an input on which no value depends.

    graph: allows differentiating the result again.
    """
    if not inputs or (isinstance(values, list) and not values):
        return [None] * len(inputs)
    if isinstance(values, Tensor):
        check_learns(values)
    return list(torch.autograd.grad(values, inputs, at, create_graph=graph, allow_unused=True))
