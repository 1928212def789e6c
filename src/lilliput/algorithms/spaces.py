"""A task whose model trains in subspaces: its layers, their bases by epoch, and changes of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lilliput.core.tree import Tree
from lilliput.optim.basis import sketch, sketch_rows
from lilliput.subspace import Basis, Dense, Form, replace_with_subspace, seeded_basis
from lilliput.tasks import Supervised, frozen_norms
from lilliput.tasks.resident import Residents
from lilliput.wire.header import ALIGNMENT

Bases = Mapping[str, Basis]


@dataclass(frozen=True, eq=False)
class Spaces:
    """The layers that train in subspaces, by name, and the task that trains them.

    A layer's coordinates are named `<layer>.b`.  All other trained parameters (the ordinary ones) and the frozen x of
    each layer keep the names of the whole model.  An epoch is the time between two changes of P.
    """

    task: Supervised
    forms: Mapping[str, Form]
    ranks: Mapping[str, int]
    projection: Any
    official: bool
    _bases: dict[Any, Bases] = field(default_factory=dict)

    def bases(self, seed: int, epoch: int, rows: Tree | None = None) -> Bases:
        """Each layer's basis in an epoch: made from the seed, or from `rows` if they do not come from a seed."""
        if rows is not None:
            return {layer: Dense(x.to(self.dtype(layer))) for layer, x in rows.items()}
        if (seed, epoch) not in self._bases:
            while len(self._bases) > 1:  # duals still need the previous epoch's
                del self._bases[next(iter(self._bases))]
            self._bases[seed, epoch] = {layer: self._basis(layer, seed, epoch) for layer in self.forms}
        return self._bases[seed, epoch]

    def _basis(self, layer: str, seed: int, epoch: int) -> Basis:
        rank, width = self.ranks[layer], self.forms[layer].width
        if callable(self.projection):
            return self.projection(layer, rank, width, epoch)
        # As published, layers of one rank and width share a basis, and the rows of ss have length sqrt(width / rank).
        label = f"{rank}/{width}" if self.official else layer
        basis = seeded_basis(self.projection, rank, width, seed, label, epoch, dtype=self.dtype(layer))
        long = self.official and isinstance(basis, Dense) and self.projection == "ss"
        return Dense(basis.dense() * (width / rank) ** 0.5) if long else basis

    def dtype(self, layer: str) -> torch.dtype:
        """The dtype of a layer's weight."""
        return self.task.model.get_parameter(f"{layer}.weight").dtype

    def zeros(self, like: Tree) -> Tree:
        """b = 0 for every layer, in the dtype of the whole model's weights; takes no memory and must not be written."""
        shapes = {n: (*form.rows, self.ranks[n]) for n, form in self.forms.items()}
        return {f"{n}.b": like[f"{n}.weight"].new_zeros(()).expand(shape) for n, shape in shapes.items()}

    def ordinary(self, params: Tree) -> Tree:
        """The parameters of a whole model outside subspaces."""
        return {name: x for name, x in params.items() if name.removesuffix(".weight") not in self.forms}

    def moved(self, params: Tree, change: Tree, bases: Bases) -> Tree:
        """A whole model after a change of b and of ordinary parameters; gives the same bits on server and device."""
        after = dict(params)
        for name, d in change.items():
            layer = name.removesuffix(".b")
            if layer in self.forms:
                weight = f"{layer}.weight"
                after[weight] = self.forms[layer].moved(aligned(params[weight]), aligned(d), bases[layer].to(d))
            else:
                after[name] = params[name] + d
        return after

    def resident(self, trained: Tree, params: Tree, bases: Bases, device: torch.device) -> nn.Module:
        """The resident module in these bases, ready for `fit`; its untrained parameters are the tensors of `params`."""
        resident = self.task.lendable(trained, "train", device)
        module = resident.load(trained, None)
        for layer in self.forms:
            own: Any = module.get_submodule(layer)
            own.use(bases[layer])
        resident.given(*self.forms)
        for name, x in params.items():
            if name not in trained:
                module.get_parameter(name).data = aligned(x.to(device))
        return module

    def sketch_shape(self, layer: str) -> tuple[int, int]:
        """Rows and width of the sketch of a layer's gradient."""
        form = self.forms[layer]
        return sketch_rows(self.ranks[layer], form.rows.numel()), form.width

    def sketches(self, model: nn.Module, task: Any, batch: Any, *key: object) -> Tree:
        """Omega G for each layer's dense gradient G on a batch; `key` decides the Gaussian Omega.

        With one key for all devices, the mean of their sketches is the sketch of their mean gradient.  A backward hook
        sketches and frees each gradient, so that only one exists at a time.
        """
        sketches: Tree = {}
        wanted = {layer: model.get_parameter(f"{layer}.weight") for layer in self.forms}
        with ExitStack() as stack, torch.enable_grad():
            stack.enter_context(frozen_norms(model))
            for layer, p in wanted.items():
                stack.enter_context(p.register_post_accumulate_grad_hook(self._sketcher(layer, sketches, key)))
            task.loss(model.train(), batch)[0].backward(inputs=list(wanted.values()))
        return {layer: sketches[layer] for layer in self.forms}

    def _sketcher(self, layer: str, sketches: Tree, key: Sequence[object]) -> Any:
        def hook(p: Tensor) -> None:
            grad, p.grad = p.grad, None
            assert grad is not None
            g = self.forms[layer].matrix(grad).reshape(-1, self.forms[layer].width).float().cpu()
            sketches[layer] = sketch(g, self.ranks[layer], *key, layer)

        return hook


