"""One training step: forward, loss, gradients, accumulation, correction, clipping, scaling and update.

Two step paths exist and give the same numbers: all gradients at once with foreach kernels, or (`per_layer`) each
parameter updated in a backward hook as soon as its gradient is there, so that no two gradients live at a time.  A
parameter that got no gradient is left alone, optimizer state and all, as torch.optim leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lilliput import optim, tree, updates
from lilliput.labels import columns, counted, labels
from lilliput.ledger import metered
from lilliput.subspace import layers_of, shown
from lilliput.tasks.autocast import autocast, exact_convolutions
from lilliput.training import Training
from lilliput.tree import Body, Tree

Loss = Callable[[nn.Module, Any, Any], tuple[Tensor, dict[str, Tensor]]]
Grads = list[Tensor | None]
Part = tuple[Any, int]  # a micro-batch, and how many of its labels count

# Corrections change gradients before the optimizer sees them.  Each takes the names of some parameters, the parameters
# and their gradients, and changes the gradients in place.
Correction = Callable[[Sequence[str], list[Tensor], list[Tensor]], None]

SMALLEST_SCALE = 2.0**-24  # a gradient that overflows fp16 even so is not finite itself


def pull_to(x: Tree, mu: float) -> Correction:
    """Add mu * (w - x) to the gradient: the gradient of mu/2 * |w - x|^2 (FedProx, eq. 2)."""

    def correct(names: Sequence[str], params: list[Tensor], grads: list[Tensor]) -> None:
        # The difference first: where w is x the term is zero to the bit, which adaptive optimizers would blow up.
        apart = torch._foreach_sub(params, [x[name].to(g.device) for name, g in zip(names, grads, strict=True)])
        torch._foreach_add_(grads, apart, alpha=mu)

    return correct


def shift(by: Tree) -> Correction:
    """Add a fixed tree to the gradients of the parameters that it names (SCAFFOLD adds c - c_i)."""

    def correct(names: Sequence[str], params: list[Tensor], grads: list[Tensor]) -> None:
        both = [(g, by[name].to(g.device)) for name, g in zip(names, grads, strict=True) if name in by]
        if both:
            torch._foreach_add_([g for g, _ in both], [x for _, x in both])

    return correct


def micro_batches(batch: Any, pieces: int) -> list[Part]:
    """The batch cut along its examples into at most so many pieces; pieces without a label that counts are left out."""
    keys = list(batch) if isinstance(batch, dict) else None
    cut = [batch] if pieces == 1 else zip(*(x.chunk(pieces) for x in columns(batch)), strict=True)
    parts = (dict(zip(keys, p, strict=True)) if keys and pieces > 1 else p for p in cut)
    return [(part, n) for part in parts if (n := counted(labels(part)))]


def own(grads: Sequence[Tensor | None], params: Sequence[Tensor], changing: bool, names: Sequence[str]) -> Grads:
    """Gradients in their parameters' order of memory, which fused kernels rely on.

    changing: they will be changed in place, so that no two may share memory, as those of the terms of a sum do.
    Raises ValueError, with its parameter's name, for a gradient that is sparse.
    """
    seen: set[int] = set()
    found: Grads = []
    for g, p, name in zip(grads, params, names, strict=True):
        if g is not None:
            if g.layout != torch.strided:
                raise ValueError(f"the gradient of {name!r} is sparse; make the embedding with sparse=False")
            place = g.untyped_storage()._cdata if changing else 0
            if g.stride() != p.stride() or place in seen:
                g = torch.empty_like(p, requires_grad=False).copy_(g)
            elif changing:
                seen.add(place)
        found.append(g)
    return found


def norm(grads: list[Tensor]) -> Tensor:
    """The norm of gradients that are together one vector."""
    norms = [x.to(torch.float32) if x.dtype.itemsize < 4 else x for x in torch._foreach_norm(grads)]
    return torch.linalg.vector_norm(torch.stack([x.to(norms[0]) for x in norms]))


class Trainer:
    """A model, the update of its parameters, and what happens to a gradient on the way.

    undecayed: names of parameters that `weight_decay` is not for.
    steps, skipped: optimizer steps applied so far, and those left out because a gradient overflowed in fp16.
    """

    def __init__(
        self, model: nn.Module, config: Training, lr: float, corrections: Sequence[Correction] = (), only: Any = None,
        peak: float | None = None, undecayed: Collection[str] = (),
    ):  # fmt: skip
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and (only is None or n in only)]
        self.model, self.config, self.corrections = model, config, list(corrections)
        self.names = [n for n, _ in named]
        self.params: list[Tensor] = [p for _, p in named]
        self.everything = range(len(named))
        self.steps = self.skipped = 0
        self.scaler = torch.amp.GradScaler(self.device.type) if config.precision == "fp16" else None
        self.update = updates.make(
            config.optimizer, self.params, lr, momentum=config.momentum, weight_decay=config.weight_decay,
            nesterov=config.nesterov, options=config.optimizer_options, peak=peak, model=model,
            undecayed=[i for i, n in enumerate(self.names) if n in undecayed],
        )  # fmt: skip
        within = layers_of(model) if self.update.reads_weights else {}
        self.within = {i: within[n] for i, n in enumerate(self.names) if n in within}

    @property
    def device(self) -> torch.device:
        return self.params[0].device if self.params else torch.device("cpu")

    def state(self) -> Body:
        """What the next round goes on from: the optimizer's state where it is kept, and fp16's loss scale always.

        On the CPU, sharing no memory with what is in use.
        """
        kept = self.live() if self.config.optimizer_state == "keep" else self._scaling()
        return tree.mapped(kept, lambda x: x.detach().to("cpu", copy=True))

    def live(self) -> Body:
        """The same with the optimizer's state in any case: the very tensors in use, which later steps change."""
        return {"update": self.update.state(), **self._scaling()}

    def weights(self) -> dict[str, float]:
        """By parameter, how far the steps applied so far would go at lr 1 against a gradient of one; {} if adaptive."""
        found = {n: self.update.weight(i, self.steps) for i, n in enumerate(self.names)}
        return {n: weight for n, weight in found.items() if weight is not None}

    def _scaling(self) -> Body:
        return {"scaler": self.scaler.state_dict()} if self.scaler is not None else {}

    def projections(self) -> Tree:
        """The subspaces that the optimizer trains in, where they are to be averaged."""
        return optim.projections(self._subspace()) if self.config.optimizer_state == "average" else {}

    def _subspace(self) -> optim.SubspaceOptimizer:
        if not isinstance(self.update, updates.Wrapped):
            raise ValueError(f"optimizer_state=average needs a subspace optimizer, not {self.config.optimizer}")
        return self.update.subspace()

    def load(self, state: Body) -> None:
        """Go on from what `state` or `live` gave, or from averaged `projections`."""
        if "projections" in state:
            optim.assign_projections(self._subspace(), state["projections"])
        if "update" in state:
            self.update.load(state["update"])
        if "scaler" in state and self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    @torch.no_grad()
    def apply(self, indices: Sequence[int], grads: Sequence[Tensor | None], squares: float | None = None) -> None:
        """Correct, clip and apply the gradients of the parameters at these positions; it may change them in place.

        A parameter without a gradient (None) is left alone, unless a correction gives it one.
        squares: the squared norm to clip by, where other gradients are clipped together with these.
        """
        if not self.corrections and any(g is None for g in grads):
            there = [(i, g) for i, g in zip(indices, grads, strict=True) if g is not None]
            indices, grads = [i for i, _ in there], [g for _, g in there]
        if not indices:
            return
        whole = indices is self.everything
        params = self.params if whole else [self.params[i] for i in indices]
        names = self.names if whole else [self.names[i] for i in indices]
        ready: Any = own(grads, params, bool(self.corrections) or self.config.clip is not None, names)
        if self.corrections:
            ready = [torch.zeros_like(p) if g is None else g for g, p in zip(ready, params, strict=True)]
        for correct in self.corrections:
            correct(names, params, ready)
        if self.config.clip is not None:
            length = norm(ready) if squares is None else ready[0].new_tensor(squares, dtype=torch.float64).sqrt()
            torch._foreach_mul_(ready, (self.config.clip / (length + 1e-6)).clamp(max=1.0))
        with shown([self.within[i] for i in indices if i in self.within], self.update.decoupled):
            self.update.apply(indices, ready)

    def held(self) -> list[Tensor]:
        """The tensors of the model and of its optimizer's state."""
        return [*self.model.parameters(), *self.model.buffers(), *tree.tensors(self.update.state())]


