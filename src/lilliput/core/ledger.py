"""The ledger: what the calls of a round cost in bytes, seconds, memory and FLOPs, measured once, at the wire.

Payload bytes are the tensors'; overhead is everything around them.  A client has one entry for each handler, however
often the handler was called.  `Ledger.line` adds the few facts about single calls that the sums do not show.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Load = tuple[int, int, float]  # of one client in one call: bytes down and up, headers included, and FLOPs


def published(kind: str) -> bool:
    """Whether the papers count this kind of payload: everything but labels and headers.

    They count one model up and one down in every round.  We send the model down before the round, they send it after,
    so the sums agree over any number of rounds.
    """
    return kind != "labels" and kind != "headers"


@dataclass
class Entry:
    """A row of the ledger: the sum of all calls of a handler on one client in a round.

    call:    the number of the first call among the round's calls.
    peak_memory_bytes: that of the largest call.
    error:   that of the first call that failed.
    metrics: those of the last call.
    """

    call: int
    client: int
    handler: str
    down: dict[str, int]
    down_overhead: int
    up: dict[str, int] = field(default_factory=dict)
    up_overhead: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    flops: float = 0.0
    communication_seconds: float = 0.0  # the part of simulated_seconds that is spent on the link
    simulated_seconds: float = 0.0
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    evaluation: bool = False
    calls: int = 1

    @property
    def load(self) -> Load:
        return sum(self.down.values()) + self.down_overhead, sum(self.up.values()) + self.up_overhead, self.flops

    def add(self, more: Entry) -> None:
        """Add further calls of the same handler on the same client."""
        for name in ("calls", "down_overhead", "up_overhead", "flops", "communication_seconds", "simulated_seconds"):
            setattr(self, name, getattr(self, name) + getattr(more, name))
        for name in ("down", "up", "seconds"):
            setattr(self, name, _summed(getattr(self, name), getattr(more, name)))
        self.peak_memory_bytes = max(self.peak_memory_bytes, more.peak_memory_bytes)
        self.error, self.metrics = self.error or more.error, self.metrics | more.metrics


def _summed(a: dict[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    return a | {kind: a.get(kind, 0) + n for kind, n in b.items()}


@dataclass
class Call:
    """One call on all its clients: it lasts as long as the slowest client."""

    simulated_seconds: float = 0.0
    communication_seconds: float = 0.0  # of the slowest client
    loads: list[Load] = field(default_factory=list)  # those that no other load exceeds: the slowest on some link

    def add(self, entry: Entry) -> None:
        ours = self.simulated_seconds, self.communication_seconds
        theirs = entry.simulated_seconds, entry.communication_seconds
        self.simulated_seconds, self.communication_seconds = max(ours, theirs)
        load = entry.load
        if not any(_within(load, other) for other in self.loads):
            self.loads = [*(other for other in self.loads if not _within(other, load)), load]


def _within(a: Load, b: Load) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True))


@dataclass
class Ledger:
    """The entries of one round.  Evaluation has entries too, but `totals` leaves them out."""

    round: int
    largest: dict[str, int] = field(default_factory=dict)  # by kind of message: the most bytes in one call of a client
    _entries: dict[tuple[int, str, bool], Entry] = field(default_factory=dict)
    _last: dict[int, Entry] = field(default_factory=dict)  # of each client
    _calls: dict[int, Call] = field(default_factory=dict)

    @property
    def entries(self) -> list[Entry]:
        """The entries in the order of calls and, within a call, of clients; the order of arrival does not matter."""
        return sorted(self._entries.values(), key=lambda e: (e.evaluation, e.call, e.client))

    def add(self, entry: Entry) -> None:
        """Record one call of a handler on a client."""
        if not entry.evaluation:
            self._calls.setdefault(entry.call, Call()).add(entry)
            for kind, n in _summed(entry.down, entry.up).items():
                self.largest[kind] = max(n, self.largest.get(kind, 0))
        row = self._entries.setdefault((entry.client, entry.handler, entry.evaluation), entry)
        if row is not entry:
            row.add(entry)
        self._last[entry.client] = row

    def fail(self, client: int, why: str) -> None:
        """Record at a client's last entry why the client is out."""
        last = self._last.get(client)
        if last is not None:
            last.error = last.error or why

    def line(self) -> str:
        """One JSON line: the entries (`calls`), and what their sums do not show about single calls.

        `slowest`: groups equal calls: how many there were, and the loads of the clients they may have waited for.
        `largest`: by kind of message, the most bytes in one call of a client.
        """
        slowest = Counter(tuple(sorted(call.loads)) for call in self._calls.values())
        line = {
            "round": self.round, "calls": [vars(e) for e in self.entries],
            "slowest": [[n, loads] for loads, n in slowest.items()], "largest": self.largest,
        }  # fmt: skip
        return json.dumps(line, separators=(",", ":"))

    def totals(self) -> dict[str, Any]:
        """The round's sums: bytes, FLOPs, the largest client's memory, and the simulated seconds of all its calls."""
        entries = [e for e in self.entries if not e.evaluation]
        return {
            "up_bytes": sum(sum(e.up.values()) for e in entries),
            "down_bytes": sum(sum(e.down.values()) for e in entries),
            "overhead_bytes": sum(e.up_overhead + e.down_overhead for e in entries),
            "peak_memory_bytes": max((e.peak_memory_bytes for e in entries), default=0),
            "flops": sum(e.flops for e in entries),
            "communication_seconds": sum(call.communication_seconds for call in self._calls.values()),
            "simulated_seconds": sum(call.simulated_seconds for call in self._calls.values()),
            "dropped": len({e.client for e in entries if e.error}),
        }

    def seconds(self) -> Mapping[str, float]:
        """The wall time of the round's calls by what it was spent on, summed over clients."""
        total: dict[str, float] = {}
        for e in self.entries:
            total = _summed(total, e.seconds)
        return total
