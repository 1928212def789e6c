"""Fully sharded weights (FSDP2): each matrix is updated whole by one rank, which alone keeps its state.

A projection needs its gradient whole, so gradient and weight are gathered, their owner takes the step that one process
would take, and the new weight is scattered again; owners take turns, which spreads states and refreshes over the ranks.
Element-wise rules on ordinary parameters work on each rank's shard and gather nothing.

Checkpoints hold whole tensors: `state_dict()` is a collective call, its value equals that of one process, and
`load_state_dict` takes it on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.lean.policy import fast
from lilliput.optim import dense
from lilliput.optim.options import ranked
from lilliput.optim.states import allocate, layout, moved, working_dtype

if TYPE_CHECKING:
    from lilliput.optim.driver import SubspaceOptimizer

Group = dict[str, Any]


def is_sharded(p: Tensor) -> bool:
    """Whether a tensor is a DTensor, told without importing what it is made of."""
    return hasattr(p, "device_mesh") and hasattr(p, "placements")


def check(p: Tensor) -> bool:
    """Raise ValueError for a weight that `fully_shard` has put another in the place of."""
    if hasattr(p, "_fsdp_orig_uid") and not is_sharded(p):
        raise ValueError(f"a weight of shape {tuple(p.shape)} is not in the model any more: make groups and optimizer "
                         "after fully_shard")  # fmt: skip
    return False


def update(optimizer: SubspaceOptimizer, params: Sequence[Any], grads: Sequence[Any], group: Group) -> None:
    """Step parameters of one group; every rank calls this with the same parameters in the same order."""
    for p, grad in zip(params, grads, strict=True):
        _one_dimensional(p)
        if _by_shard(optimizer, group):
            _update_shard(optimizer, p, grad, group)
        else:
            _update_whole(optimizer, p, grad, group)


def _update_shard(optimizer: SubspaceOptimizer, p: Any, grad: Any, group: Group) -> None:
    local, piece, state = p.to_local(), grad.to_local(), optimizer.state[p]
    probe = piece.sum(dtype=working_dtype(p.dtype))
    torch.distributed.all_reduce(probe, group=p.device_mesh.get_group())
    if not math.isfinite(float(probe)):
        group["skipped"] += 1
        return
    if "step" not in state:
        tensors = layout(optimizer.rule.moments(tuple(local.shape), group), group["states"], working_dtype(p.dtype))
        state.update(allocate(tensors, local.device), step=0)
    state["step"] += 1
    if local.numel():
        dense.step_([local], [piece], [state], optimizer.rule, group)


def _update_whole(optimizer: SubspaceOptimizer, p: Any, grad: Any, group: Group) -> None:
    from torch.distributed.tensor import distribute_tensor

    owner = optimizer.index(p) % p.device_mesh.size()
    G = grad.full_tensor()
    if not math.isfinite(float(G.sum(dtype=working_dtype(G.dtype)))):  # all ranks see the same G and agree
        group["skipped"] += 1
        return
    W = p.full_tensor()
    if p.device_mesh.get_local_rank() == owner:
        with fast(W.device):
            if ranked(group):
                optimizer.finish([optimizer.prepare(p, G, group, W)], group)
            else:
                state = optimizer.ready(p, group)
                state["step"] += 1
                dense.step_([W], [G], [state], optimizer.rule, group)
    new = distribute_tensor(W, p.device_mesh, p.placements, src_data_rank=owner)
    p.to_local().copy_(new.to_local())


def gathered(optimizer: SubspaceOptimizer, p: Any, group: Group) -> dict[str, Any]:
    """The whole state of a sharded parameter, on every rank."""
    from torch.distributed.tensor import DTensor

    state = dict(optimizer.state.get(p, {}))
    if _by_shard(optimizer, group):

        def whole(x: Tensor) -> Tensor:
            return DTensor.from_local(x, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()

        return {name: whole(x) if isinstance(x, Tensor) else x for name, x in state.items()}
    mesh_group = p.device_mesh.get_group()
    source = torch.distributed.get_global_rank(mesh_group, optimizer.index(p) % p.device_mesh.size())
    box = [state]
    torch.distributed.broadcast_object_list(box, src=source, group=mesh_group)
    return box[0]


def local_state(optimizer: SubspaceOptimizer, p: Any, saved: dict[str, Any], group: Group) -> dict[str, Any]:
    """This rank's part of a whole saved state."""
    from torch.distributed.tensor import distribute_tensor

    if not _by_shard(optimizer, group):
        mine = p.device_mesh.get_local_rank() == optimizer.index(p) % p.device_mesh.size()
        return moved(saved, p.device) if mine else {}

    def part(x: Tensor) -> Tensor:
        return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None).to_local().clone()

    return {name: part(x) if isinstance(x, Tensor) else x for name, x in saved.items()}


def _by_shard(optimizer: SubspaceOptimizer, group: Group) -> bool:
    # Blocks of 8-bit codes would depend on the number of ranks; factored moments need whole rows and columns.
    return not ranked(group) and optimizer.rule.elementwise and group["states"] != "8bit"


def _one_dimensional(p: Any) -> None:
    if p.device_mesh.ndim != 1:
        raise ValueError(f"a weight is sharded over a mesh of {p.device_mesh.ndim} dimensions; use weights of "
                         "fully_shard over a one-dimensional mesh")  # fmt: skip
