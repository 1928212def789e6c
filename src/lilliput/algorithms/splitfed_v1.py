"""SplitFed v1 (Thapa et al., AAAI 2022, alg. 1).  https://arxiv.org/abs/2004.12088

Per batch a device sends the activations at the cut and gets back the gradient there; the server trains a copy of its
part for each client, and both parts are averaged at the end of the round.  This is FedAvg of the whole model, with
the work cut in two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lilliput.algorithms.fedavg import advance, model_sums
from lilliput.algorithms.half import Half
from lilliput.algorithms.splitting import SplitTraining, begin, client_half, end, key_of, seen, sent, serve, take, total
from lilliput.fleet import Client, Fleet, Reply, on_client
from lilliput.submodel import reduce
from lilliput.tasks.split import portion
from lilliput.tree import Body, sub


@dataclass(frozen=True)
class SplitFedV1(SplitTraining):
    """Split learning with a server copy, and its optimizer, per client.

    chunk: batches per exchange.  More than one saves round trips on slow links; all gradients of a chunk are then
           taken at the weights that its activations were made with.
    """

    chunk: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; an exchange needs at least 1 batch")

    def round(self, state: Body, fleet: Fleet) -> Body:
        cohort, first = fleet.sample(self.cohort), portion(fleet.task.server_part, state)
        held = {c: {**first, **fleet.memory.get(c, {})} for c in cohort}
        copies = {c: self.server(fleet, held[c]) for c in cohort}
        trained = self.exchange(fleet, state, cohort, copies)
        replies = self._whole(fleet, fleet.call(self.finish, to=trained), copies)
        return {**state, **advance(state, reduce(replies, **model_sums(self.combine, state)))}

    def exchange(self, fleet: Fleet, state: Body, clients: list[int], servers: Mapping[int, Half]) -> list[int]:
        """Cut up, gradient down, until each client has had all its batches; those that saw it through."""
        down, trained = portion(fleet.task.client_part, state), []
        while clients:
            back: dict[int, Body] = {}
            more = set()
            for reply in fleet.call(self.forward, down, to=clients):
                served = serve(fleet, servers[reply.client], reply, back=True)
                if served is not None:
                    back[reply.client] = {"gradient": served[0], "loss": served[1]}
                    more |= {reply.client} if reply.body["more"] else set()
            alive = [reply.client for reply in fleet.call(self.backward, each=back)]
            trained += [c for c in alive if c not in more]
            clients, down = [c for c in alive if c in more], {}
        return trained

    def _whole(self, fleet: Fleet, replies: Iterable[Reply], copies: Mapping[int, Half]) -> Iterator[Reply]:
        """The replies with the change of the client's server copy beside that of its own part."""
        for reply in replies:
            copy, body = copies[reply.client], dict(reply.body)
            after = copy.after()
            fleet.memory[reply.client] = {"opt": self.kept(after["opt"])}
            body["delta"] = {**body["delta"], **sub(after["params"], copy.held["params"])}
            if after["buffers"]:
                body["buffer_delta"] = {**body.get("buffer_delta", {}), **sub(after["buffers"], copy.held["buffers"])}
            yield Reply(reply.client, body, reply.examples, reply.metrics)

    @on_client
    def forward(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """Activations and labels of the next batches; the round's first call brings the model."""
        if "params" in msg:
            state = begin(self, client, state, msg)
        last = total(self, client)
        numbers = range(state["next"], min(state["next"] + self.chunk, last))
        reply, state = sent(self, client, state, numbers)
        return {**reply, "more": numbers.stop < last}, state

    @on_client
    def backward(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """A step for each gradient that came back, on the forward of its batch run again."""
        half = client_half(self, client, state)
        numbers = range(state["next"], state["next"] + len(msg["gradient"]))
        batches = dict(zip(numbers, take(client, self, numbers), strict=True))

        def run() -> None:
            for grads in [half.pull(x, key_of(client, n), msg["gradient"][str(n)]) for n, x in batches.items()]:
                half.apply(grads)

        half.metered(batches.values(), run)
        done = seen(state, batches.values(), msg["loss"])
        return {}, {**state, **done, "next": numbers.stop, "client": half.live()}

    @on_client(like={"delta": "params", "buffer_delta": "buffers"})
    def finish(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """How the device's part changed in the round."""
        return end(self, client, state)
