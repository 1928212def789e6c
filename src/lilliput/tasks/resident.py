"""Resident models: one module per architecture stays in memory, and each client overwrites its weights.

Building a module costs more than a training step of a small one, so a bounded number of modules is kept.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.core import tree
from lilliput.core.layers import is_linear, is_transposed, make_safe, sides
from lilliput.core.tree import Tree, shapes
from lilliput.tasks.moving import Movable, Rest, copied, with_leaves

_NORMS = (nn.modules.batchnorm._BatchNorm,)
# The attributes in which a module repeats its shape: (parameter, dimension, attribute).  Its forward reads them.
_ATTRIBUTES: dict[type, tuple[tuple[str, int, str], ...]] = {
    nn.Embedding: (("weight", 0, "num_embeddings"), ("weight", 1, "embedding_dim")),
    nn.modules.batchnorm._BatchNorm: (("weight", 0, "num_features"),),
    nn.GroupNorm: (("weight", 0, "num_channels"),),
}


class Resident:
    """A module, its parameters, and a copy of its initial buffers and plain attributes.

    State that no client carries between calls (a buffer in no state dict, a counter in a plain attribute) starts from
    its initial value for every client.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.params = dict(module.named_parameters())
        self.movable = Movable(module)
        self.first = self.movable.taken()
        self._holder: object = None
        self._rest = Rest({}, {})  # the holder's buffers and attributes

    def load(self, params: Tree, state: Tree | None) -> nn.Module:
        """Copy weights and buffers into the module and reset everything else to its initial state; returns the module.

        Raises RuntimeError while the module is lent to a holder.
        """
        if self._holder is not None:
            raise RuntimeError("the weights of this module are another's own; take one of another role")
        tree.copy_({n: self.params[n] for n in params}, params)
        self.movable.put(Rest(self._overwritten(state or {}), copied(self.first).marks))
        return self.module

    def _overwritten(self, state: Tree) -> Tree:
        """The module's own buffers with the values of `state`, or their initial values."""
        first, own = self.first.buffers, {}
        now = self.movable.held().buffers
        for name, x in first.items():
            fits = name in now and (now[name].shape, now[name].dtype) == (x.shape, x.dtype)
            own[name] = now[name] if fits else torch.empty_like(x)
        wanted = {name: state.get(name, x) for name, x in first.items()}
        other = [name for name in own if own[name] is not wanted[name]]
        tree.copy_({name: own[name] for name in other}, {name: wanted[name] for name in other})
        return own

    def given(self, *names: str) -> None:
        """Make the current state of these submodules their initial state, from which every client starts."""
        now, prefixes = self.movable.held(), tuple(f"{name}." for name in names)
        for first, kind in zip(self.first, now, strict=True):
            for name in [name for name in first if name.startswith(prefixes)]:
                del first[name]
            first.update({name: x for name, x in kind.items() if name.startswith(prefixes)})

    def lend(self, holder: object, params: Tree, rest: Rest) -> None:
        """Run the module on these objects of `holder`, without a copy, until it is lent to another holder."""
        if self._holder is not holder:
            self.gather()
            for name, x in params.items():
                self.params[name].data = x
            self.movable.put(rest)
            self._holder, self._rest = holder, rest

    def gather(self) -> Rest:
        """The holder's buffers and plain attributes, updated with those that forwards have replaced."""
        if self._holder is not None:
            for own, now in zip(self._rest, self.movable.held(), strict=True):
                own.clear()
                own.update(now)
        return self._rest

    def copied(self, params: Tree, state: Tree, marks: dict[str, Any] | None = None) -> tuple[Tree, Rest]:
        """Copies of weights, buffers and attributes to lend to this module, on its device and in its memory format.

        state, marks: buffers and plain attributes; all others have their initial values.
        """
        rest = copied(self.first)
        rest.marks.update(copied(Rest({}, marks or {})).marks)
        with torch.no_grad():
            weights = {n: torch.empty_like(self.params[n], requires_grad=False).copy_(x) for n, x in params.items()}
        tree.copy_({name: rest.buffers[name] for name in state}, state)
        return weights, rest


