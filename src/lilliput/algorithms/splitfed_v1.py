"""SplitFed v1 (Thapa et al., AAAI 2022, alg. 1).  https://arxiv.org/abs/2004.12088

For each batch a device sends the activations at the cut and receives the gradient there.  The server trains a copy of
its part for each client, and averages both parts at the end of the round.  This is FedAvg of the whole model, with the
work split between device and server.

If a tail stays on the device too (U-shape, section 3.1 of Vepakomma et al., https://arxiv.org/abs/1812.00564), so do
the labels: one more exchange per batch sends the server's activations down and their gradient up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lilliput.algorithms.fedavg import advance, model_sums
from lilliput.algorithms.splitting.device import (
    CountedBatch,
    begin,
    device_half,
    end,
    key_of,
    left,
    seen,
    sent,
    take,
    total,
)
from lilliput.algorithms.splitting.half import Half
from lilliput.algorithms.splitting.server import passed, pulled, released, serve, step, try_client
from lilliput.algorithms.splitting.settings import SplitTraining, devices, down, joined, servers
from lilliput.core import tree
from lilliput.core.fleet import Client, Fleet, Reply, on_client
from lilliput.core.labels import labels
from lilliput.core.tree import Body, sub
from lilliput.splitter.task import portion
from lilliput.submodel import reduce

WINDOW_BYTES = 1 << 30  # of server copies in memory at a time, without optimizer states


@dataclass(frozen=True)
class SplitFedV1(SplitTraining):
    """Split learning with a copy of the server's part per client: FedAvg for devices that cannot hold the model.

    chunk: batches per exchange.  More than one saves round trips on slow links, but all gradients of a chunk are then
           taken at the weights of its activations.
    clip:  both ends exchange the squared norms of their gradients, and clip by the norm of the whole gradient.
    """

    chunk: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; an exchange needs at least 1 batch")
        if self.clip is not None and self.chunk > 1:
            raise ValueError(
                f"clip needs the norm of both ends' gradients before either steps, but in a chunk of {self.chunk} "
                "batches the server steps on the first before the device has a gradient; use chunk=1, or no clip"
            )

    @property
    def waits(self) -> bool:
        """Whether every part waits for the norm of the whole gradient before its step."""
        return self.clip is not None

    def accept(self, task: Any) -> None:
        super().accept(task)
        if self.clip is not None and task.tied:
            raise ValueError(
                f"clip needs the norm of the whole gradient, and that of {next(iter(task.tied.values()))!r} is a sum "
                "with terms at both ends; cut with tied='untie' or 'frozen', or use no clip"
            )

    def round(self, state: Body, fleet: Fleet) -> Body:
        cohort, first = fleet.sample(self.cohort), servers(fleet.task, state)
        if self.buffers == "local":  # each copy keeps its own buffers, as its client does
            first["buffers"] = portion(fleet.task.server_part, fleet.task.init()).get("buffers", {})
        trained: list[int] = []
        for clients in fleet.abreast(windows(cohort, tree.size(first))):
            trained += self._trained(fleet, state, clients, first)
        replies = self._whole(fleet, joined(fleet.call(self.finish, to=trained)), first)
        return {**state, **advance(self.combine, state, reduce(replies, **model_sums(self.combine, state)))}

    def _trained(self, fleet: Fleet, state: Body, clients: list[int], first: Body) -> list[int]:
        """Train these clients with a server copy each; stores the copies of those that finish, and returns those."""
        copies = {c: self.server(fleet, {**first, **fleet.memory.get(c, {})}) for c in clients}
        trained = self.exchange(fleet, state, clients, copies)
        for c in trained:
            fleet.memory[c] = copies[c].after()
        return trained

    def exchange(self, fleet: Fleet, state: Body, clients: list[int], copies: Mapping[int, Half]) -> list[int]:
        """Exchange activations and gradients until each client has trained all batches; returns those that finish."""
        message, trained = down(fleet.task, devices(fleet.task, state)), []
        while clients:
            replies = fleet.call(self.forward, message, to=clients)
            back, more = (self._served if fleet.task.tail_part is None else self._turned)(fleet, replies, copies)
            told = {"squares": float} if self.waits else {}
            alive = list(self._done(fleet, fleet.call(self.backward, each=back, like=told), copies))
            for c in back.keys() - set(alive):
                copies[c].drop()
            trained += [c for c in alive if c not in more]
            clients, message = [c for c in alive if c in more], {}
        return trained

    def _served(
        self, fleet: Fleet, replies: Iterable[Reply], copies: Mapping[int, Half]
    ) -> tuple[dict[int, Body], set[int]]:
        """The server's steps on activations and labels: (the message to each client, the clients with more batches)."""
        back: dict[int, Body] = {}
        more = set()
        for reply in replies:
            copy = copies[reply.client]
            served = serve(fleet, copy, reply, at=fleet.task.differentiable, waits=self.waits)
            if served is not None:
                back[reply.client] = {"gradient": served[0], "loss": served[1], **self._squares(copy)}
                more |= {reply.client} if reply.body["more"] else set()
        return back, more

    def _squares(self, *halves: Half) -> Body:
        """The squared norm of the gradients that wait at one end, as part of a message."""
        return {"squares": sum(half.squares for half in halves)} if self.waits else {}

    def _done(self, fleet: Fleet, replies: Iterable[Reply], copies: Mapping[int, Half]) -> Iterator[int]:
        """The clients that have taken their steps; takes the server's steps that waited for them."""
        for reply in replies:
            done = partial(released, copies[reply.client], reply)
            if not self.waits or try_client(fleet, reply.client, done) is not None:
                yield reply.client

    def _turned(
        self, fleet: Fleet, replies: Iterable[Reply], copies: Mapping[int, Half]
    ) -> tuple[dict[int, Body], set[int]]:
        """Like `_served`, without labels: forwards through the server's part to the device's tail, and back."""
        uploads = {reply.client: reply for reply in replies}
        back: dict[int, Body] = {}
        # A shared server part must not change between a batch's forward and its backward.
        shared = len({id(half) for half in copies.values()}) < len(copies)
        for clients in [[c] for c in uploads] if shared else [list(uploads)]:
            outputs = {c: try_client(fleet, c, partial(passed, fleet, copies[c], uploads[c])) for c in clients}
            middle = {c: {"middle": output} for c, output in outputs.items() if output is not None}
            for reply in fleet.call(self.turn, each=middle):
                c = reply.client
                gradient = try_client(fleet, c, partial(pulled, fleet, copies[c], uploads[c], reply, self.waits))
                if gradient is not None:
                    back[c] = {"gradient": gradient, **self._squares(copies[c])}
        return back, {c for c in back if uploads[c].body["more"]}

    def _whole(self, fleet: Fleet, replies: Iterable[Reply], first: Body) -> Iterator[Reply]:
        """The replies, with the change of each client's server copy added to that of its own parts."""
        for reply in replies:
            body, after = dict(reply.body), fleet.memory[reply.client]
            local = self.buffers == "local"
            own_buffers = {"buffers": after["buffers"]} if local and after["buffers"] else {}
            fleet.memory[reply.client] = {"opt": self.kept(after["opt"]), **own_buffers}
            delta = {**body["delta"], **sub(after["params"], first["params"])}
            for mine, theirs in fleet.task.tied.items():
                delta[theirs] = delta[theirs] + delta.pop(mine)
            if after["buffers"] and not local:
                body["buffer_delta"] = {**body.get("buffer_delta", {}), **sub(after["buffers"], first["buffers"])}
            yield Reply(reply.client, {**body, "delta": delta}, reply.weight, reply.metrics)

    @on_client(like={"cut": dict, "more": bool})
    def forward(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """Send activations and labels of the next batches; the round's first call brings the model."""
        if "params" in msg:
            state = begin(self, client, state, msg)
        last = total(self, client)
        numbers = range(state["next"], min(state["next"] + self.chunk, last))
        reply, state = sent(self, client, state, numbers)
        return {**reply, "more": numbers.stop < last}, {**state, "until": numbers.stop}

    @on_client(like={"middle_gradient": dict})
    def turn(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """U-shape: a step of the tail on each batch from the server; replies with the gradients at its inputs."""
        tail, reply = device_half(self, client, state, "tail"), {}
        for n, part in _numbered(self, client, state).items():
            loss = 0.0
            if part.counted:
                key = (*key_of(client, n), "tail")
                reply[str(n)], loss = step(tail, msg["middle"][str(n)], labels(part.batch), key, None, self.waits)
            state = {**state, **seen(state, [part], loss)}
        return {"middle_gradient": reply}, left(state, tail=tail)

    @on_client
    def backward(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """A step for each gradient from the server, after running the forward of its batch again."""
        stepping = state["parts"] if self.waits else ["client"]
        halves = {name: device_half(self, client, state, name) for name in stepping}
        half, parts = halves["client"], _numbered(self, client, state)
        batches = {n: part.batch for n, part in parts.items() if part.counted}

        def run() -> Body:
            for grads in [half.pull(x, key_of(client, n), msg["gradient"][str(n)]) for n, x in batches.items()]:
                (half.hold if self.waits else half.apply)(grads)
            squares = self._squares(*halves.values())
            for waiting in halves.values() if squares else ():
                waiting.release(squares["squares"] + msg["squares"])
            return squares

        reply = half.metered(batches.values(), run, *(other for other in halves.values() if other is not half))
        tally = seen(state, parts.values(), msg["loss"]) if "loss" in msg else {}
        return reply, left({**state, **tally, "next": state["until"]}, **halves)

    @on_client(like={"delta": "params", "buffer_delta": "buffers", "tied_delta": "tied"})
    def finish(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """Reply with the change of the device's parts in the round."""
        return end(self, client, state)


def windows(cohort: list[int], size: int) -> list[list[int]]:
    """Split the cohort into groups whose server copies, of `size` bytes each, are in memory together."""
    width = max(1, WINDOW_BYTES // max(1, size))
    return [cohort[i : i + width] for i in range(0, len(cohort), width)]


def _numbered(config: SplitTraining, client: Client, state: Body) -> dict[int, CountedBatch]:
    """The batches of the current exchange, by number."""
    numbers = range(state["next"], state["until"])
    return dict(zip(numbers, take(client, config, numbers), strict=True))
