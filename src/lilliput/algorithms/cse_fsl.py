"""CSE-FSL (Mu and Shen, ICC 2023).  https://arxiv.org/abs/2302.05599

An auxiliary head on the device replaces the server: the device's part and the head learn from the head's loss, and no
gradient comes back.  The activations of every q-th batch go up, and the one server part takes a step on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lilliput.algorithms.fedavg import advance, model_sums
from lilliput.algorithms.splitting.checks import check_head, look
from lilliput.algorithms.splitting.device import begin, device_half, end, key_of, left, noisy, seen, take, total
from lilliput.algorithms.splitting.half import Half, Payload, gradients, plain
from lilliput.algorithms.splitting.server import serve
from lilliput.algorithms.splitting.settings import UPLOAD, SplitTraining, check_order
from lilliput.core.fleet import Client, Fleet, Reply, on_client
from lilliput.core.labels import labels
from lilliput.core.tree import Body, Tree, add, mapped, sub
from lilliput.splitter.task import portion
from lilliput.submodel import reduce
from lilliput.training.settings import Training


@dataclass(frozen=True)
class CseFsl(SplitTraining):
    """Split learning in which devices train on an auxiliary head's loss: no gradient comes back, few activations go up.

    server_update_interval: q; of the batches with a label that counts, the device uploads 0, q, 2q, ... of each round.
    auxiliary:              shared: one head for all, averaged like the device's part; personal: a head per client that
                            is never sent.
    auxiliary_lr, auxiliary_optimizer: of the head; without a schedule, as published.
    order:                  of the server's steps: sequential, client after client, as published; or interleaved by
                            (batch number, client id), which holds all uploads of the round in memory.
    """

    server_update_interval: int = 5
    auxiliary: Literal["shared", "personal"] = "shared"
    auxiliary_lr: float = 1e-3
    auxiliary_optimizer: Any = "adam"
    order: Literal["sequential", "interleaved"] = "sequential"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.order)
        if self.server_update_interval < 1:
            raise ValueError(f"server_update_interval is {self.server_update_interval}; it must be at least 1")
        if self.auxiliary not in ("shared", "personal"):
            raise ValueError(f"auxiliary is {self.auxiliary!r}; choose shared or personal")
        if not self.auxiliary_lr > 0:
            raise ValueError(f"auxiliary_lr is {self.auxiliary_lr}; it must be positive")

    def init(self, task: Any) -> Body:
        return {**super().init(task), "server_opt": {}, "auxiliary": first_head(task)}

    def accept(self, task: Any) -> None:
        super().accept(task)
        name = type(self).__name__
        if task.auxiliary_part is None:
            raise ValueError(
                f"{name} needs an auxiliary head; give the task one: Split(client, server, auxiliary) or "
                "Split.of(model, at, auxiliary=1)"
            )
        if task.tail_part is not None:
            raise ValueError(
                f"{name} trains the server's part on labels, and a tail on the device keeps them there; cut the model "
                "without a tail, or use SplitFedV1 or SplitFedV2"
            )
        if task.tied:
            raise ValueError(
                f"{name} trains the device's part on its head's loss and the server's only on every q-th batch, so "
                f"{next(iter(task.tied.values()))!r} has no common gradient; cut with tied='untie' or 'frozen'"
            )

    def check(self, task: Any, data: Mapping[int, Any]) -> None:
        self.accept(task)
        check_head(task, look(task, data), data)

    def round(self, state: Body, fleet: Fleet) -> Body:
        return self.cse_round(state, fleet, shared=self.auxiliary == "shared")

    def cse_round(self, state: Body, fleet: Fleet, shared: bool) -> Body:
        server, own = self.one_server(fleet, state), portion(fleet.task.client_part, state)
        down = {**own, "auxiliary": state["auxiliary"]} if shared else own
        sums = model_sums(self.combine, own)
        if shared:
            sums["auxiliary_delta"] = self.combine.over(state["auxiliary"])
        replies = fleet.call(self.train, down, to=fleet.sample(self.cohort))
        sums = reduce(self.served(fleet, server, replies), **sums)
        after = self.moved(fleet.task, state, advance(self.combine, own, sums), server)
        return {**after, "auxiliary": add(state["auxiliary"], sums["auxiliary_delta"])} if shared else after

    def served(self, fleet: Fleet, server: Half, replies: Iterable[Reply]) -> Iterator[Reply]:
        """Take the server's steps; yields the replies of the clients whose uploads fit."""
        if self.order == "sequential":
            yield from (reply for reply in replies if serve(fleet, server, reply) is not None)
            return
        fit = {reply.client: reply for reply in replies}
        uploads = [(len(number), number, c) for c, reply in fit.items() for number in reply.body["cut"]]
        for _, number, c in sorted(uploads):
            if c in fit and serve(fleet, server, fit[c], only=number) is None:
                del fit[c]
        yield from fit.values()

    @on_client(like={**UPLOAD, "delta": "params", "buffer_delta": "buffers", "auxiliary_delta": "auxiliary"})
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """A round on the head's loss; replies with the uploads and the changes of both parts."""
        state = begin(self, client, state, msg)
        tree: Tree = msg.get("auxiliary") or state.get("auxiliary") or first_head(client.task)
        head = self.head(client.task, {"auxiliary": tree, "opt": state.get("auxiliary_opt")}, "train", client.device)
        reply, state = self.local(client, state, head, learns=True)
        after = head.after()
        tree, before = after["params"] | after["buffers"], tree
        own = {"auxiliary_opt": self.kept(after["opt"])}
        if "auxiliary" in msg:
            return {**reply, "auxiliary_delta": sub(tree, before)}, {**state, **own}
        return reply, {**state, **own, "auxiliary": tree}

    def head(self, task: Any, state: Body, role: str, device: Any, trains: bool = True) -> Half:
        """The auxiliary head in training; `state` has its tree (`auxiliary`) and its optimizer's state (`opt`)."""
        part, tree = task.auxiliary_part, state["auxiliary"]
        trained = {n for n, p in part.model.named_parameters()}
        params, buffers = ({n: x for n, x in tree.items() if (n in trained) == want} for want in (True, False))
        config = Training(lr=self.auxiliary_lr, optimizer=self.auxiliary_optimizer, precision=self.precision)
        state = {"params": params, "buffers": buffers, "opt": state.get("opt")}
        return Half(part, state, config, config.lr, role, device, trains)

    def local(self, client: Client, state: Body, head: Half, learns: bool) -> tuple[Body, Body]:
        """Train on the remaining batches of the round; the head trains too if it `learns`.  (reply, client state)."""
        half = device_half(self, client, state)
        reply: Body = {"cut": {}, "labels": {}}
        steps = 0
        for n in range(state["next"], total(self, client)):
            (part,) = take(client, self, range(n, n + 1))
            loss: Any = 0.0
            if part.counted:
                again = n == state.get("opened")
                run = partial(_step, half, head, part.batch, key_of(client, n), again, learns)
                cut, loss = half.metered([part.batch], run, head)
                if steps % self.server_update_interval == 0 and not again:
                    reply["cut"][str(n)] = noisy(self, client, n, plain(cut))
                    reply["labels"][str(n)] = plain(labels(part.batch))
                steps += 1
            state = {**state, **seen(state, [part], loss), "next": n + 1}
        changed, state = end(self, client, left(state, client=half))
        return {**reply, **changed}, state


def _step(
    half: Half, head: Half, batch: Any, key: tuple[object, ...], again: bool, learns: bool
) -> tuple[Payload, Tensor]:
    """A step of the device's part and, if it `learns`, of the head: (activations, loss), both from before the step."""
    cut = half.output(batch, key, again)
    loss = head.loss((cut, labels(batch)), (*key, "auxiliary"), again=not learns)
    grads = gradients(loss, [*half.params, *(head.params if learns else [])])
    half.apply(grads[: len(half.params)])
    if learns:
        head.apply(grads[len(half.params) :])
    return mapped(cut, Tensor.detach), loss.detach()


def first_head(task: Any) -> Tree:
    """The initial head: its parameters and buffers in one tree."""
    first = task.auxiliary_part.init()
    return first["params"] | first["buffers"]
