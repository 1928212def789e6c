"""The device's half of every engine: the job that a run consists of, and the device that runs handlers on clients."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from lilliput.core import random
from lilliput.core.fleet import Client, Profile
from lilliput.core.labels import counted_in
from lilliput.core.meter import Cost, Meter
from lilliput.core.tree import Body, mapped, tensors
from lilliput.engines.replies import ReplyRefused, Schema, check, check_returned, schemas, sized


@dataclass(frozen=True)
class Job:
    """Everything on which the server and the devices of a run agree before it starts."""

    run: str
    algorithm: Any
    task: Any
    data: Mapping[int, Any]
    profiles: Mapping[int, Profile]
    seed: int = 0
    rounds: int = 1
    codec: Any = None
    client_test: Mapping[int, Any] = field(default_factory=dict)
    handlers: Mapping[str, Callable] = field(default_factory=dict)  # handlers that belong to no method: evaluation
    timeout: float | None = None  # seconds that a client may take
    reply_limit: int = 1 << 30  # the most bytes of the tensors of a reply
    _weights: dict[int, int] = field(default_factory=dict, compare=False)

    @cached_property
    def clients(self) -> tuple[int, ...]:
        """All client ids, ascending."""
        return tuple(sorted(self.data))

    def weight(self, client: int) -> int:
        """How many labels of a client's data count, counted on first use."""
        if client not in self._weights:
            self._weights[client] = counted_in(self.data[client])
        return self._weights[client]

    @cached_property
    def total_weight(self) -> int:
        """How many labels of all clients' data count."""
        return sum(map(self.weight, self.clients))

    def handler(self, name: str) -> Any:
        """The handler of this name.  Raises LookupError if it does not exist or is not marked `@on_client`."""
        handler: Any = self.handlers.get(name) or getattr(self.algorithm, name, None)
        if not getattr(handler, "on_client", False):
            raise LookupError(f"{type(self.algorithm).__name__} has no handler {name!r}; mark it with @on_client")
        return handler


class Tag(NamedTuple):
    """Identifies one execution of a handler; a request with a repeated tag is answered from the staged response."""

    run: str
    round: int
    attempt: int
    call: int


@dataclass
class Request:
    """One call of a handler on one client.

    `common` is the part of the message that all clients of the call receive, `own` is this client's part.  `state`
    comes with the client's first call of a round.
    """

    tag: Tag
    client: int
    handler: str
    common: Body
    own: Body
    state: Body | None = None


@dataclass
class Response:
    """A device's answer: a coded reply, or the error."""

    client: int
    body: Body | None = None
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    peak_memory_bytes: int = 0
    cause: BaseException | None = None


class Computed(NamedTuple):
    """A handler's reply and new state, and their cost."""

    reply: Body
    state: Body
    flops: float
    peak_memory_bytes: int


class Device:
    """The device's half of every engine: runs handlers over client state, staged until the round is committed."""

    meter: Callable[..., Meter] = Meter

    def __init__(self, job: Job, device: torch.device | str = "cpu", clone: bool = False):
        """`clone`: messages are in a buffer that will be reused, so a state must copy the tensors that it keeps."""
        self.job = job
        self.device = torch.device(device)
        self.clone = clone
        self._states: dict[int, Body] = {}
        self._changed: set[int] = set()
        self._answered: dict[int, tuple[Tag, Response]] = {}
        self._sent: dict[int, dict[str, Schema]] = {}  # client -> schemas of what it was last sent in the round, by key
        self._costs: dict[Any, Cost] = {}

    def handle(self, request: Request) -> Response:
        """Run one request; an error in the handler becomes the response's error and is never raised."""
        done = self._answered.get(request.client)
        if done is not None and done[0] == request.tag:
            return done[1]
        if request.state is not None:
            self._states[request.client] = request.state
        try:
            response = self._run(request)
        except ReplyRefused as refused:
            response = Response(request.client, error=str(refused))
        except Exception as error:
            response = Response(request.client, error=f"{type(error).__name__}: {error}", cause=error)
        self._answered[request.client] = (request.tag, response)
        return response

    def _run(self, request: Request) -> Response:
        job, c, tag = self.job, request.client, request.tag
        started = time.perf_counter()
        message = joined(request.common, request.own)
        if job.codec is not None:
            message = job.codec.decode(message)
        before = self._states.get(c, {})
        client = self._client(c, tag.round)
        decoded = time.perf_counter()
        reply, after, flops, peak = self._computed(request, client, before, message)
        if peak > client.profile.memory_bytes:
            missing = (peak - client.profile.memory_bytes) / 2**20
            raise MemoryError(
                f"needs {peak / 2**20:.1f} MiB, {missing:.1f} MiB more than the device has; "
                f"choose a smaller model, slice or batch"
            )
        computed = time.perf_counter()
        if after is not before:
            sized(after)  # refuses a bad state now; at the end of the round it is too late
            self._states[c] = _owned(after, message) if self.clone else after
            self._changed.add(c)
        if job.codec is not None:
            reply = job.codec.encode(reply, (job.seed, tag.round, c, tag.call, "up"))
        seconds = {
            "decode": decoded - started,
            "compute": computed - decoded,
            "encode": time.perf_counter() - computed,
        }
        return Response(c, reply, None, seconds, flops, peak)

    def _computed(self, request: Request, client: Client, before: Body, message: Body) -> Computed:
        job, tag = self.job, request.tag
        with (
            self.meter(self._costs, request.handler, message, before) as meter,
            random.seeded(job.seed, tag.round, client.id, tag.call),
        ):
            handler = job.handler(request.handler)
            reply, after = check_returned(request.handler, handler(client, before, message))
        meter.keep(reply, after)
        sized(reply)
        sent = self._sent.setdefault(client.id, {})
        sent |= schemas(message)
        check(reply, handler.like, sent, job.reply_limit)
        return Computed(reply, after, meter.flops, meter.peak_memory_bytes)

    def _client(self, c: int, round: int) -> Client:
        job = self.job
        return Client(
            c, job.task, job.data[c], job.profiles[c], round, job.rounds, job.seed, job.client_test.get(c), self.device
        )

    def commit(self, clients: Sequence[int]) -> dict[int, Body]:
        """End a round; returns the states of these clients that changed, and drops all other staged states."""
        changed = {c: self._states[c] for c in clients if c in self._changed}
        self._states.clear()
        self._changed.clear()
        self._answered.clear()
        self._sent.clear()
        return changed


def joined(common: Body, own: Body) -> Body:
    """The message of the common part and a client's own part; codecs may have put notes into both."""
    return {**common, **own, **{key: {**common[key], **own[key]} for key in common.keys() & own.keys()}}


def _owned(body: Body, message: Body) -> Body:
    """The body with every tensor that shares the message's memory replaced by a copy."""
    shared = {x.untyped_storage().data_ptr() for x in tensors(message)}

    return mapped(body, lambda x: x.clone() if x.untyped_storage().data_ptr() in shared else x)
