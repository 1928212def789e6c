"""FSL-SAGE (Nair et al., ICML 2025).  https://arxiv.org/abs/2505.23182

The device's auxiliary head only estimates the server's gradient at the cut, g = dL(a(h), y)/dh.  Every l rounds the
server aligns it: over a memory of activations h and labels it computes the true gradients T of its own part, and fits
the estimates to them, min_a sum |dL(a(h), y)/dh - T|^2, by differentiating twice.  Then it sends the head down, once.

We differ from the published program in three ways.  We use gradients per example, so that the batch size of the
alignment does not matter; the program divides estimates by that size and targets by the size of the memory.  Labels
that do not count in training do not count here either, so that the padding of text does not matter.  The forward over
the memory does not change the server's BatchNorm statistics.  compat="official" does as published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lilliput.algorithms.cse_fsl import CseFsl
from lilliput.algorithms.fedavg import advance, model_sums
from lilliput.algorithms.splitting.checks import check_memory, fits
from lilliput.algorithms.splitting.device import begin, seen, sent, take, total
from lilliput.algorithms.splitting.half import Half, Payload, gradients, received
from lilliput.algorithms.splitting.memory import remembered
from lilliput.algorithms.splitting.server import slopes
from lilliput.algorithms.splitting.settings import UPLOAD
from lilliput.core import random, tree
from lilliput.core.fleet import Client, Fleet, Reply, on_client
from lilliput.core.labels import counted
from lilliput.core.tree import Body
from lilliput.splitter.task import portion
from lilliput.submodel import reduce


@dataclass(frozen=True)
class FslSage(CseFsl):
    """CSE-FSL whose server fits the heads to its own gradients, so that devices do not train them: sends least.

    align_interval:   l; a client's head is aligned if its last alignment was l rounds ago, or if it never was.
    align_epochs, align_batch_size: passes of an alignment over the client's memory, and examples per step.
    memory_size:      how many of a client's newest examples the server remembers.
    auxiliary:        personal: a head per client, as published; shared: one head, aligned to each client in turn.
    warm_start:       runs the first round as CSE-FSL with a shared head.
    order:            as for CSE-FSL.  In rounds that align a head, sequential runs one client at a time, because each
                      head is aligned with the server's part as the client before has left it.
    """

    auxiliary: Literal["shared", "personal"] = "personal"
    align_interval: int = 10
    align_epochs: int = 100
    align_batch_size: int = 1000
    memory_size: int = 1000
    warm_start: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("align_interval", "align_epochs", "align_batch_size", "memory_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def init(self, task: Any) -> Body:
        return {**super().init(task), "auxiliary_opt": {}}

    def check(self, task: Any, data: Mapping[int, Any]) -> None:
        super().check(task, data)
        check_memory(self.memory_size, data)

    def round(self, state: Body, fleet: Fleet) -> Body:
        if self.warm_start and fleet.round == 1:
            return self.cse_round(state, fleet, shared=True)
        server, own = self.one_server(fleet, state), portion(fleet.task.client_part, state)
        aligner = Aligner(self, fleet, server, state)
        sums = reduce(self._rounds(fleet, server, own, aligner), **model_sums(self.combine, own))
        return {**self.moved(fleet.task, state, advance(self.combine, own, sums), server), **aligner.shared}

    def _rounds(self, fleet: Fleet, server: Half, down: Body, aligner: Aligner) -> Iterator[Reply]:
        """Each client's round: if its head is due, one upload and the aligned head down; then all batches."""
        cohort = fleet.sample(self.cohort)
        due = [c for c in cohort if aligner.is_due(c)]
        together = self.order == "interleaved" or not due
        for clients in [cohort] if together else [[c] for c in cohort]:
            opening = [c for c in clients if c in due]
            heads: dict[int, Body] = {}
            for reply in self.served(fleet, server, fleet.call(self.open, down, to=opening)):
                aligner.remember(reply)
                heads[reply.client] = {"auxiliary": aligner.align(reply.client)}
            each = {c: heads.get(c, down) for c in clients if c in heads or c not in due}
            for reply in self.served(fleet, server, fleet.call(self.close, each=each)):
                aligner.remember(reply, aligned=reply.client in heads)
                yield reply

    @on_client(like=UPLOAD)
    def open(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """Upload the activations of the first batch with a label that counts, before any training."""
        state = begin(self, client, state, msg)
        for n in range(total(self, client)):
            (part,) = take(client, self, range(n, n + 1))
            if part.counted:
                reply, state = sent(self, client, state, range(n, n + 1))
                return reply, {**state, "opened": n}
            state = {**state, **seen(state, [part], 0.0), "next": n + 1}
        return {"cut": {}, "labels": {}}, state

    @on_client(like={**UPLOAD, "delta": "params", "buffer_delta": "buffers"})
    def close(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """The round on estimated gradients; a batch that `open` uploaded runs again for its step."""
        if "params" in msg:
            state = begin(self, client, state, msg)
        state = {**state, "auxiliary": msg.get("auxiliary") or state["auxiliary"]}
        head = self.head(client.task, {"auxiliary": state["auxiliary"]}, "estimate", client.device, trains=False)
        head.model.requires_grad_(False)  # saves computing the head's own gradients
        return self.local(client, state, head, learns=False)


@dataclass
class Aligner:
    """The server's memories and heads of clients during a round."""

    method: FslSage
    fleet: Fleet
    server: Half
    state: Body
    shared: Body = field(init=False)  # the shared head and its optimizer's state, to store in the server's state

    def __post_init__(self) -> None:
        self.shared = {name: self.state[name] for name in ("auxiliary", "auxiliary_opt")}

    def is_due(self, c: int) -> bool:
        last = self.fleet.memory.get(c, {}).get("aligned")
        return last is None or self.fleet.round - last >= self.method.align_interval

    def remember(self, reply: Reply, aligned: bool = False) -> None:
        """Append a reply's uploads to the client's memory and keep the newest; record if its head was aligned."""
        memory, limit = dict(self.fleet.memory.get(reply.client, {})), self.method.memory_size
        labels = [reply.body["labels"][number] for number in reply.body["cut"]]
        if labels:
            fits(limit, max(len(y) for y in labels), reply.client)
            memory |= remembered(memory, list(reply.body["cut"].values()), labels, limit)
        if aligned:
            memory["aligned"] = self.fleet.round
        self.fleet.memory[reply.client] = memory

    def align(self, c: int) -> Body:
        """Fit the client's head to the server's gradients over the client's memory; returns the head's tree."""
        memory = dict(self.fleet.memory.get(c, {}))
        home = self.shared if self.method.auxiliary == "shared" else memory
        tree = home.get("auxiliary") or self.state["auxiliary"]
        if "cut" not in memory:
            return tree
        state = {"auxiliary": tree, "opt": home.get("auxiliary_opt")}
        head = self.method.head(self.fleet.task, state, "align", self.server.device)
        self._fit(head, received(memory["cut"], head.device), memory["labels"].to(head.device), c)
        after = head.after()
        home["auxiliary"], home["auxiliary_opt"] = after["params"] | after["buffers"], after["opt"]
        self.fleet.memory[c] = memory
        return home["auxiliary"]

    def _fit(self, head: Half, cut: Payload, y: Tensor, c: int) -> None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        key = (self.fleet.seed, self.fleet.round, c, "align")
        official = self.method.compat == "official"
        slope = partial(self._slope, self.server, cut, y, (*key, "target"), again=not official)
        target = self.server.metered([(cut, y)], slope)
        with sdpa_kernel(SDPBackend.MATH):  # other kernels cannot be differentiated twice
            for epoch in range(self.method.align_epochs):
                order = torch.randperm(len(y), generator=random.generator(*key, epoch)).to(head.device)
                for number, rows in enumerate(order.split(self.method.align_batch_size)):
                    run = partial(self._fit_rows, head, cut, y, target, rows, (*key, epoch, number))
                    head.metered([(rows,)], run)

    def _fit_rows(
        self, head: Half, cut: Payload, y: Tensor, target: Payload, rows: Tensor, key: tuple[object, ...]
    ) -> None:
        """A step towards the targets of these rows of the memory; no step if none of their labels counts."""
        if not counted(y[rows]):
            return
        inputs, targets = (tree.mapped(x, lambda x: x[rows]) for x in (cut, target))
        estimates = self._slope(head, inputs, y[rows], key, again=True, graph=True)
        pairs = zip(tree.tensors(estimates), tree.tensors(targets), strict=True)
        misfit: Any = sum((estimate - true).square().sum() for estimate, true in pairs)
        head.apply(gradients(misfit if self.method.compat == "official" else misfit / counted(y[rows]), head.params))

    def _slope(
        self, part: Half, cut: Payload, y: Tensor, key: tuple[object, ...], again: bool, graph: bool = False
    ) -> Payload:
        """dL/dh with L the sum of the losses of all labels; as published, L is their mean over the batch."""
        h = tree.mapped(cut, torch.Tensor.detach)
        inputs = slopes(h, self.fleet.task.differentiable)
        grads = gradients(part.loss((h, y), key, again), list(inputs.values()), graph=graph)
        slopes_ = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(inputs.items(), grads, strict=True)}
        named = slopes_ if self.method.compat == "official" else {n: counted(y) * g for n, g in slopes_.items()}
        return named[""] if isinstance(cut, Tensor) else named
