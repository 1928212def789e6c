"""What the update of one weight allocates and releases again, found by an update on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lilliput.core.meter import Instrument
from lilliput.fake import like
from lilliput.footprint.accelerator import ACCELERATOR, CPU, faking
from lilliput.optim import SubspaceOptimizer, subspace


def scratch(optimizer: SubspaceOptimizer, device: str) -> dict[Tensor, int]:
    """Bytes by weight; the renewal of a weight's subspace is part of its update."""
    place = ACCELERATOR if device != "cpu" else CPU
    by_weight = {}
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name not in ("params", "names")}
        for p in group["params"]:
            key = (type(optimizer), repr(options), tuple(p.shape), p.dtype, place)
            if key not in _measurements:
                _measurements[key] = _measured(optimizer, p, options, place)
            by_weight[p] = _measurements[key]
    return by_weight


_measurements: dict[Any, int] = {}


def _measured(optimizer: SubspaceOptimizer, p: Tensor, options: dict[str, Any], place: torch.device) -> int:
    same: Any = type(optimizer)
    with faking(accelerator=place != CPU), Instrument() as seen:
        twin = nn.Parameter(like(p.detach(), place))
        alone = same([{**options, "params": [twin]}])
        twin.grad = torch.empty_like(twin)
        alone.step()
        renew(alone)
        before = seen.peak_bytes = seen.bytes
        alone.step()
    return seen.peak_bytes - before


def renew(optimizer: torch.optim.Optimizer) -> None:
    """Make every subspace that is ever renewed due at the next step."""
    for state in optimizer.state.values():
        if state.get("due", subspace.NEVER) != subspace.NEVER:
            state["due"] = state["step"]