def aligned(x: Tensor) -> Tensor:
    """The tensor, contiguous and aligned as torch would allocate it; copies it if necessary.

    Over the wire a tensor may arrive at another alignment, which changes the rounding of products.  A size that is not
    a multiple of the alignment always means a copy, so that a device's memory does not depend on how the tensor came.
    """
    is_aligned = x.is_contiguous() and x.nbytes % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def forgotten(opt: Any, positions: Sequence[int]) -> Any:
    """A trainer's state without the optimizer state of the parameters at these positions, which start afresh.

    Optimizer state is keyed by parameter, or by kind (moments, steps) and then by parameter.
    """
    names = {str(i) for i in positions}

    def without(states: Mapping[str, Any]) -> dict[str, Any]:
        return {key: x for key, x in states.items() if key not in names}

    if "update" not in opt:
        return opt
    rest = without(opt["update"])
    return {**opt, "update": {key: x if key.isdigit() else without(x) for key, x in rest.items()}}


_MADE: WeakKeyDictionary[Any, dict[Any, Spaces]] = WeakKeyDictionary()


def spaces_of(task: Any, projection: Any, official: bool, frozen: bool, **settings: Any) -> Spaces:
    """The spaces of a task, with the settings of `replace_with_subspace`; `frozen` freezes ordinary parameters.

    Made once per task and settings.  The model shares the task's tensors, so it needs memory only for b.
    Raises ValueError if a layer is frozen.
    """
    key = repr((projection, official, frozen, sorted(settings.items())))
    made = _MADE.setdefault(task, {})
    if key not in made:
        shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in task.model.parameters()}
        model = copy.deepcopy(task.model, shared)
        first = "cd" if callable(projection) else projection  # a placeholder: each round sets its own basis
        layers = replace_with_subspace(model, projection=first, dual="none", **settings).layers
        fixed = [name for name in layers if not task.model.get_parameter(f"{name}.weight").requires_grad]
        if fixed:
            raise ValueError(f"{fixed[0]} is frozen, and trains in no subspace; choose other targets, or exclude it")
        if frozen:
            model.requires_grad_(False)
            for layer in layers.values():
                layer.b.requires_grad_()
        own = copy.copy(task)
        own.model, own._residents = model, Residents(model)
        forms = {name: layer.form for name, layer in layers.items()}
        ranks = {name: layer.b.shape[-1] for name, layer in layers.items()}
        made[key] = Spaces(own, forms, ranks, projection, official)
    return made[key]
