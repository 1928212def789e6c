"""Parameter groups for any model: which weights are projected."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lilliput.core.layers import is_linear, own_weight
from lilliput.core.registry import nearest
from lilliput.optim import options as options_
from lilliput.optim.options import matrix_shape

WORDS = ("all-linear", "all-layers", "all")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def param_groups(
    model: nn.Module, rank: int = 128, targets: str | Sequence[str] = "all-linear", **options: Any
) -> list[dict[str, Any]]:
    """A projected group and an ordinary one, every trainable parameter in exactly one of them.

    targets: "all-linear" for every linear layer but the output head, "all-layers" for convolutions too, "all" for the
    head as well, or parts of module names (`["attn", "mlp"]`), linear or convolutional.  Matrices with a side no longer
    than the rank stay ordinary.
    options: those of a projected group, such as update_proj_gap, scale, proj_type.
    Raises ValueError if nothing is projected.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"param_groups reads a model's layers, not a {type(model).__name__}; give the model itself")
    options_.check_rank(rank)
    options_.check_names(options)
    _check_targets(model, targets)
    chosen = dict(_chosen(model, rank, targets))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    projected = [(name, p) for name, p in trainable if id(p) in chosen]
    ordinary = [(name, p) for name, p in trainable if id(p) not in chosen]
    if not projected:
        raise ValueError(f"no trainable weight of targets {targets!r} has both sides longer than rank {rank}; "
                         "lower the rank or name other targets")  # fmt: skip
    _say_stacks(ordinary, sum(p.numel() for _, p in trainable))
    return [{**_group(projected), "rank": rank, **options}, *([_group(ordinary)] if ordinary else [])]


def of(
    params: Sequence[Tensor], rank: int, model: nn.Module | None, targets: str | Sequence[str], strict: bool
) -> list[dict[str, Any]]:
    """These parameters of a model as `param_groups` parts them; without a model, every matrix above the rank apart.

    strict: whether it is an error, ValueError, that nothing is projected.
    """
    if model is None:
        return list(split({"params": list(params)}, rank))
    ids = {id(p) for p in params}
    if not strict and not any(id_ in ids for id_, _ in _chosen(model, rank, targets)):
        return [{"params": list(params)}]
    groups = [
        {**group, "params": [p for _, p in chosen], "names": [name for name, _ in chosen]}
        for group in param_groups(model, rank, targets)
        if (chosen := [(n, p) for n, p in zip(group["names"], group["params"], strict=True) if id(p) in ids])
    ]
    return groups


def split(group: dict[str, Any], rank: int) -> Iterator[dict[str, Any]]:
    """A group in two: matrices with both sides longer than the rank, to be projected, and the rest."""
    others = {name: value for name, value in group.items() if name not in ("params", "names")}
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    parts: dict[bool, list[Any]] = {True: [], False: []}
    for entry in params:
        p = entry[1] if isinstance(entry, tuple) else entry  # torch takes (name, parameter) too
        parts[p.dim() >= 2 and min(matrix_shape(p)) > rank].append(entry)
    if parts[True]:
        yield {**others, "params": parts[True], "rank": rank}
    if parts[False] or not parts[True]:
        yield {**others, "params": parts[False]}


def _say_stacks(ordinary: Sequence[tuple[str, Tensor]], total: int) -> None:
    """Experts of transformers are stacks of matrices, (experts, out, in), outside of any linear layer."""
    stacks = [(name, p) for name, p in ordinary if p.dim() == 3 and name.rpartition(".")[2] != "weight"]
    if stacks:
        share = sum(p.numel() for _, p in stacks) / total
        name, p = stacks[0]
        warnings.warn(
            f"{len(stacks)} stacks of matrices, such as {name} {tuple(p.shape)}, are not projected; they are "
            f"{share:.0%} of what is trained and keep their optimizer states in full", stacklevel=3,
        )  # fmt: skip


def _check_targets(model: nn.Module, targets: str | Sequence[str]) -> None:
    if isinstance(targets, str) and targets in WORDS:
        return
    names = [name for name, module in model.named_modules() if _projectable(module)]
    for part in [targets] if isinstance(targets, str) else targets:
        if not any(part in name for name in names):
            words = {word for name in names for word in name.split(".") if not word.isdigit()}
            raise ValueError(f"targets: no layer of {type(model).__name__} has {part!r} in its name; "
                             f"{nearest(part, words | set(WORDS))}")  # fmt: skip


def _projectable(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, CONVOLUTIONS)


def _group(named: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    return {"params": [p for _, p in named], "names": [name for name, _ in named]}


def _chosen(model: nn.Module, rank: int, targets: str | Sequence[str]) -> Iterator[tuple[int, str]]:
    parts = [targets] if isinstance(targets, str) else list(targets)
    head = None if isinstance(targets, str) and targets == "all" else _head_weight(model)
    for name, module in model.named_modules():
        weight = own_weight(module)
        if weight is None or not _projectable(module):
            continue
        linear = is_linear(module)
        every = linear if targets == "all-linear" else targets in ("all", "all-layers")
        wanted = every or any(part in name for part in parts)
        if wanted and weight is not head and min(matrix_shape(weight)) > rank:
            yield id(weight), name


def _head_weight(model: nn.Module) -> Tensor | None:
    """The output layer's weight of a language model: rows are tokens, and often tied to the embedding."""
    inner = getattr(model, "_orig_mod", getattr(model, "module", model))  # compiled, or in DistributedDataParallel
    find: Any = getattr(inner, "get_output_embeddings", None)
    head = find() if find is not None else None
    return None if head is None else head.weight