def step(
    model: nn.Module, opt: Trainer, loss: Loss, batch: Any, context: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """One optimizer step on one batch: (mean loss, metrics), both detached.

    model: in training mode; opt: its `Trainer`; loss: (model, batch, context) -> (scalar, metrics).
    A batch without a label that counts takes no step; its loss is 0, without metrics.
    """
    with ready(model, opt):
        return step_on(model, opt, loss, micro_batches(batch, opt.config.accumulate), context)


@contextmanager
def ready(model: nn.Module, opt: Trainer) -> Iterator[None]:
    """What holds throughout training steps, for `step_on` to run in."""
    with torch.enable_grad(), exact_convolutions(model, opt.device, opt.config.precision):
        yield


def step_on(
    model: nn.Module, opt: Trainer, loss: Loss, parts: Sequence[Part], context: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same on what `micro_batches` made of a batch, inside of `ready`."""
    if not parts:
        return torch.zeros((), device=opt.device), {}
    path = _in_hooks if opt.config.per_layer else _at_once if opt.scaler is None else _scaled
    label = (getattr(loss, "__qualname__", type(loss).__name__), *(x.shape for part, _ in parts for x in columns(part)))
    return metered(label, opt.held, partial(path, model, opt, loss, parts, context))


class _Means:
    """Loss and metrics over micro-batches, weighted by their labels that count."""

    def __init__(self, parts: Sequence[Part]):
        self._total = sum(n for _, n in parts)
        self._found: dict[str, Any] = {}

    def share(self, n: int, value: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """A micro-batch's part of the whole batch's mean loss."""
        if n == self._total:
            self._found = {name: x.detach() for name, x in metrics.items()} if metrics else {}
            self._found[""] = value.detach()
            return value
        share = n / self._total
        for name, x in {**metrics, "": value}.items():
            self._found[name] = self._found.get(name, 0.0) + share * x.detach()
        return value * share

    def result(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self._found.pop(""), self._found


def _forward(
    model: nn.Module, opt: Trainer, loss: Loss, parts: Iterable[Part], context: Any, means: _Means
) -> Iterator[Tensor]:
    """The loss of each micro-batch, as its part of the whole batch's mean."""
    for part, n in parts:
        with autocast(opt.device, opt.config.precision):
            value, metrics = loss(model, part, context)
        yield means.share(n, value, metrics)


def _gradients(model: nn.Module, opt: Trainer, loss: Loss, parts: Sequence[Part], context: Any, means: _Means) -> Grads:
    """The gradients of the batch's mean loss, times fp16's scale; None where there is none."""
    total: Grads = []
    for value in _forward(model, opt, loss, parts, context, means):
        scaled = value if opt.scaler is None else opt.scaler.scale(value)
        grads: Grads = list(torch.autograd.grad(scaled, opt.params, allow_unused=True))
        if len(parts) > 1:
            grads = own(grads, opt.params, changing=True, names=opt.names)
        total = _added(total, grads) if total else grads
    return total


def _added(total: Grads, new: Grads) -> Grads:
    both = [(a, b) for a, b in zip(total, new, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(total, new, strict=True)]


def _at_once(
    model: nn.Module, opt: Trainer, loss: Loss, parts: Sequence[Part], context: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    means = _Means(parts)
    opt.apply(opt.everything, _gradients(model, opt, loss, parts, context, means))
    opt.steps += 1
    return means.result()


def _scaled(
    model: nn.Module, opt: Trainer, loss: Loss, parts: Sequence[Part], context: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """A step under fp16's loss scale; one that overflows is left out.

    Until a first step is applied, the batch is repeated at half the scale instead: a round may have no other.
    """
    assert opt.scaler is not None
    before = [x.clone() for x in model.buffers()] if not opt.steps else []
    while True:
        means = _Means(parts)
        if _unscaled(opt, _gradients(model, opt, loss, parts, context, means)):
            opt.steps += 1
            return means.result()
        if opt.steps or opt.scaler.get_scale() < SMALLEST_SCALE:
            opt.skipped += 1
            return means.result()
        for x, was in zip(model.buffers(), before, strict=True):
            x.copy_(was)


class _AsOptimizer:
    """A trainer with its gradients, as GradScaler wants to see an optimizer."""

    def __init__(self, opt: Trainer, grads: Grads):
        self.param_groups = [{"params": opt.params}]
        self.applied = False
        self._opt = opt
        for p, g in zip(opt.params, own(grads, opt.params, changing=True, names=opt.names), strict=True):
            p.grad = g

    def step(self) -> None:
        self._opt.apply(self._opt.everything, [p.grad for p in self._opt.params])
        self.applied = True


def _unscaled(opt: Trainer, grads: Grads) -> bool:
    """Undo the loss scale and apply the gradients; False if one overflowed, which halves the scale."""
    assert opt.scaler is not None
    if all(g is None for g in grads):
        return True
    seen: Any = _AsOptimizer(opt, grads)
    try:
        opt.scaler.unscale_(seen)
        opt.scaler.step(seen)
        opt.scaler.update()
    finally:
        for p in opt.params:
            p.grad = None
    return seen.applied


def _in_hooks(
    model: nn.Module, opt: Trainer, loss: Loss, parts: Sequence[Part], context: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    means = _Means(parts)
    sums: dict[int, Tensor] = {}
    waiting = set(opt.everything)
    ahead = len(parts)

    def arrived(i: int) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            grad, p.grad = p.grad, None
            assert grad is not None
            if i in sums:
                grad = sums.pop(i).add_(grad)
            if ahead:
                sums[i] = grad
            else:
                waiting.discard(i)
                opt.apply([i], [grad])

        return hook

    with ExitStack() as stack:
        for i, p in enumerate(opt.params):
            stack.enter_context(p.register_post_accumulate_grad_hook(arrived(i)))
        for value in _forward(model, opt, loss, parts, context, means):
            ahead -= 1
            torch.autograd.backward(value, inputs=opt.params)
    for i in sorted(waiting):  # what the last micro-batch did not reach
        opt.apply([i], [sums.pop(i, None)])
    opt.steps += 1
    return means.result()
