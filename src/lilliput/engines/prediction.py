"""What the dry engine predicts, and the tables that show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lilliput.core.ledger import Ledger, published

Kinds = dict[tuple[str, str], int]  # ("up" or "down", kind or "headers") -> bytes


class Work(NamedTuple):
    """Totals of a handler or a client: calls, the highest peak of memory, FLOPs and seconds of all calls."""

    calls: int
    peak_memory_bytes: int
    flops: float
    seconds: float  # on the simulated clock

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        peak = max(self.peak_memory_bytes, other.peak_memory_bytes)
        return Work(self.calls + other.calls, peak, self.flops + other.flops, self.seconds + other.seconds)


@dataclass(frozen=True)
class RoundCost:
    """One round: its row in the history, bytes by direction and kind, and work by handler and by client."""

    row: dict[str, Any]
    bytes: Kinds
    handlers: dict[str, Work]
    clients: dict[int, Work]

    @classmethod
    def of(cls, ledger: Ledger, examples: int) -> RoundCost:
        """The costs that a round's ledger shows."""
        sizes: Kinds = {}
        handlers: dict[str, Work] = {}
        clients: dict[int, Work] = {}
        for e in ledger.entries:
            work = Work(e.calls, e.peak_memory_bytes, e.flops, e.simulated_seconds)
            handlers[e.handler] = handlers[e.handler] + work if e.handler in handlers else work
            clients[e.client] = clients[e.client] + work if e.client in clients else work
            for way, kinds, more in (("down", e.down, e.down_overhead), ("up", e.up, e.up_overhead)):
                for kind, n in {**kinds, "headers": more}.items():
                    if n:
                        sizes[way, kind] = sizes.get((way, kind), 0) + n
        totals = ledger.totals()
        alive = len(clients) - totals["dropped"]
        return cls({"round": ledger.round, "examples": examples, **totals, "clients": alive}, sizes, handlers, clients)

    def count(self, count: str = "all") -> int:
        """Payload bytes in both directions; count="published" leaves out what the papers leave out."""
        return sum(
            n for (_, kind), n in self.bytes.items() if kind != "headers" and (count == "all" or published(kind))
        )


@dataclass(frozen=True)
class Prediction:
    """What a run would cost, round by round.

    clients: how many there are.
    planned: how many rounds the run has.
    short:   bytes of memory that clients lack, by client; the run would go on without them.
    stopped: why the run would end early; empty if it would not.
    """

    rounds: tuple[RoundCost, ...]
    clients: int
    planned: int
    short: dict[int, int]
    stopped: str = ""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of a run's history, without metrics and wall time."""
        return [cost.row for cost in self.rounds]

    def count(self, count: str = "all") -> int:
        """Payload bytes of all rounds in both directions; count="published" leaves out what the papers leave out."""
        return sum(cost.count(count) for cost in self.rounds)

    def table(self, count: str = "all") -> str:
        """Bytes of each sort of round and of all rounds, then memory and FLOPs of handlers and clients."""
        parts = [_bytes(self, count), _work("handler", [cost.handlers for cost in self.rounds], len(self.rounds))]
        parts.append(_work("client", [cost.clients for cost in self.rounds], len(self.rounds)))
        return "\n\n".join([part for part in parts if part] + _remarks(self))

    def __str__(self) -> str:
        return self.table()


def _sorts(rounds: Sequence[RoundCost]) -> dict[str, list[RoundCost]]:
    """Rounds by the bytes that they move, named by number; of more than four sorts, the first and the extremes."""
    alike: dict[Any, list[RoundCost]] = {}
    for cost in rounds:
        alike.setdefault(tuple(cost.bytes.items()), []).append(cost)
    if len(alike) <= 4:
        return {_numbers([cost.row["round"] for cost in some]): some for some in alike.values()}
    least, most = (f(rounds, key=lambda cost: sum(cost.bytes.values())) for f in (min, max))
    chosen = {cost.row["round"]: cost for cost in (rounds[0], least, most)}
    return {f"round {number}": [cost] for number, cost in sorted(chosen.items())}


