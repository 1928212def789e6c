"""FSL-SAGE (Nair et al., ICML 2025).  https://arxiv.org/abs/2505.23182

The device's auxiliary head only estimates the server's gradient at the cut, g = dL(a(h), y)/dh.  Every l rounds the
server aligns it: over a memory of activations h and labels it takes the true gradients T of its own part, and fits
the estimates to them, min_a sum |dL(a(h), y)/dh - T|^2, by differentiating twice.  The head then goes down, once.

Ours: gradients per example, so that it does not matter how many of them a batch of the alignment has (the published
program divides estimates by that number and targets by the memory's), nor, in text, how far they are padded: labels
that do not count in training do not count here; and the memory's forward leaves the server's BatchNorm statistics
alone.  compat="official" does as published.
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
    """CSE-FSL whose heads the server aligns instead of the devices training and averaging them.

    align_interval:   l; a client's head is aligned when that was l rounds ago, or never.
    align_epochs, align_batch_size: passes of an alignment over the client's memory, and the examples per step.
    memory_size:      the newest examples that the server remembers of a client.
    auxiliary:        a personal head per client, as published, or a shared one that is aligned to each in turn.
    warm_start:       the first round is one of CSE-FSL with a shared head.
    order:            as for CSE-FSL.  Sequential runs the rounds that align a head one client at a time, because each
                      client's head is aligned to the server that the client before it has left.
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
        return {**self.moved(fleet.task, state, advance(own, sums), server), **aligner.shared}

    def _rounds(self, fleet: Fleet, server: Half, down: Body, aligner: Aligner) -> Iterator[Reply]:
        """Each client's round: where its head is due, the first cut up and the head down; then the rest."""
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
        """The cut of the first batch that has a label that counts, before anything is trained."""
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
        """The round on estimated gradients; a first batch whose cut went up already runs again for its step."""
        if "params" in msg:
            state = begin(self, client, state, msg)
        state = {**state, "auxiliary": msg.get("auxiliary") or state["auxiliary"]}
        head = self.head(client.task, {"auxiliary": state["auxiliary"]}, "estimate", client.device, trains=False)
        head.model.requires_grad_(False)  # so that no gradient of it is worked out
        return self.local(client, state, head, learns=False)


@dataclass
class Aligner:
    """The server's memories and heads during a round."""

    method: FslSage
    fleet: Fleet
    server: Half
    state: Body
    shared: Body = field(init=False)  # the head of all clients and its optimizer's state, as they go into the state

    def __post_init__(self) -> None:
        self.shared = {name: self.state[name] for name in ("auxiliary", "auxiliary_opt")}

    def is_due(self, c: int) -> bool:
        last = self.fleet.memory.get(c, {}).get("aligned")
        return last is None or self.fleet.round - last >= self.method.align_interval

    def remember(self, reply: Reply, aligned: bool = False) -> None:
        """Append what a reply uploaded, keep the newest, and note that its client has its new head."""
        held, limit = dict(self.fleet.memory.get(reply.client, {})), self.method.memory_size
        labels = [reply.body["labels"][number] for number in reply.body["cut"]]
        if labels:
            fits(limit, max(len(y) for y in labels), reply.client)
            held |= remembered(held, list(reply.body["cut"].values()), labels, limit)
        if aligned:
            held["aligned"] = self.fleet.round
        self.fleet.memory[reply.client] = held

    def align(self, c: int) -> Body:
        """Fit the client's head to the server's gradients over its memory, and return the head's tree."""
        held = dict(self.fleet.memory.get(c, {}))
        home = self.shared if self.method.auxiliary == "shared" else held
        tree = home.get("auxiliary") or self.state["auxiliary"]
        if "cut" not in held:
            return tree
        where = {"auxiliary": tree, "opt": home.get("auxiliary_opt")}
        head = self.method.head(self.fleet.task, where, "align", self.server.device)
        self._fit(head, received(held["cut"], head.device), held["labels"].to(head.device), c)
        after = head.after()
        home["auxiliary"], home["auxiliary_opt"] = after["params"] | after["buffers"], after["opt"]
        self.fleet.memory[c] = held
        return home["auxiliary"]

    def _fit(self, head: Half, cut: Payload, y: Tensor, c: int) -> None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        key = (self.fleet.seed, self.fleet.round, c, "align")
        official = self.method.compat == "official"
        slope = partial(self._slope, self.server, cut, y, (*key, "target"), again=not official)
        target = self.server.metered([(cut, y)], slope)
        with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
            for epoch in range(self.method.align_epochs):
                order = torch.randperm(len(y), generator=random.generator(*key, epoch)).to(head.device)
                for number, rows in enumerate(order.split(self.method.align_batch_size)):
                    run = partial(self._fit_rows, head, cut, y, target, rows, (*key, epoch, number))
                    head.metered([(rows,)], run)

    def _fit_rows(
        self, head: Half, cut: Payload, y: Tensor, target: Payload, rows: Tensor, key: tuple[object, ...]
    ) -> None:
        """A step towards the targets of these rows of the memory; none if none of their labels counts."""
        if not counted(y[rows]):
            return
        inputs, wanted = (tree.mapped(x, lambda x: x[rows]) for x in (cut, target))
        estimate = self._slope(head, inputs, y[rows], key, again=True, graph=True)
        pairs = zip(tree.tensors(estimate), tree.tensors(wanted), strict=True)
        misfit: Any = sum((found - true).square().sum() for found, true in pairs)
        head.apply(gradients(misfit if self.method.compat == "official" else misfit / counted(y[rows]), head.params))

    def _slope(
        self, part: Half, cut: Payload, y: Tensor, key: tuple[object, ...], again: bool, graph: bool = False
    ) -> Payload:
        """dL/dh, L being the sum of what an example's labels cost; as published, the mean over the batch instead."""
        h = tree.mapped(cut, torch.Tensor.detach)
        inputs = slopes(h, self.fleet.task.differentiable)
        found = gradients(part.loss((h, y), key, again), list(inputs.values()), graph=graph)
        slopes_ = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(inputs.items(), found, strict=True)}
        named = slopes_ if self.method.compat == "official" else {n: counted(y) * g for n, g in slopes_.items()}
        return named[""] if isinstance(cut, Tensor) else named
