"""What an optimizer is shown of a layer in a subspace: the weight W = x + b P as it looks from within, and not b.

An optimizer that decays a weight, or goes by its size, would otherwise decay what the round has learnt.  The gradient
of wd/2 |W|^2 by b is wd W P^T (the chain rule, with a convolution's W as its matrix); decay apart from the gradient
takes lr wd of the part of W that P spans, whose coordinates are W P^T (P P^T)^-1.  Where P P^T = I the two are one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lilliput.subspace.layer import SubspaceLayer


def layers_of(model: nn.Module) -> dict[str, SubspaceLayer]:
    """The layers of a model that are in subspaces, by the name of their b."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SubspaceLayer)}
    return {f"{name}.b" if name else "b": layer for name, layer in layers.items()}


@contextmanager
def shown(layers: Iterable[SubspaceLayer], decoupled: bool = False) -> Iterator[None]:
    """Within, each b is W P^T, or (decoupled) the coordinates of W; afterwards b again, moved by as much."""
    with torch.no_grad():
        offsets = [(layer.b, layer.offset(decoupled)) for layer in layers]
        for b, offset in offsets:
            b.add_(offset)
    try:
        yield
    finally:
        with torch.no_grad():
            for b, offset in offsets:
                b.sub_(offset)
