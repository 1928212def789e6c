"""Processes that train copies of one model side by side, and who else sums their gradients."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """The processes of a group, whose gradients are summed, or averaged where each loss is a mean of its own."""

    def __init__(self, group: Any = None, mean: bool = False):
        """group: of torch.distributed; all processes for None.  Raises RuntimeError before init_process_group."""
        self.group, self.mean, self.size = group, mean, dist.get_world_size(group)

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the processes, or averaged, in place."""
        dist.all_reduce(x, group=self.group)
        return x.div_(self.size) if self.mean else x

    def same(self, number: int) -> bool:
        """Whether all processes gave this number."""
        return same(number, self._device(), self.group)

    def _device(self) -> torch.device:
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")


def same(number: int, device: torch.device, group: Any = None) -> bool:
    """Whether all processes of a group gave this number; a collective call."""
    bounds = torch.tensor([number, -number], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = bounds.tolist()
    return largest == -smallest


def wrapped(params: Iterable[Tensor]) -> str | None:
    """The DistributedDataParallel that sums gradients of these parameters, by the name of its class; None if none does.

    Nothing on a parameter tells, so that the modules that exist are asked.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    ids, ddp = {id(p) for p in params}, torch.nn.parallel.DistributedDataParallel
    for module in gc.get_objects():
        # isinstance would ask the object, which may be a lazy one.
        if issubclass(type(module), ddp) and any(id(p) in ids for p in module.parameters()):
            return type(module).__name__
    return None
