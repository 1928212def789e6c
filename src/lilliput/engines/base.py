"""Shared by all engines: rounds, calls and streams, with validation, staging, failures, bytes and order.

An engine only moves requests to devices and responses back (`Engine`).  Everything that affects a number happens here,
once, so that every engine gives the same numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import Any, Protocol

import torch

from lilliput import wire
from lilliput.core import random
from lilliput.core.fleet import Like, Profile, Reply
from lilliput.core.ledger import Entry, Ledger
from lilliput.core.tree import MALFORMED, Body, paths, tensors
from lilliput.engines.device import Job, Request, Response, Tag, joined
from lilliput.engines.replies import ReplyRefused, Schema, check, norms, schemas, sized
from lilliput.wire.store import Store


class QuorumError(RuntimeError):
    """Too few clients answered; the state stays that of the round before."""


class DivergedError(RuntimeError):
    """A round made the server's state not finite; the state stays that of the round before."""


class Engine(Protocol):
    """Moves requests to devices and their responses back, in any order."""

    interrupts: bool  # whether it can end a client that takes longer than a timeout

    @property
    def slots(self) -> int:
        """How many requests the engine can run at a time."""

    def open(self, job: Job) -> None: ...

    def send(self, request: Request) -> None: ...

    def receive(self, timeout: float | None) -> Response: ...

    def commit(self, clients: Sequence[int]) -> dict[int, Body]:
        """End a round; returns the states of these clients that changed, and drops all other staged states."""

    def close(self) -> None: ...


class ServerMemory(MutableMapping[int, Body]):
    """The server's own state per client, staged over the store until the round is committed.

    Staged state spills to disk like the store, with the same limit.
    """

    def __init__(self, store: Store):
        self._store = store
        self._staged = Store(limit_bytes=store.limit_bytes)

    def __getitem__(self, client: int) -> Body:
        key = f"server/{client}"
        body = (self._staged if key in self._staged else self._store).get(key)
        if not body:
            raise KeyError(client)
        return body

    def __setitem__(self, client: int, body: Body) -> None:
        self._staged.put(f"server/{client}", body)

    def __delitem__(self, client: int) -> None:
        self[client] = {}

    def __iter__(self) -> Iterator[int]:
        keys = {key for store in (self._store, self._staged) for key in store if key.startswith("server/")}
        return iter(sorted(c for c in (int(key.removeprefix("server/")) for key in keys) if c in self))

    def commit(self, out: Container[int]) -> None:
        """Write the staged states to the store, except those of clients that are out."""
        for key in sorted(self._staged):
            if int(key.removeprefix("server/")) not in out:
                self._store.put(key, self._staged.get(key))
        self._staged = Store(limit_bytes=self._store.limit_bytes)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Examples(Mapping[int, int]):
    """How many examples each client has, counted on demand."""

    def __init__(self, data: Mapping[int, Any]):
        self._data = data

    def __getitem__(self, client: int) -> int:
        return self._data[client].examples

    def __iter__(self) -> Iterator[int]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


