"""Resident models: one module per architecture stays in memory and its weights are overwritten per client.

Building a module costs more than training a small one for a step, so a bounded number of them is kept.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.tree import Tree, shapes

_NORMS = (nn.modules.batchnorm._BatchNorm,)
# What a module says of its own shape, by parameter, dimension and attribute; only the attributes matter to forward().
_ATTRIBUTES: dict[type, tuple[tuple[str, int, str], ...]] = {
    nn.Linear: (("weight", 0, "out_features"), ("weight", 1, "in_features")),
    nn.Embedding: (("weight", 0, "num_embeddings"), ("weight", 1, "embedding_dim")),
    nn.modules.batchnorm._BatchNorm: (("weight", 0, "num_features"),),
    nn.GroupNorm: (("weight", 0, "num_channels"),),
}


class Residents:
    """A bounded set of modules derived from one, by (names and shapes of parameters, role, device)."""

    def __init__(self, model: nn.Module, limit: int = 8):
        self._model = model
        self._limit = limit
        self._modules: OrderedDict[Any, nn.Module] = OrderedDict()

    def get(self, params: Tree, role: str, device: torch.device) -> nn.Module:
        """The module whose parameters have these names and shapes, with whatever weights it had last."""
        key = (shapes(params), role, device)
        module = self._modules.get(key)
        if module is None:
            module = self._modules[key] = self._build(params).to(device)
            if any(isinstance(m, nn.Conv2d) for m in module.modules()):
                # Pooling in channels_last is an order of magnitude faster on a CPU, convolutions of few channels too.
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if len(self._modules) > self._limit:
                self._modules.popitem(last=False)
        self._modules.move_to_end(key)
        return module

    def _build(self, params: Tree) -> nn.Module:
        module = copy.deepcopy(self._model)
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


def _resize(module: nn.Module, wanted: dict[str, Tensor | None]) -> None:
    for name, x in wanted.items():
        old = getattr(module, name)
        if x is not None and old.shape != x.shape:
            setattr(module, name, nn.Parameter(old.new_empty(x.shape), requires_grad=old.requires_grad))
    weight = getattr(module, "weight", None)
    if weight is None:
        return
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
    """The buffers that belong to a module's state (BatchNorm statistics), by name."""
    kept = module.state_dict(keep_vars=True).keys()
    return {name: b for name, b in module.named_buffers() if name in kept}
