"""A cut chosen by what it costs a device: the latest one that stays within so much memory, or bytes per round.

Costs are found by running the client's part on the meta device, where nothing is allocated or computed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lilliput.core.meter import Instrument
from lilliput.splitter.parts import Client
from lilliput.splitter.probes import Inputs, call
from lilliput.splitter.trace import states
from lilliput.splitter.values import leaves, mapped
from lilliput.training.settings import Training
from lilliput.training.updates import Update, make

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Budget(Protocol):
    """What a client's part may cost."""

    limit: int

    def cost(self, client: Client, batch: Inputs) -> int:
        """What it costs, in the unit of the limit; the part and the batch are on the meta device."""


@dataclass(frozen=True)
class Memory:
    """Bytes that training the client's part takes at its peak: parameters, buffers, optimizer, and one step.

    A step holds activations, gradients and what the optimizer allocates; the batch itself is not counted.
    """

    limit: int
    batch_size: int | None = None
    training: Training = field(default_factory=Training)

    def cost(self, client: Client, batch: Inputs) -> int:
        batch = resized(batch, self.batch_size)
        with torch.enable_grad(), Instrument() as instrument:
            params: list[Tensor] = [p for p in client.train().parameters() if p.requires_grad]
            optimizer = _update(self.training, params, client)
            sent = call(client, batch)
            roots = [x for x in leaves(sent).values() if x.requires_grad]
            if roots and params:
                pulled = [torch.empty_like(x) for x in roots]
                grads = torch.autograd.grad(roots, params, pulled, allow_unused=True)
                used = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
                with torch.no_grad():
                    optimizer.apply(range(len(params)), used)
        held = sum(x.nbytes for x in (*client.parameters(), *client.buffers()))
        return held + instrument.peak_bytes


@dataclass(frozen=True)
class BytesPerRound:
    """Bytes between the server and one client in a round: its part down and up, activations up and gradients down.

    examples:     of a client in a round, over all local epochs.
    upload_every: the activations of every so many batches are uploaded (server_update_interval of FSL-SAGE).
    gradients:    whether those at the cut come back (SplitFed) or not (CSE-FSL, FSL-SAGE).
    Labels and what an auxiliary head costs are not in it.
    """

    limit: int
    examples: int
    upload_every: int = 1
    gradients: bool = True

    def cost(self, client: Client, batch: Inputs) -> int:
        with torch.no_grad():
            sent = leaves(call(client.train(), batch))
        count = next(iter(sent.values())).shape[0]
        up = sum(x.nbytes for x in sent.values())
        down = sum(x.nbytes for x in sent.values() if x.is_floating_point()) if self.gradients else 0
        model = sum(p.nbytes for p in client.parameters() if p.requires_grad)
        model += sum(x.nbytes for _, x, _, kind in states(client) if kind == "_buffers")
        return 2 * model + (up + down) * self.examples // (count * self.upload_every)


def _update(training: Training, params: list[Tensor], client: Any = None) -> Update:
    return make(
        training.optimizer, params, training.lr, momentum=training.momentum, weight_decay=training.weight_decay,
        nesterov=training.nesterov, options=training.optimizer_options, model=client,
    )  # fmt: skip


def memory(limit: str | int, batch_size: int | None = None, training: Training | None = None) -> Memory:
    """The latest cut whose client part trains within so much memory: bytes, or "200MB", "1.5GiB".

    batch_size: of the device; the example's by default.  training: what tells its optimizer; SGD by default.
    """
    return Memory(parsed(limit), batch_size, training or Training())


def bytes_per_round(limit: str | int, examples: int, upload_every: int = 1, gradients: bool = True) -> BytesPerRound:
    """The latest cut whose round sends at most so much per client: see `BytesPerRound`."""
    return BytesPerRound(parsed(limit), examples, upload_every, gradients)


def parsed(size: str | int) -> int:
    """Bytes, from a number or "200MB"; MB is 10^6 and MiB 2^20."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-z]*)\s*", str(size).lower())
    if match is None or match[2] not in {*_UNITS, "b"}:
        raise ValueError(f"{size!r} is no size; write bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS.get(match[2], 1))


def resized(batch: Inputs, examples: int | None) -> Inputs:
    """A batch on the meta device for another number of examples; None leaves it."""
    rows = next(x.shape[0] for x in leaves(batch).values() if isinstance(x, Tensor))

    def one(name: str, x: Any) -> Any:
        per_example = isinstance(x, Tensor) and x.dim() and x.shape[0] == rows
        return x.new_empty((examples, *x.shape[1:])) if examples is not None and per_example else x

    return mapped(batch, one)