class Residents:
    """A bounded set of modules derived from one model, by (names and shapes of parameters, role, device).

    All modules of a device share the parameters that are not trained.
    """

    def __init__(self, model: nn.Module, limit: int = 8):
        self._model = model
        self._limit = limit
        self._residents: OrderedDict[Any, Resident] = OrderedDict()
        self._frozen: dict[tuple[str, torch.device], nn.Parameter] = {}

    def get(self, params: Tree, role: str, device: torch.device) -> Resident:
        """The module whose parameters have these names and shapes, with the weights that it had last."""
        key = (shapes(params), role, device)
        resident = self._residents.get(key)
        if resident is None:
            module = self._build(params, device).to(device)
            if any(isinstance(m, nn.Conv2d) for m in module.modules()):
                # In channels_last, pooling and convolutions of few channels are ten times as fast on a CPU.
                make_safe(module)
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            resident = self._residents[key] = Resident(module)
            if len(self._residents) > self._limit:
                self._residents.popitem(last=False)
        self._residents.move_to_end(key)
        return resident

    def _shared(self, name: str, p: nn.Parameter, device: torch.device) -> nn.Parameter:
        """A device's single copy of a parameter that is not trained."""
        if (name, device) not in self._frozen:
            self._frozen[name, device] = nn.Parameter(p.detach().to(device), requires_grad=False)
        return self._frozen[name, device]

    def _build(self, params: Tree, device: torch.device) -> nn.Module:
        untrained = [(n, p) for n, p in self._model.named_parameters() if not p.requires_grad and n not in params]
        frozen = {id(p): self._shared(n, p, device) for n, p in untrained}
        memo: dict[int, Any] = {**frozen, **with_leaves(self._model)}
        module = copy.deepcopy(self._model, memo)
        _leave_out(module, params)
        named = dict(module.named_parameters())
        unknown = params.keys() - named.keys()
        if unknown:
            raise ValueError(f"the model has no parameter {sorted(unknown)[0]!r}")
        if any(named[name].shape != x.shape for name, x in params.items()):
            for prefix, child in module.named_modules():
                _resize(
                    child,
                    {n: params.get(f"{prefix}.{n}" if prefix else n) for n, _ in child.named_parameters(recurse=False)},
                )
        return module


def _leave_out(module: nn.Module, params: Tree) -> None:
    """Remove the blocks of Sequentials and ModuleLists that train, but of which a client holds no parameter."""
    if all(name in params or not p.requires_grad for name, p in module.named_parameters()):
        return
    for prefix, container in list(module.named_modules()):
        if isinstance(container, nn.Sequential | nn.ModuleList):
            for key, block in list(container.named_children()):
                trained = [name for name, p in block.named_parameters() if p.requires_grad]
                within = ".".join(part for part in (prefix, key) if part)
                if trained and not any(f"{within}.{name}" in params for name in trained):
                    del container._modules[key]


def _resize(module: nn.Module, wanted: dict[str, Tensor | None]) -> None:
    for name, x in wanted.items():
        old = getattr(module, name)
        if x is not None and old.shape != x.shape:
            setattr(module, name, nn.Parameter(old.new_empty(x.shape), requires_grad=old.requires_grad))
    weight = getattr(module, "weight", None)
    if weight is None:
        return
    if is_linear(module):
        names = ("nx", "nf") if is_transposed(module) else ("in_features", "out_features")
        for name, side in zip(names, sides(module), strict=True):
            setattr(module, name, side)
    for kind, attributes in _ATTRIBUTES.items():
        if isinstance(module, kind):
            for _, dim, attribute in attributes:
                setattr(module, attribute, weight.shape[dim])
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
    if isinstance(module, nn.modules.conv._ConvNd):
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    for name, buffer in module.named_buffers(recurse=False):
        if isinstance(module, _NORMS) and buffer.dim() == 1:
            setattr(module, name, buffer.new_zeros(weight.shape[0]))


def buffers(module: nn.Module) -> Tree:
    """The buffers in a module's state dict (such as BatchNorm statistics), by name."""
    state = module.state_dict(keep_vars=True).keys()
    return {name: b for name, b in module.named_buffers() if name in state}
