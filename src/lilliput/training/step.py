"""One training step: forward, loss, gradients, accumulation, correction, clipping, scaling and update.

Clients, pre-training and estimates of memory all take it, alone or as one of several processes.  Two ways give the same
numbers: all gradients at once with foreach kernels, or (`per_layer`) each parameter updated in a backward hook as soon
as its gradient is there, so that no two gradients live at a time.  A parameter that got no gradient is left alone,
optimizer state and all, as torch.optim leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lilliput import optim
from lilliput.core import tree
from lilliput.core.labels import columns
from lilliput.core.meter import metered
from lilliput.core.tree import Body, Tree
from lilliput.optim.gradients import own
from lilliput.optim.sharded import is_sharded
from lilliput.subspace import layers_of, shown
from lilliput.training import updates
from lilliput.training.autocast import exact_convolutions
from lilliput.training.passes import Hooks, Loss, Part, backward, drop, micro_batches, updating
from lilliput.training.scaling import scaled
from lilliput.training.settings import Training

Grads = list[Tensor | None]

# Corrections change gradients before the optimizer sees them.  Each takes the names of some parameters, the parameters
# and their gradients, and changes the gradients in place.  Its `names`, if it has any, are of the parameters that get a
# gradient by it where they have none; by others all do.
Correction = Callable[[Sequence[str], list[Tensor], list[Tensor]], None]


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

    return giving(by, correct)


def giving(names: Collection[str], correct: Correction) -> Correction:
    """A correction that gives a gradient to these parameters alone."""
    correct.names = names  # type: ignore[attr-defined]
    return correct


class MeanGradient:
    """A correction that changes nothing, and knows the mean of the gradients that came by of the parameters named."""

    names = ()

    def __init__(self, names: Collection[str]):
        self._names = names
        self._sums: Tree = {}
        self._seen: dict[str, int] = {}

    def __call__(self, names: Sequence[str], params: list[Tensor], grads: list[Tensor]) -> None:
        for name, g in zip(names, grads, strict=True):
            if name in self._names:
                wide = torch.promote_types(g.dtype, torch.float32)
                self._sums[name] = self._sums[name].add_(g) if name in self._sums else g.to(wide, copy=True)
                self._seen[name] = self._seen.get(name, 0) + 1

    def result(self) -> Tree:
        """The means, on the CPU, of the parameters that had a gradient."""
        return {name: (x / self._seen[name]).to("cpu") for name, x in self._sums.items()}


def aligned(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> Grads:
    """Gradients of `torch.autograd.grad` in their parameters' order of memory, as `.grad` has them."""

    def fits(g: Tensor | None, p: Tensor) -> bool:
        return g is None or g.layout != torch.strided or g.stride() == p.stride()

    pairs = zip(grads, params, strict=True)
    return [g if fits(g, p) else torch.empty_like(p, requires_grad=False).copy_(g) for g, p in pairs]  # type: ignore[arg-type]


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that are trained, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


def norm(grads: list[Tensor]) -> Tensor:
    """The norm of gradients that are together one vector."""
    norms = [x.to(torch.float32) if x.dtype.itemsize < 4 else x for x in torch._foreach_norm(grads)]
    return torch.linalg.vector_norm(torch.stack([x.to(norms[0]) for x in norms]))


class Trainer:
    """A model, the update of its parameters, and what happens to a gradient on the way.

    undecayed: names of parameters that `weight_decay` is not for.
    update: of an optimizer that there is, in place of the one that the settings name.
    hooks: what takes gradients in the backward passes, such as sums over processes.
    steps, skipped: optimizer steps applied so far, and those left out because a gradient overflowed in fp16.
    """

    def __init__(
        self, model: nn.Module, config: Training, lr: float, corrections: Sequence[Correction] = (), only: Any = None,
        peak: float | None = None, undecayed: Collection[str] = (), update: updates.Update | None = None,
        hooks: Hooks | None = None,
    ):  # fmt: skip
        every = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        named = every if only is None else [(n, p) for n, p in every if n in only]
        self.model, self.config, self.corrections = model, config, list(corrections)
        self.names = [n for n, _ in named]
        self.params: list[Tensor] = [p for _, p in named]
        self.everything = range(len(named))
        self._given = {i for i, n in enumerate(self.names) if any(n in getattr(c, "names", [n]) for c in corrections)}
        # Of all parameters, autograd need not be told; FSDP2 differentiates others than the model has.
        self.inputs = None if len(named) == len(every) or any(map(is_sharded, self.params)) else self.params
        self.steps = self.skipped = 0
        self.scaler = torch.amp.GradScaler(self.device.type) if config.precision == "fp16" else None
        self.hooks = hooks
        self.update = update or updates.make(
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

        They lie in memory as their parameters do.  A parameter without a gradient (None) is left alone, unless a
        correction gives it one.  Raises ValueError, with its parameter's name, for a gradient that is sparse.
        squares: the squared norm to clip by, where other gradients are clipped together with these.
        """
        if any(g is None for g in grads):
            there = [(i, g) for i, g in zip(indices, grads, strict=True) if g is not None or i in self._given]
            indices, grads = [i for i, _ in there], [g for _, g in there]
        if not indices:
            return
        whole = indices is self.everything
        params = self.params if whole else [self.params[i] for i in indices]
        names = self.names if whole else [self.names[i] for i in indices]
        for g, name in zip(grads, names, strict=True):
            if g is not None and g.layout != torch.strided:
                raise ValueError(f"the gradient of {name!r} is sparse; make the embedding with sparse=False")
        ready = self._changed(names, params, grads, squares)
        if not self.within:
            self.update.apply(indices, ready)
            return
        with shown([self.within[i] for i in indices if i in self.within], self.update.decoupled):
            self.update.apply(indices, ready)

    def _changed(
        self, names: Sequence[str], params: list[Tensor], grads: Sequence[Tensor | None], squares: float | None
    ) -> list[Tensor]:
        """The gradients, corrected and clipped in place."""
        ready: Any = grads
        if self.corrections or self.config.clip is not None:
            ready = [torch.zeros_like(p) if g is None else own(g) for g, p in zip(grads, params, strict=True)]
        for correct in self.corrections:
            correct(names, params, ready)
        if self.config.clip is not None:
            length = norm(ready) if squares is None else ready[0].new_tensor(squares, dtype=torch.float64).sqrt()
            torch._foreach_mul_(ready, (self.config.clip / (length + 1e-6)).clamp(max=1.0))
        return ready

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
    with torch.enable_grad(), exact_convolutions(model, opt.device, opt.config.precision), updating(opt):
        yield


def step_on(
    model: nn.Module, opt: Trainer, loss: Loss, parts: Sequence[Part], context: Any = None, of: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same on what `micro_batches` made of a batch, inside of `ready`.

    of: the labels that count, where they are more than those of the parts: those of all processes, which take the step
        together.  What is returned is then this process's share of the means.
    """
    if not parts:
        return torch.zeros((), device=opt.device), {}
    path = _once if opt.scaler is None else scaled
    label = (getattr(loss, "__qualname__", type(loss).__name__), *(x.shape for part, _ in parts for x in columns(part)))
    return metered(label, opt.held, partial(path, model, opt, loss, parts, context, of))


def _once(
    model: nn.Module, opt: Trainer, loss: Loss, parts: Sequence[Part], context: Any, of: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    try:
        means = backward(model, opt, loss, parts, context, of)
        if not opt.config.per_layer:
            opt.apply(opt.everything, [p.grad for p in opt.params])
    finally:
        drop(opt.params)
    opt.steps += 1
    return means.result()
