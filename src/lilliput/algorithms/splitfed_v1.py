"""SplitFed v1 (Thapa et al., AAAI 2022, alg. 1).  https://arxiv.org/abs/2004.12088

Per batch a device sends the activations at the cut and gets back the gradient there; the server trains a copy of its
part for each client, and both parts are averaged at the end of the round.  This is FedAvg of the whole model, with
the work cut in two.

Where a tail stays on the device too (U-shape, section 3.1 of Vepakomma et al., https://arxiv.org/abs/1812.00564) the
labels do as well: one more exchange per batch takes the server's activations down and the gradient at them up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lilliput.algorithms.fedavg import advance, model_sums
from lilliput.algorithms.splitting.device import Part, begin, device_half, end, key_of, left, seen, sent, take, total
from lilliput.algorithms.splitting.half import Half
from lilliput.algorithms.splitting.server import attempt, passed, pulled, released, serve, step
from lilliput.algorithms.splitting.settings import SplitTraining, devices, down, joined, servers
from lilliput.core import tree
from lilliput.core.fleet import Client, Fleet, Reply, on_client
from lilliput.core.labels import labels
from lilliput.core.tree import Body, sub
from lilliput.splitter.task import portion
from lilliput.submodel import reduce

WINDOW_BYTES = 1 << 30  # of server copies at a time, without their optimizers' states


@dataclass(frozen=True)
class SplitFedV1(SplitTraining):
    """Split learning with a server copy, and its optimizer, per client.

    chunk: batches per exchange.  More than one saves round trips on slow links; all gradients of a chunk are then
           taken at the weights that its activations were made with.
    clip:  each end tells the other the squared norm of its gradient, and clips by that of the whole.
    """

    chunk: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; an exchange needs at least 1 batch")
        if self.clip is not None and self.chunk > 1:
            raise ValueError(
                f"clip needs the norm of both ends' gradients before either steps, and of a chunk of {self.chunk} "
                "batches the server steps on the first before the device has any; use chunk=1, or no clip"
            )

    @property
    def waits(self) -> bool:
        """Whether no part takes its step before it knows the norm of the whole gradient."""
        return self.clip is not None

    def accept(self, task: Any) -> None:
        super().accept(task)
        if self.clip is not None and task.tied:
            raise ValueError(
                f"clip needs the norm of the whole gradient, and that of {next(iter(task.tied.values()))!r} is a sum "
                "whose terms are at both ends; cut with tied='untie' or 'frozen', or use no clip"
            )

    def round(self, state: Body, fleet: Fleet) -> Body:
        cohort, first = fleet.sample(self.cohort), servers(fleet.task, state)
        if self.buffers == "local":  # a copy's own are kept like the client's
            first["buffers"] = portion(fleet.task.server_part, fleet.task.init()).get("buffers", {})
        trained: list[int] = []
        for clients in fleet.abreast(windows(cohort, tree.size(first))):
            trained += self._trained(fleet, state, clients, first)
        replies = self._whole(fleet, joined(fleet.call(self.finish, to=trained)), first)
        return {**state, **advance(state, reduce(replies, **model_sums(self.combine, state)))}

    def _trained(self, fleet: Fleet, state: Body, clients: list[int], first: Body) -> list[int]:
        """Train these clients with a server copy each, and put the copies of those that saw it through away."""
        copies = {c: self.server(fleet, {**first, **fleet.memory.get(c, {})}) for c in clients}
        trained = self.exchange(fleet, state, clients, copies)
        for c in trained:
            fleet.memory[c] = copies[c].after()
        return trained

    def exchange(self, fleet: Fleet, state: Body, clients: list[int], copies: Mapping[int, Half]) -> list[int]:
        """Cut up, gradient down, until each client has had all its batches; those that saw it through."""
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
        """Steps of the server on activations and labels: what each client gets back, and who has more batches."""
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
        """What one end tells the other of the gradients that wait there."""
        return {"squares": sum(half.squares for half in halves)} if self.waits else {}

    def _done(self, fleet: Fleet, replies: Iterable[Reply], copies: Mapping[int, Half]) -> Iterator[int]:
        """The clients that have taken their steps, after the server's has taken those that waited for them."""
        for reply in replies:
            done = partial(released, copies[reply.client], reply)
            if not self.waits or attempt(fleet, reply.client, done) is not None:
                yield reply.client

    def _turned(
        self, fleet: Fleet, replies: Iterable[Reply], copies: Mapping[int, Half]
    ) -> tuple[dict[int, Body], set[int]]:
        """The same without labels: through the server's part to the tail on the device, and back."""
        uploads = {reply.client: reply for reply in replies}
        back: dict[int, Body] = {}
        # A server part that all clients share must not have moved between a batch's way there and its way back.
        shared = len({id(half) for half in copies.values()}) < len(copies)
        for clients in [[c] for c in uploads] if shared else [list(uploads)]:
            there = {c: attempt(fleet, c, partial(passed, fleet, copies[c], uploads[c])) for c in clients}
            middle = {c: {"middle": found} for c, found in there.items() if found is not None}
            for reply in fleet.call(self.turn, each=middle):
                c = reply.client
                found = attempt(fleet, c, partial(pulled, fleet, copies[c], uploads[c], reply, self.waits))
                if found is not None:
                    back[c] = {"gradient": found, **self._squares(copies[c])}
        return back, {c for c in back if uploads[c].body["more"]}

    def _whole(self, fleet: Fleet, replies: Iterable[Reply], first: Body) -> Iterator[Reply]:
        """The replies with the change of the client's server copy beside that of its own parts."""
        for reply in replies:
            body, after = dict(reply.body), fleet.memory[reply.client]
            local = self.buffers == "local"
            kept = {"buffers": after["buffers"]} if local and after["buffers"] else {}
            fleet.memory[reply.client] = {"opt": self.kept(after["opt"]), **kept}
            delta = {**body["delta"], **sub(after["params"], first["params"])}
            for mine, theirs in fleet.task.tied.items():
                delta[theirs] = delta[theirs] + delta.pop(mine)
            if after["buffers"] and not local:
                body["buffer_delta"] = {**body.get("buffer_delta", {}), **sub(after["buffers"], first["buffers"])}
            yield Reply(reply.client, {**body, "delta": delta}, reply.weight, reply.metrics)

    @on_client(like={"cut": dict, "more": bool})
    def forward(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """Activations and labels of the next batches; the round's first call brings the model."""
        if "params" in msg:
            state = begin(self, client, state, msg)
        last = total(self, client)
        numbers = range(state["next"], min(state["next"] + self.chunk, last))
        reply, state = sent(self, client, state, numbers)
        return {**reply, "more": numbers.stop < last}, {**state, "until": numbers.stop}

    @on_client(like={"middle_gradient": dict})
    def turn(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """U-shape: a step of the tail on each batch that has passed the server, and the gradient where it came in."""
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
        """A step for each gradient that came back, on the forward of its batch run again."""
        stepping = state["parts"] if self.waits else ["client"]
        halves = {name: device_half(self, client, state, name) for name in stepping}
        half, parts = halves["client"], _numbered(self, client, state)
        batches = {n: part.batch for n, part in parts.items() if part.counted}

        def run() -> Body:
            for grads in [half.pull(x, key_of(client, n), msg["gradient"][str(n)]) for n, x in batches.items()]:
                (half.hold if self.waits else half.apply)(grads)
            told = self._squares(*halves.values())
            for own in halves.values() if told else ():
                own.release(told["squares"] + msg["squares"])
            return told

        told = half.metered(batches.values(), run, *(own for own in halves.values() if own is not half))
        done = seen(state, parts.values(), msg["loss"]) if "loss" in msg else {}
        return told, left({**state, **done, "next": state["until"]}, **halves)

    @on_client(like={"delta": "params", "buffer_delta": "buffers", "tied_delta": "tied"})
    def finish(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """How the device's parts changed in the round."""
        return end(self, client, state)


def windows(cohort: list[int], size: int) -> list[list[int]]:
    """The cohort in groups whose server copies, of this many bytes each, are held at a time."""
    width = max(1, WINDOW_BYTES // max(1, size))
    return [cohort[i : i + width] for i in range(0, len(cohort), width)]


def _numbered(config: SplitTraining, client: Client, state: Body) -> dict[int, Part]:
    """The batches of the exchange under way."""
    numbers = range(state["next"], state["until"])
    return dict(zip(numbers, take(client, config, numbers), strict=True))