class Round:
    """The fleet of one round: an engine's face towards a method (see `fleet.Fleet`)."""

    def __init__(
        self,
        engine: Engine,
        job: Job,
        store: Store,
        number: int,
        *,
        attempt: int = 0,
        cohort: Sequence[int] | None = None,
        quorum: float = 0.5,
        timeout: float | None = None,
        without: Mapping[int, str] = MappingProxyType({}),
        before: str = "",
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.engine, self.job, self.store = engine, job, store
        self.task, self.round, self.rounds, self.seed = job.task, number, job.rounds, job.seed
        self.weight = job.weight
        self.clients: Sequence[int] = job.clients
        self.examples: Mapping[int, int] = Examples(job.data)
        self.profiles: Mapping[int, Profile] = job.profiles
        self.memory = ServerMemory(store)
        self.ledger = Ledger(number)
        self.quorum, self.timeout, self.progress = quorum, timeout, progress
        self.attempt, self.evaluating = attempt, False
        self.out: dict[int, str] = {}  # clients that failed -> why
        self.without = without  # clients that are out from the start -> why
        self.before = before  # text for errors: whose change was the largest in the round before
        self.cause: BaseException | None = None  # the first failure, if it happened in this process
        self.called: set[int] = set()
        self.stated: set[int] = set()  # clients whose device has their state
        self.sent: dict[int, dict[str, Schema]] = {}  # client -> the schemas of what it was last sent, by key
        self.norms: dict[int, float] = {}  # client -> the norm of the largest change in its replies
        self.sampled: list[int] = []
        self.answers: list[Reply] = []  # the replies with metrics, without their bodies
        self._cohort = cohort
        self._calls = 0
        self._open: Stream | None = None

    @property
    def total_weight(self) -> int:
        """How many labels of all clients' data count."""
        return self.job.total_weight

    def sample(self, n: int | None) -> list[int]:
        """Draw n of the clients that are up this round, in ascending order; None returns all of them.

        Raises ValueError if the fleet has fewer clients, and QuorumError if none is up.
        """
        if self._cohort is not None:
            self.sampled = sorted(self._cohort)
            return list(self.sampled)
        if n is not None and n > len(self.clients):
            raise ValueError(
                f"a cohort of {n} exceeds the fleet of {len(self.clients)} clients; choose cohort <= clients"
            )
        drawn: Iterable[int] = self.clients
        if n is not None and n < len(self.clients):
            # In a large fleet, only the clients drawn so far are asked whether they are up.
            order = torch.randperm(len(self.clients), generator=random.generator(self.job.seed, self.round, "cohort"))
            drawn = (self.clients[i] for part in order.split(256) for i in part.tolist())
        self.sampled = sorted(islice(filter(self._is_up, drawn), n))
        if not self.sampled:
            raise QuorumError(f"round {self.round}: no client is available")
        return list(self.sampled)

    def _is_up(self, c: int) -> bool:
        chance = self.profiles[c].availability
        return (
            chance >= 1
            or torch.rand((), generator=random.generator(self.job.seed, self.round, c, "up")).item() < chance
        )

    def call(
        self,
        handler: Callable,
        body: Body | None = None,
        *,
        each: Mapping[int, Body] | Callable[[int], Body] | None = None,
        to: Sequence[int] | None = None,
        like: Mapping[str, Like] = MappingProxyType({}),
    ) -> Iterator[Reply]:
        """Run a handler on clients with {**body, **each(c)}; replies stream in ascending client id."""
        self.close_stream()
        clients = sorted(to if to is not None else each.keys() if isinstance(each, Mapping) else self.clients)
        unknown = [c for c in clients if c not in self.job.data]
        if unknown or len(set(clients)) != len(clients):
            raise ValueError(
                f"a call names client {unknown[0]}, which is not in the fleet"
                if unknown
                else "a call names a client twice"
            )
        self._calls += 1
        make = each.__getitem__ if isinstance(each, Mapping) else each or (lambda c: {})
        self._open = Stream(self, handler, self._calls, body or {}, make, clients, like)
        return self._open

    def abreast(self, groups: Iterable[list[int]]) -> Iterator[list[int]]:
        """Yield groups of clients in turn, whose calls count as simultaneous.

        The calls of each group have the same numbers, so that neither the draws in a call nor the simulated clock
        depend on the number of groups.
        """
        first = last = self._calls
        for group in groups:
            self._calls = first
            yield group
            last = max(last, self._calls)
        self._calls = last

    def close_stream(self) -> None:
        """Raise RuntimeError if some replies of the last call were not consumed."""
        if self._open is not None and not self._open.done:
            raise RuntimeError(
                f"the replies of {self._open.name} were not all consumed; iterate over a call to its end"
            )
        self._open = None

    def fail(self, client: int, why: str, cause: BaseException | None = None) -> None:
        """Take a client out for the rest of the round, and record why at its last call in the ledger."""
        self.out.setdefault(client, why)
        self.ledger.fail(client, why)
        self.cause = self.cause or cause

    def check_quorum(self) -> None:
        """Raise QuorumError if fewer of the round's clients than the quorum are still in."""
        total = max(len(self.sampled), len(self.called))
        alive, needed = total - len(self.out), max(1, math.ceil(self.quorum * total))
        if alive < needed:
            c, why = next(iter(self.out.items()))
            # If no client can train the model, the fault is in the model, that is in the round before.
            before = self.before if all("not finite" in why for why in self.out.values()) else ""
            raise QuorumError(
                f"round {self.round}: {alive} of {total} clients answered, fewer than the quorum of {needed}; "
                f"the first to fail was client {c}: {why}{before}"
            ) from self.cause

    def check_state(self, state: Body) -> None:
        """Raise DivergedError, with the client whose change was the largest, if a state is not finite after the round.

        The squares of its entries must not overflow either, because no gradient of such a model is finite.
        """
        for x, norm in norms(list(tensors(state))).values():
            if not math.isfinite(norm):
                name = next(path for path, y in paths(state) if y is x)
                raise DivergedError(
                    f"round {self.round}: {name!r} is not finite after the round, so it is undone{self.largest()}; "
                    "use a smaller lr, clip=, or cohorts= without that client"
                )

    def largest(self) -> str:
        """Text for errors: the client whose change was the largest in this round."""
        ranked = sorted(((norm, c) for c, norm in self.norms.items()), reverse=True)
        if not ranked:
            return ""
        (norm, c), others = ranked[0], ranked[1:]
        next_largest = f", the next largest of {others[0][0]:.3g}" if others else ""
        return f"; the largest change of round {self.round} was client {c}'s, of norm {norm:.3g}{next_largest}"

    def staged(self) -> dict[int, Body]:
        """End the round's calls; returns the changed states of the clients that are in, without storing them.

        Raises WorkerLost if the engine has lost some of them.
        """
        self.close_stream()
        return self.engine.commit([c for c in sorted(self.called) if c not in self.out])

    def commit(self, staged: Mapping[int, Body] | None = None) -> None:
        """End the round: store the staged states of clients (by default fetched from the devices) and of the server."""
        for c, body in (self.staged() if staged is None else staged).items():
            self.store.put(f"client/{c}", body)
        self.memory.commit(self.out)


class Stream(Iterator[Reply]):
    """The replies of one call in ascending client id, whatever the order of arrival.

    It sends requests ahead within a window of a few per slot, so that neither the messages nor the replies of a whole
    cohort exist at a time.
    """

    def __init__(
        self,
        fleet: Round,
        handler: Callable,
        number: int,
        common: Body,
        each: Callable[[int], Body],
        clients: list[int],
        like: Mapping[str, Like],
    ):
        self.fleet, self.number, self.name = fleet, number, handler.__name__
        self.like: Mapping[str, Like] = {**fleet.job.handler(self.name).like, **like}
        self.tag = Tag(fleet.job.run, fleet.round, fleet.attempt, number)
        self._each = each
        self._common = self._code(common, "all")
        self._common_keys = common.keys()
        self._common_schemas = schemas(common)
        fleet.called.update(c for c in clients if c not in fleet.out)
        for c in clients:
            if c in fleet.without and c not in fleet.out:
                fleet.ledger.add(Entry(number, c, self.name, {}, 0, evaluation=fleet.evaluating))
                fleet.fail(c, fleet.without[c])
        self._waiting = [c for c in clients if c not in fleet.out]
        self._expected = {c: None for c in self._waiting}
        self._total = len(self._waiting)
        self._sent: dict[int, tuple[Entry, float]] = {}
        self._arrived: dict[int, Reply | None] = {}
        self.done = False
        self._fill()

    def __next__(self) -> Reply:
        while self._expected:
            head = next(iter(self._expected))
            while head not in self._arrived:
                self._take(self.fleet.engine.receive(self.fleet.timeout))
                self._fill()
            del self._expected[head]
            reply = self._arrived.pop(head)
            self._fill()
            if reply is not None:
                return reply
        if not self.done:
            self.done = True
            self.fleet.check_quorum()
        raise StopIteration

    def _fill(self) -> None:
        slots = self.fleet.engine.slots
        # The reorder buffer is bounded too: no request is sent far ahead of the next reply.
        while self._waiting and len(self._sent) < slots and len(self._sent) + len(self._arrived) < 2 * slots:
            self._send(self._waiting.pop(0))

    def _code(self, body: Body, client: int | str) -> Body:
        fleet = self.fleet
        if fleet.job.codec is None:
            return body
        return fleet.job.codec.encode(body, (fleet.job.seed, fleet.round, client, self.number, "down"))

    def _send(self, c: int) -> None:
        own = self._each(c)
        twice = self._common_keys & own.keys()
        if twice:
            raise ValueError(f"{self.name}: the key {sorted(twice)[0]!r} is given both for all clients and for each")
        sent = self.fleet.sent.setdefault(c, {})
        sent |= self._common_schemas | schemas(own)
        own = self._code(own, c)
        message = joined(self._common, own)
        size = wire.nbytes(message)
        entry = Entry(self.number, c, self.name, wire.kinds(message), size.overhead, evaluation=self.fleet.evaluating)
        # A client's state is sent with its first call of a round; then the device has it, staged.
        state = None if c in self.fleet.stated else self.fleet.store.get(f"client/{c}")
        self.fleet.stated.add(c)
        self._sent[c] = (entry, time.perf_counter())
        self.fleet.engine.send(Request(self.tag, c, self.name, self._common, own, state))

    def _take(self, response: Response) -> None:
        fleet, c = self.fleet, response.client
        if c not in self._sent:
            return  # a late answer to a request that was given up
        entry, sent = self._sent.pop(c)
        profile = fleet.profiles[c]
        entry.seconds = {
            **response.seconds,
            "wait": max(0.0, time.perf_counter() - sent - sum(response.seconds.values())),
        }
        entry.flops, entry.peak_memory_bytes = response.flops, response.peak_memory_bytes
        reply, why = None, response.error
        if response.body is not None:
            try:
                reply = self._reply(c, response.body, entry)
            except ReplyRefused as refused:
                why = str(refused)
        down, up, flops = entry.load
        entry.communication_seconds = profile.seconds(down, 0, up)
        entry.simulated_seconds = profile.seconds(down, flops, up)
        fleet.ledger.add(entry)
        if why is not None:
            fleet.fail(c, why, response.cause)
        elif reply is not None and reply.metrics and not fleet.evaluating:
            fleet.answers.append(replace(reply, body={}))
        self._arrived[c] = reply
        fleet.progress(self._total - len(self._waiting) - len(self._sent), self._total)

    def _reply(self, c: int, body: Body, entry: Entry) -> Reply:
        """Decode, check and record a client's reply; raises ReplyRefused if it must not be used."""
        fleet = self.fleet
        entry.up_overhead, entry.up = sized(body).overhead, wire.kinds(body)
        try:
            decoded = body if fleet.job.codec is None else fleet.job.codec.decode(body)
        except MALFORMED as error:
            raise ReplyRefused(f"the reply cannot be decoded: {error}") from None
        norm = check(decoded, self.like, fleet.sent[c], fleet.job.reply_limit)
        fleet.norms[c] = max(norm, fleet.norms.get(c, 0.0))
        entry.metrics = {name: float(x) for name, x in decoded.get("metrics", {}).items()}
        return Reply(c, decoded, fleet.weight(c), entry.metrics)
