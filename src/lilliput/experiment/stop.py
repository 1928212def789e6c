"""When a run ends before its last round, and what tells a good round from a better one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
# What says how good a model is, the first that was evaluated, and which end of it is good.
METRICS = (("accuracy", ">="), ("clients/accuracy", ">="), ("loss", "<="), ("clients/loss", "<="))


@dataclass(frozen=True)
class Stop:
    """When a run ends before its last round.

    target:            a metric and a bound, such as "accuracy>=0.9" or "loss<=1.2".
    comm_threshold_mb: megabytes (10^6 bytes) of payload, up and down together.
    seconds:           wall time.
    patience:          evaluations without a better value of the target's metric (or accuracy, or loss).
    """

    target: str | None = None
    comm_threshold_mb: float | None = None
    seconds: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("comm_threshold_mb", "seconds", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"stop.{name} is {value}; it must be positive")
        self.bound()

    def bound(self) -> tuple[str, str, float] | None:
        """(metric, ">=" or "<=", value) of the target."""
        if self.target is None:
            return None
        for sign in (">=", "<="):
            metric, found, value = self.target.partition(sign)
            try:
                if found:
                    return metric.strip(), sign, float(value)
            except ValueError:
                break
        raise ValueError(f"stop.target {self.target!r} is not like 'accuracy>=0.9' or 'loss<=1.2'")

    def reason(self, rows: Sequence[Row]) -> str | None:
        """Why the run should end after these rows, or None; a run that goes on asks a `Watch`."""
        return Watch(self, rows).reason()


class Watch:
    """What the rules look at, each row seen once: a round costs the same however many there were before."""

    def __init__(self, stop: Stop, rows: Iterable[Row] = ()):
        self.stop, self.bound = stop, stop.bound()
        self.sent, self.seconds = 0, 0.0
        self._last: Row = {}
        self._best: dict[str, tuple[float, int]] = {}  # of each metric: the best value, and evaluations since
        self._metrics = (self.bound[:2],) if self.bound else METRICS
        for row in rows:
            self.see(row)

    def see(self, row: Row) -> None:
        """Take the next row into account."""
        self._last = row
        self.sent += row["up_bytes"] + row["down_bytes"]
        self.seconds += row["seconds"]
        for name, sign in self._metrics:
            if name in row:
                value, (best, since) = row[name], self._best.get(name, (math.nan, 0))
                # The first of equal values stays the best; one that is no number never is.
                found = math.isnan(best) or (value != best and better(sign, value, best))
                self._best[name] = (value, 0) if found else (best, since + 1)

    @property
    def stale(self) -> int:
        """Evaluations since the best value of the headline metric."""
        return next((self._best[name][1] for name, _ in self._metrics if name in self._best), 0)

    def reason(self) -> str | None:
        """Why the run should end now, or None."""
        stop, bound = self.stop, self.bound
        if bound and bound[0] in self._last and better(bound[1], self._last[bound[0]], bound[2]):
            return f"reached {stop.target}"
        if stop.comm_threshold_mb is not None and self.sent >= stop.comm_threshold_mb * 1e6:
            return f"sent {self.sent / 1e6:.1f} MB"
        if stop.seconds is not None and self.seconds >= stop.seconds:
            return f"ran for {stop.seconds:g} seconds"
        if stop.patience is not None and self.stale >= stop.patience:
            return f"no better value in {stop.patience} evaluations"
        return None


def better(sign: str, a: float, b: float) -> bool:
    """Whether a is at least as good as b where larger (">=") or smaller ("<=") is better."""
    return a >= b if sign == ">=" else a <= b


def headline(rows: Sequence[Row], bound: tuple[str, str, float] | None = None) -> tuple[str, str] | None:
    """The metric that says how good the model is, and its direction: the target's, else accuracy, else loss."""
    if bound:
        return bound[0], bound[1]
    for name, sign in METRICS:
        if any(name in r for r in rows):
            return name, sign
    return None
