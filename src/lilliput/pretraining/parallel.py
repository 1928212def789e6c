"""Several processes, as torchrun starts them: whole models side by side, or one model in shards.

Side by side, each gradient is summed over the processes as soon as it is complete, as DistributedDataParallel does, but
in place: there is no second copy of the gradients, and sums do not depend on how many steps came before.  Updates in
the backward pass sum for themselves (`optim.per_layer`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lilliput.optim.gradients import own
from lilliput.optim.processes import same

Out = TypeVar("Out")


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def total(self, n: int) -> int:
        """The sum of a number over all processes."""
        return int(self.sum(torch.tensor(n, device=self.device))) if self.size > 1 else n

    def same(self, number: int) -> bool:
        """Whether all processes gave this number."""
        return self.size == 1 or same(number, self.device)

    def agreed(self, yes: bool) -> bool:
        """Whether any process says yes, told to all."""
        return bool(self.sum(torch.tensor(float(yes), device=self.device)))

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def gathered(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def by_the_first(self, work: Callable[[], Out]) -> Out | None:
        """What work gives in the first process, None in the others.  What it refuses there is raised in all of them:
        those that go on would wait for ever."""
        found, refusal = None, None
        if self.first:
            try:
                found = work()
            except (RuntimeError, ValueError, OSError) as error:
                refusal = error
        refusal = self.gathered(refusal)[0]
        if refusal is not None:
            raise refusal
        return found


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The processes that torchrun started, or this one alone.  Raises ValueError for a device that is not here."""
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    where = _device(device, local)
    if size == 1 and not dist.is_initialized():
        yield World(device=where)
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    if where.type == "cuda":
        torch.cuda.set_device(where)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), where)
    finally:
        if ours:
            dist.destroy_process_group()


def _device(name: str, local: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name} is none; write cpu, cuda or cuda:1") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={name}: there is no CUDA device here; write device=cpu")
        device = torch.device("cuda", local if device.index is None else device.index)
    return device


class Sums:
    """Sums gradients over processes as they come in the last backward pass of a step, in the same order everywhere."""

    def __init__(self, params: Sequence[Tensor], world: World):
        self._left = 0
        # From the last layer back, about as gradients come.
        self._params = list(reversed(params)) if world.size > 1 else []
        self._world, self._ready, self._pending = world, set(), []  # type: ignore[var-annotated]
        for p in self._params:
            p.register_post_accumulate_grad_hook(self._arrived)

    def begin(self, left: int) -> None:
        """A pass begins, and so many of its step come after it."""
        self._left = left

    def _arrived(self, p: Tensor) -> None:
        if not self._left:
            p.grad = own(p.grad)  # type: ignore[arg-type]
            self._ready.add(p)
            while len(self._pending) < len(self._params) and self._params[len(self._pending)] in self._ready:
                self._sum(self._params[len(self._pending)])

    def _sum(self, p: Tensor) -> None:
        self._pending.append(dist.all_reduce(p.grad, async_op=True))

    def complete(self) -> None:
        """Return when all sums are there.  What has no gradient in any process has none after it."""
        if not self._params:
            return
        present = torch.tensor([float(p.grad is not None) for p in self._params], device=self._world.device)
        for p in self._params[len(self._pending) :]:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self._sum(p)
        for work in self._pending:
            work.wait()
        for p, n in zip(self._params, self._world.sum(present).tolist(), strict=True):
            if not n:
                p.grad = None
        self._ready.clear()
        self._pending.clear()


def shard(module: nn.Module, world: World) -> nn.Module:
    """Each block of the module (elements of its lists) and the rest in shards over all processes (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for blocks in [m for m in module.modules() if isinstance(m, nn.ModuleList)]:
        for block in blocks:
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module
