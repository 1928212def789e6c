"""Whether a saved state belongs to an optimizer, and how it comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lilliput.optim.driver import SubspaceOptimizer


def matched(
    optimizer: SubspaceOptimizer, state_dict: dict[str, Any]
) -> list[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
    """Each parameter with its saved state and its group.  Raises ValueError, naming the first difference."""
    ours, saved = optimizer.param_groups, state_dict["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (ours, saved)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the checkpoint has groups of {sizes[1]} parameters, this optimizer of {sizes[0]}: another model"
        )
    pairs = []
    for mine, theirs in zip(ours, saved, strict=True):
        _same_kind(mine, theirs)
        for p, key in zip(mine["params"], theirs["params"], strict=True):
            if key in state_dict["state"]:
                held = state_dict["state"][key]
                _fits(p, held, optimizer.layout(p, {**mine, **theirs}), key)
                pairs.append((p, held, mine))
    return pairs


def _same_kind(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in ("rule", "rank", "proj_type", "states"):
        if mine.get(name) != theirs.get(name):
            raise ValueError(f"the checkpoint was made with {name}={theirs.get(name)!r}, this optimizer has "
                             f"{mine.get(name)!r}; build it with the options of the run that saved it")  # fmt: skip


def _fits(p: Tensor, held: dict[str, Any], layout: dict[str, Any], key: object) -> None:
    found = {name: (tuple(x.shape), x.dtype) for name, x in held.items() if isinstance(x, Tensor)}
    optional = {"P", "P2"}  # absent before the first usable gradient; present where a seeded one was assigned by hand
    for name in (found.keys() | layout.keys()) - (optional if found.keys() ^ layout.keys() else set()):
        if found.get(name) != layout.get(name):
            raise ValueError(f"state {name!r} of parameter {key} is {found.get(name)} in the checkpoint, but a weight "
                f"of shape {tuple(p.shape)} keeps {layout.get(name)}: another model or optimizer")  # fmt: skip


def moved(saved: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy of a saved state on a device, every dtype kept."""
    return {name: x.detach().to(device, copy=True) if isinstance(x, Tensor) else x for name, x in saved.items()}
