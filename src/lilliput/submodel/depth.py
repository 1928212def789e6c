"""Models of different depth: a client holds the first blocks of each stage (stage and layer splitting, HeteroAvg).

A stage is a Sequential or ModuleList whose blocks are of one class: the stages of a ResNet, the layers of a
transformer.  What lies outside stages, such as stem, last norm and head, is part of every client's model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lilliput.core.fleet import Fleet
from lilliput.submodel.slices import Slice

INCO = ((1, 1, 1, 1), (1, 1, 2, 2), (2, 2, 2, 2), (2, 2, 3, 3), (3, 3, 3, 3))


@dataclass(frozen=True)
class Stages:
    """Each client holds the first blocks of every stage: by default InCo's five tiers, ResNet-10 to ResNet-26.

    blocks: of each tier, the number of blocks that it keeps of each stage; one number is for all stages.
    shares: of each tier, its share of the clients, in the order of their ids; equal by default.
    """

    blocks: tuple[tuple[int, ...] | int, ...] = INCO
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        own = tuple(keep if isinstance(keep, int) else tuple(keep) for keep in self.blocks)
        object.__setattr__(self, "blocks", own)
        object.__setattr__(self, "shares", tuple(self.shares))
        if not self.blocks:
            raise ValueError(
                "blocks is empty; give the blocks per stage of one or more tiers, such as [[1, 1], [2, 3]]"
            )
        shares = self._shares
        if len(shares) != len(self.blocks) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"shares {list(self.shares)} must be {len(self.blocks)} numbers, one for each tier, that sum to 1"
            )

    @property
    def _shares(self) -> tuple[float, ...]:
        return self.shares or (1 / len(self.blocks),) * len(self.blocks)

    def __call__(self, fleet: Fleet, client: int) -> Slice:
        return self.tiers(fleet.task.model)[self.tier(fleet.clients, client)]

    def tier(self, clients: Sequence[int], client: int) -> int:
        """The tier of a client, from 0: shares are rounded down, and the last tier takes the rest."""
        position = bisect_left(clients, client)
        for tier, share in enumerate(self._shares):
            count = int(share * len(clients) + 1e-9)
            if position < count:
                return tier
            position -= count
        return len(self.blocks) - 1

    def tiers(self, model: nn.Module) -> list[Slice]:
        """The slice of each tier.  Raises ValueError if the model has no stages, or a tier does not fit them."""
        made = _TIERS.setdefault(model, {})
        if self.blocks not in made:
            made[self.blocks] = self._made(model, stages(model))
        return made[self.blocks]

    def _made(self, model: nn.Module, found: dict[str, int]) -> list[Slice]:
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no stages to shorten; put its blocks, of one class of your own, into an "
                "nn.Sequential or nn.ModuleList"
            )
        return [self._slice(model, found, keep) for keep in self.blocks]

    def _slice(self, model: nn.Module, found: dict[str, int], keep: tuple[int, ...] | int) -> Slice:
        counts = (keep,) * len(found) if isinstance(keep, int) else tuple(keep)
        has = ", ".join(f"{name} {count}" for name, count in found.items())
        if len(counts) != len(found):
            raise ValueError(f"a tier of {list(counts)} names {len(counts)} stages; {type(model).__name__} has {has}")
        for (name, most), count in zip(found.items(), counts, strict=True):
            if not 1 <= count <= most:
                raise ValueError(
                    f"a tier keeps {count} blocks of {name}; {type(model).__name__} has {has}, keep 1 or more"
                )
        left_out = [
            f"{name}.{i}" for (name, most), count in zip(found.items(), counts, strict=True) for i in range(count, most)
        ]
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        layout = {block: [(name, 0) for name in names if name.startswith(f"{block}.")] for block in left_out}
        return Slice({block: torch.empty(0, dtype=torch.int64, device="cpu") for block in left_out}, layout)


_TIERS: WeakKeyDictionary[nn.Module, dict[Any, list[Slice]]] = WeakKeyDictionary()


def stages(model: nn.Module) -> dict[str, int]:
    """The number of blocks of each stage, by its name in the model."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stage}.") for stage in found)
        if isinstance(module, nn.Sequential | nn.ModuleList) and not inside and name:
            kinds: set[Any] = {type(block) for block in module}
            if len(kinds) == 1 and not next(iter(kinds)).__module__.startswith("torch.nn"):
                found[name] = len(module)
    return found