def _numbers(rounds: Sequence[int]) -> str:
    """`round 1`, `rounds 2-5`, `rounds 1, 11, ... 191`."""
    if len(rounds) == 1:
        return f"round {rounds[0]}"
    if len(rounds) == rounds[-1] - rounds[0] + 1:
        return f"rounds {rounds[0]}-{rounds[-1]}"
    return (
        f"rounds {rounds[0]}, {rounds[1]}, ... {rounds[-1]}" if len(rounds) > 2 else f"rounds {rounds[0]}, {rounds[1]}"
    )


def _bytes(p: Prediction, count: str) -> str:
    if not p.rounds:
        return ""
    sorts, every = _sorts(p.rounds), list(p.rounds)
    keys = sorted({key for cost in every for key in cost.bytes}, key=lambda key: (key[0], key[1] == "headers"))
    if count == "published":
        keys = [key for key in keys if published(key[1])]

    def total(some: Iterable[RoundCost], wanted: Callable[[tuple[str, str]], bool]) -> int:
        return sum(n for cost in some for key, n in cost.bytes.items() if key in keys and wanted(key))

    heads = ["MB", *(f"{name} (each)" if len(some) > 1 else name for name, some in sorts.items())]
    heads.append(f"all {len(every)} rounds")
    rows = []
    for label, wanted in [*((" ".join(key), key.__eq__) for key in keys), ("total", lambda key: True)]:
        cells = [total(some, wanted) / len(some) for some in sorts.values()] + [total(every, wanted)]
        rows.append([label, *(f"{n / 1e6:,.3f}" for n in cells)])
    seconds = [sum(c.row["simulated_seconds"] for c in some) / len(some) for some in sorts.values()]
    rows.append(["simulated s", *(f"{s:,.1f}" for s in (*seconds, sum(c.row["simulated_seconds"] for c in every)))])
    return _columns(heads, rows)


def _work(what: str, rounds: Sequence[Mapping[Any, Work]], number: int) -> str:
    total: dict[Any, Work] = {}
    for each in rounds:
        for name, work in each.items():
            total[name] = total[name] + work if name in total else work
    alike: dict[Work, list[Any]] = {}
    for name, work in sorted(total.items()):
        alike.setdefault(work, []).append(name)
    rows = [
        [_numbers(names).removeprefix("rounds ").removeprefix("round ") if what == "client" else ", ".join(names),
         f"{w.calls:,}", f"{w.peak_memory_bytes / 1e6:,.3f}", f"{w.flops / 1e9:,.3f}", f"{w.seconds:,.1f}"]
        for w, names in alike.items()
    ]  # fmt: skip
    most = 12
    if len(rows) > most:
        largest = sorted(alike.items(), key=lambda item: -item[0].peak_memory_bytes)[:most]
        rows = [rows[list(alike).index(work)] for work, _ in largest] + [[f"({len(rows) - most} more)", "", "", "", ""]]
    return _columns([what, "calls", "peak MB", "GFLOP", "simulated s"], rows) if rows else ""


def _remarks(p: Prediction) -> list[str]:
    remarks = []
    if p.short:
        worst = max(p.short, key=lambda c: p.short[c])
        remarks.append(
            f"{len(p.short)} of {p.clients} clients cannot hold it and would be left out; client {worst} lacks most, "
            f"{p.short[worst] / 2**20:.1f} MiB: " + ", ".join(f"{c} by {n / 2**20:.1f}" for c, n in p.short.items())
        )
    if p.stopped:
        remarks.append(f"the run would stop: {p.stopped}")
    return remarks


def _columns(heads: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(row: list[str]) -> str:
        return "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])

    return "\n".join(line(row).rstrip() for row in [heads, *rows])
