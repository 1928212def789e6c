"""Repeats a round that lost a process; this is safe, since a round is a pure function of (state, number, attempt)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from lilliput.engines.base import Round

Out = TypeVar("Out")
DEATHS_OF_A_CLIENT = 2  # processes that may die on a client before it is out: once is chance, twice is the client
DEATHS_OF_NOBODY = 5  # processes that may die in a round while they ran no client, before the run gives up


class WorkerLost(RuntimeError):
    """A process ended that may have held staged state of several clients, so the round must run again.

    client: the client that it was running, if any.
    late: whether that client exceeded its time, which takes it out at once.
    """

    def __init__(self, why: str, client: int | None = None, late: bool = False):
        super().__init__(why)
        self.client, self.late = client, late


def run_attempts(begin: Callable[[int, Mapping[int, str]], Round], work: Callable[[Round], Out]) -> tuple[Round, Out]:
    """Repeat a round until it loses no process; returns the last attempt's round and the result of its work.

    `begin(n, out)` begins attempt n, from 0, without the clients of `out`, which gives a reason for each.  `work` must
    have no lasting effect if it raises WorkerLost.  Raises RuntimeError if processes keep dying while they run no
    client.
    """
    out: dict[int, str] = {}
    deaths: dict[int | None, int] = {}
    while True:
        fleet = begin(sum(deaths.values()), out)
        try:
            return fleet, work(fleet)
        except WorkerLost as lost:
            c = lost.client
            deaths[c] = deaths.get(c, 0) + 1
            if c is not None and (lost.late or deaths[c] == DEATHS_OF_A_CLIENT):
                out[c] = str(lost) if lost.late else f"{lost}, {deaths[c]} times in this round"
            if deaths.get(None, 0) == DEATHS_OF_NOBODY:
                raise RuntimeError(
                    f"round {fleet.round}: worker processes ended {DEATHS_OF_NOBODY} times while they ran no client; "
                    "see whether the machine is out of memory, or use engine=sequential"
                ) from lost
