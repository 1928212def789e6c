"""Putting a model's layers into subspaces, in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from lilliput.core.layers import is_linear, is_transposed, own_weight
from lilliput.core.registry import nearest
from lilliput.optim.basis import PROJECTIONS, Basis, seeded_basis
from lilliput.subspace.conv import SubspaceConv2d
from lilliput.subspace.layer import SubspaceLayer
from lilliput.subspace.linear import SubspaceLinear

# (layer, rank, width) -> the basis that a layer starts with.
Choice = Callable[[str, int, int], Basis]


class Subspace(NamedTuple):
    """A model in subspaces.

    parameters:  numbers that are trained, the ordinary ones included.
    layers:      by name, the layers that were replaced.
    duals:       by name, the layer's dual variable, which begins as zeros.
    projections: by name, the basis that each layer starts with.
    """

    parameters: int
    layers: dict[str, SubspaceLayer]
    duals: dict[str, Tensor]
    projections: dict[str, Basis]


def replace_with_subspace(
    model: nn.Module,
    targets: str | Sequence[str] | None = None,
    skip: str | Sequence[str] = (),
    rank: int | float | Mapping[str, int | float] = 0.25,
    projection: str | Choice = "cd",
    along: Literal["filter", "width"] = "filter",
    dual: Literal["rotated", "full", "none"] = "rotated",
    seed: int = 0,
) -> Subspace:
    """Replace linear and convolutional layers by ones that train b in W = x + b P.

    targets: names of layers: the last part of a name (`q_proj`), a whole name, or a pattern (`*.mlp.*`); None takes all
             linear and convolutional layers that train a weight of their own but the last linear one, which is most
             often the head.
    skip:    parts of names (`0` leaves out layer 0), whole names or patterns of what stays as it is.
    rank:    rows of P; a share of the layer's width if it is at most 1 and no int; or either by target.
    projection: cd, rd, ss or idx, made from `seed` and the layer's name; svd, which begins as cd, until
             `outer_update` is given gradients; or a function (layer, rank, width) -> basis.
    along:   what of a convolution is compressed: whole filters, or as published the kernel's width.
    dual:    in the shape of b (rotated to each new P, as published), in full size (nothing is lost), or none.
    The layers keep their biases, which are trained as they are.  The model's state dict has x and b apart: what is to
    be loaded into a plain model is that of `dense(model)`, as `strict=False` would take x and leave b out.
    Raises ValueError, with the layer's name, for targets that match nothing, for layers that are neither linear nor
    convolutions, and for a rank over a layer's width.
    """
    chosen = matched(model, targets, skip)
    layers: dict[str, SubspaceLayer] = {}
    for name, target in chosen.items():
        layers[name] = _subspaced(name, model.get_submodule(name), _asked(rank, name, target), projection, along, seed)
    for name, layer in layers.items():
        _put(model, model.get_submodule(name), layer)
        layer.origin = (name, projection if isinstance(projection, str) else None)
        layer.seed.fill_(seed)
        if dual != "none":
            layer.correct(full=dual == "full")
    return Subspace(
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers,
        {name: layer.dual for name, layer in layers.items() if layer.dual is not None},
        {name: layer.basis for name, layer in layers.items()},
    )


def dense(model: nn.Module) -> nn.Module:
    """A copy of the model with ordinary layers, of weight W = x + b P, in the place of those in subspaces.

    Its state dict has the names and shapes of the model before `replace_with_subspace`, and holds what b has learnt
    since the last outer update.  The model itself stays as it is.
    """
    model = copy.deepcopy(model)
    if isinstance(model, SubspaceLayer):
        return model.plain()
    for layer in list(model.modules()):
        if isinstance(layer, SubspaceLayer):
            _put(model, layer, layer.plain())
    return model


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a layer wherever it is: it may be in several places."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)


def matched(
    model: nn.Module, targets: str | Sequence[str] | None = None, skip: str | Sequence[str] = ()
) -> dict[str, str | None]:
    """The layers that targets mean: name -> the target that named it, None for those meant without a target."""
    patterns, left_out = _words(() if targets is None else targets), _words(skip)
    named = {name: module for name, module in model.named_modules() if name and _replaceable(module)}
    if targets is None:
        # Beside adapters the layers that they adapt are frozen, and not meant; a model may be frozen as a whole before.
        weights = {name: weight for name, module in named.items() if (weight := own_weight(module)) is not None}
        trained = [name for name, weight in weights.items() if weight.requires_grad] or list(weights)
        linears = [name for name, module in named.items() if not isinstance(module, nn.Conv2d)]
        chosen: dict[str, str | None] = {
            name: None for name in trained if name not in linears[-1:] and not _borrowed(named[name], model)
        }
    else:
        everything = {name: module for name, module in model.named_modules() if name}
        chosen = {name: p for name in everything for p in patterns if _means(p, name)}
        for p in patterns:
            if p not in chosen.values():
                last = sorted({name.rpartition(".")[2] for name in named})
                raise ValueError(f"targets: no layer of {type(model).__name__} is called {p!r}; {nearest(p, last)}")
    for s in left_out:
        if not any(_skips(s, name) for name, _ in model.named_modules()):
            raise ValueError(f"skip: nothing of {type(model).__name__} is called {s!r}; name a layer, or leave it out")
    chosen = {name: p for name, p in chosen.items() if not any(_skips(s, name) for s in left_out)}
    if not chosen:
        raise ValueError(f"targets: no linear or convolutional layer of {type(model).__name__} is left to replace")
    for name in chosen:
        _check(name, model.get_submodule(name), model)
    return chosen


def rank_of(name: str, rank: int | float, width: int) -> int:
    """The rows of P for a layer of this width: `rank` itself, or that share of the width."""
    rows = rank if isinstance(rank, int) else max(1, int(width * rank)) if 0 < rank <= 1 else rank
    if rows != int(rows) or not 1 <= rows <= width:
        raise ValueError(
            f"rank={rank} does not fit {name}, whose width is {width}; choose 1 to {width}, or a share from 0 to 1"
        )
    return int(rows)


def _subspaced(name: str, layer: Any, rank: int | float, projection: str | Choice, along: Any, seed: int) -> Any:
    def basis(width: int) -> Basis:
        rows = rank_of(name, rank, width)
        if callable(projection):
            return projection(name, rows, width)
        if projection not in PROJECTIONS:
            raise ValueError(f"projection={projection!r} is not one of {', '.join(PROJECTIONS)}")
        made = "cd" if projection == "svd" else projection
        return seeded_basis(made, rows, width, seed, name, 0, dtype=layer.weight.dtype)

    if isinstance(layer, nn.Conv2d):
        return SubspaceConv2d(
            layer, basis(layer.weight[0].numel() if along == "filter" else layer.weight.shape[-1]), along
        )
    transposed = is_transposed(layer)
    return SubspaceLinear(layer, basis(layer.weight.shape[0 if transposed else 1]), transposed)


def _asked(rank: Any, name: str, target: str | None) -> int | float:
    if not isinstance(rank, Mapping):
        return rank
    for key, value in rank.items():
        if key == target or _means(key, name):
            return value
    raise ValueError(f"rank names no target that means {name}; give one, or a rank for all")


def _replaceable(layer: nn.Module) -> bool:
    return is_linear(layer) or isinstance(layer, nn.Conv2d)


def _check(name: str, layer: nn.Module, model: nn.Module) -> None:
    if isinstance(layer, SubspaceLayer):
        raise ValueError(f"{name} is in a subspace already")
    if not _replaceable(layer):
        raise ValueError(
            f"{name} is a {type(layer).__name__}; only linear layers and 2-d convolutions go into subspaces: choose "
            f"other targets, or skip={name}"
        )
    if why := _borrowed(layer, model):
        raise ValueError(f"{name} {why}; skip={name}")


def _borrowed(layer: nn.Module, model: nn.Module) -> str:
    """Why a layer's weight is not its own to replace; empty where it is."""
    weight = own_weight(layer)
    if weight is None:
        return "has a weight that is made of others (a parametrization)"
    for name, module in model.named_modules():
        other = next((key for key, p in module._parameters.items() if p is weight and module is not layer), None)
        if other:
            return f"shares its weight with {name}.{other}"
    return ""


def _words(names: str | int | Sequence[str | int]) -> list[str]:
    if isinstance(names, str | int):
        return [word.strip() for word in str(names).split(",")]
    return [str(name) for name in names]


def _means(pattern: str, name: str) -> bool:
    """Whether a target means a layer: its last part, its whole name, or a pattern."""
    return pattern in (name, name.rpartition(".")[2]) or ("*" in pattern and fnmatchcase(name, pattern))


def _skips(pattern: str, name: str) -> bool:
    return _means(pattern, name) or pattern in name.split(".")
