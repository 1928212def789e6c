"""A cut chosen by what it costs a device: the latest one within a limit of memory, or of bytes per round.

A cost is found by running the client's part on the meta device, where nothing is allocated or computed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lilliput.core.meter import Instrument
from lilliput.fake import Fake, like
from lilliput.splitter.dividing import divide_or_none
from lilliput.splitter.names import mapped_tensors, states, tensors
from lilliput.splitter.parts import Client, on_meta
from lilliput.splitter.places import candidates
from lilliput.splitter.probes import Inputs, call, named
from lilliput.training.settings import Training
from lilliput.training.updates import Update, make

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Budget(Protocol):
    """What a client's part may cost."""

    limit: int

    def cost(self, client: Client, batch: Inputs) -> int:
        """What it costs, in the unit of the limit; the part and the batch are on the meta device."""


@dataclass(frozen=True)
class MemoryBudget:
    """Peak bytes of training the client's part: parameters, buffers, optimizer state, and what one step allocates.

    A step allocates activations, gradients and what the optimizer needs; the batch itself is not counted.
    """

    limit: int
    batch_size: int | None = None
    training: Training = field(default_factory=Training)

    def cost(self, client: Client, batch: Inputs) -> int:
        batch = resized(batch, self.batch_size)
        with torch.enable_grad(), Instrument() as instrument:
            params: list[Tensor] = [p for p in client.train().parameters() if p.requires_grad]
            optimizer = _update(self.training, params, client)
            payload = call(client, batch)
            roots = [x for x in tensors(payload).values() if x.requires_grad]
            if roots and params:
                at_cut = [torch.empty_like(x) for x in roots]
                grads = torch.autograd.grad(roots, params, at_cut, allow_unused=True)
                all_grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
                with torch.no_grad():
                    optimizer.apply(range(len(params)), all_grads)
        weights = sum(x.nbytes for x in (*client.parameters(), *client.buffers()))
        return weights + instrument.peak_bytes


@dataclass(frozen=True)
class TrafficBudget:
    """Bytes between the server and one client in a round: its part down and up, activations up and gradients down.

    examples:     how many a client trains on in a round, over all local epochs.
    upload_every: one batch of this many uploads its activations (server_update_interval of FSL-SAGE).
    gradients:    whether gradients at the cut come back (SplitFed) or not (CSE-FSL, FSL-SAGE).
    Labels and the auxiliary head are not counted.
    """

    limit: int
    examples: int
    upload_every: int = 1
    gradients: bool = True

    def cost(self, client: Client, batch: Inputs) -> int:
        with torch.no_grad():
            payload = tensors(call(client.train(), batch))
        count = next(iter(payload.values())).shape[0]
        up = sum(x.nbytes for x in payload.values())
        down = sum(x.nbytes for x in payload.values() if x.is_floating_point()) if self.gradients else 0
        model = sum(p.nbytes for p in client.parameters() if p.requires_grad)
        model += sum(x.nbytes for _, x, _, kind in states(client) if kind == "_buffers")
        return 2 * model + (up + down) * self.examples // (count * self.upload_every)


def _update(training: Training, params: list[Tensor], client: Any = None) -> Update:
    return make(
        training.optimizer, params, training.lr, momentum=training.momentum, weight_decay=training.weight_decay,
        nesterov=training.nesterov, options=training.optimizer_options, model=client,
    )  # fmt: skip


def memory(limit: str | int, batch_size: int | None = None, training: Training | None = None) -> MemoryBudget:
    """The latest cut whose client part trains within this memory: bytes, or "200MB", "1.5GiB".

    batch_size: of the device; by default the example's.
    training:   settings of its training, of which the optimizer counts; by default SGD.
    """
    return MemoryBudget(parsed(limit), batch_size, training or Training())


def bytes_per_round(limit: str | int, examples: int, upload_every: int = 1, gradients: bool = True) -> TrafficBudget:
    """The latest cut whose round sends at most this much per client: see `TrafficBudget`."""
    return TrafficBudget(parsed(limit), examples, upload_every, gradients)


def parsed(size: str | int) -> int:
    """Bytes, from a number or "200MB"; MB is 10^6 and MiB 2^20."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-z]*)\s*", str(size).lower())
    if match is None or match[2] not in {*_UNITS, "b"}:
        raise ValueError(f"{size!r} is no size; write bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS.get(match[2], 1))


def resized(batch: Inputs, examples: int | None) -> Inputs:
    """A batch on the meta device with another number of examples; None keeps the number."""
    if examples is None:
        return batch
    rows = next(x.shape[0] for x in tensors(batch).values())

    def change(x: Tensor) -> Tensor:
        return x.new_empty((examples, *x.shape[1:])) if x.dim() and x.shape[0] == rows else x

    return mapped_tensors(batch, change)


def latest_within(
    model: nn.Module, budget: Budget, example: Any, batches: tuple[Inputs, Inputs], shared: tuple[str, ...]
) -> str:
    """The latest module to cut before whose client part costs no more than the budget allows.

    Raises ValueError if there is none, saying what the cheapest costs.
    """
    costs = {}
    with Fake(value=0):
        bare, (first, second) = on_meta(model), (mapped_tensors(b, like) for b in batches)
        batch = mapped_tensors(named(model, example), like)
        for name in reversed(candidates(bare, first)):
            parts = divide_or_none(bare, name, (first, second), shared)
            if parts is None:
                continue
            costs[name] = budget.cost(parts[0], batch)
            if costs[name] <= budget.limit:
                return name
    if not costs:
        raise ValueError("the model has no valid place to cut; name a module")
    name = min(costs, key=lambda name: costs[name])
    raise ValueError(f"no cut costs {budget.limit:,} bytes or less; the cheapest, at {name!r}, costs {costs[name]:,}")
