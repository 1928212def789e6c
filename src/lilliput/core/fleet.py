"""The contract between a method and the engine that runs it: the fleet that its server sees, and the client that its
device sees.

A method is a frozen dataclass.  `init` makes the server's state, `round` is the server's half of one round, and the
methods marked `@on_client` are the device's half.  Engines know nothing of methods, methods nothing of engines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lilliput.core import random
from lilliput.core.tree import Body, Tree

# What a reply must hold under a key: a tree like the one sent under the key named here, a tree like this one (names,
# shapes and dtypes), or a value of this type (dict, bool, or an int or a float that is not negative).
Like = str | type | Mapping[str, Tensor]


@dataclass(frozen=True)
class Profile:
    """What a device offers: bytes of memory, bits per second of link, FLOP per second, and the chance that it is up.

    The default is a phone on a mobile link, with unlimited memory.
    """

    memory_bytes: int = sys.maxsize
    up_bps: float = 10e6
    down_bps: float = 50e6
    flops: float = 10e9
    availability: float = 1.0

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "up_bps", "down_bps", "flops"):
            if not getattr(self, name) > 0:
                raise ValueError(f"a device's {name} is {getattr(self, name)}; it must be positive")
        if not 0 < self.availability <= 1:
            raise ValueError(f"a device's availability is {self.availability}; it must lie in (0, 1]")

    def seconds(self, down_bytes: int, flops: float, up_bytes: int) -> float:
        """Simulated seconds to receive, compute and send."""
        return 8 * down_bytes / self.down_bps + flops / self.flops + 8 * up_bytes / self.up_bps


@dataclass(frozen=True)
class Client:
    """A device's view of itself while it runs a handler.  `round` counts from 1; `rounds` is the planned total."""

    id: int
    task: Any
    data: Any  # Batches
    profile: Profile
    round: int
    rounds: int
    seed: int
    test: Any = None  # Batches held out on the device
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def generator(self, *labels: object) -> torch.Generator:
        """A generator keyed by (run seed, round, client, labels): the same on any engine, in any order."""
        return random.generator(self.seed, self.round, self.id, *labels)


@dataclass(frozen=True)
class Reply:
    """What one client answered.

    weight: how many labels of the client's data count (see `lilliput.core.labels`): the weight of its loss and its
            update in a mean.  The engine takes it from the data, not from the client's claim.
    """

    client: int
    body: Body
    weight: int
    metrics: dict[str, float]


class Model(NamedTuple):
    """A model to evaluate: its parameters, their slice of the full model, and buffers (None: use batch statistics)."""

    params: Tree
    slice: Any = None
    buffers: Tree | None = None


class Fleet(Protocol):
    """An engine's face towards a method, for one round."""

    task: Any
    round: int  # from 1
    rounds: int  # the planned total
    seed: int
    clients: Sequence[int]
    examples: Mapping[int, int]
    profiles: Mapping[int, Profile]
    memory: MutableMapping[int, Body]  # the server's own state per client; committed if the client is in the round

    def sample(self, n: int | None) -> list[int]:
        """Draw n of the clients that are up this round, without replacement, in ascending order; None returns all."""

    def weight(self, client: int) -> int:
        """How many labels of a client's data count, as in `Reply.weight`."""

    @property
    def total_weight(self) -> int:
        """The sum of `weight` over all clients."""

    def call(
        self,
        handler: Callable,
        body: Body | None = None,
        *,
        each: Mapping[int, Body] | Callable[[int], Body] | None = None,
        to: Sequence[int] | None = None,
        like: Mapping[str, Like] = MappingProxyType({}),
    ) -> Iterator[Reply]:
        """Run a handler on clients with {**body, **each(c)}; replies stream in ascending client id.

        like: further rules for the replies, besides those of their handler (see `on_client`).
        """

    def abreast(self, groups: Iterable[list[int]]) -> Iterator[list[int]]:
        """Yield groups of clients in turn, so that few are in memory at once; they count as called together."""

    def fail(self, client: int, why: str, cause: BaseException | None = None) -> None:
        """Take a client out for the rest of the round, because the method cannot use what it sent."""

    def check_quorum(self) -> None:
        """Raise QuorumError if fewer of the round's clients than the quorum are still in."""


class Algorithm(Protocol):
    """A federated method: the server's half of a round, beside the handlers of the device's half."""

    ordered: bool = False  # True if the result depends on the order in which clients are called

    def init(self, task: Any) -> Body: ...

    def round(self, state: Body, fleet: Fleet) -> Body: ...

    def models(self, state: Body, fleet: Fleet) -> dict[Any, Model]: ...


def on_client(handler: Callable | None = None, *, like: Mapping[str, Like] | None = None) -> Callable:
    """Mark a method `(self, client, state, msg) -> (reply, new state)` as the device's half.

    `like` says what a reply must hold under each key.  A string names a key of the messages: the reply's tree must
    match the last tree that the client received under it in this round, if any, in names, shapes and dtypes.  A type
    asks for a dict, for true or false (bool), or for a number that is not negative (float), and whole (int).  The
    engine refuses a reply that differs, and its client is out for the round.
    """

    def mark(function: Any) -> Callable:
        function.on_client, function.like = True, dict(like or {})
        return function

    return mark(handler) if handler is not None else mark
