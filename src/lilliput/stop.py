"""When a run ends before its last round, and what tells a good round from a better one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


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
        """Why the run should end now, or None."""
        bound = self.bound()
        if bound and bound[0] in rows[-1] and better(bound[1], rows[-1][bound[0]], bound[2]):
            return f"reached {self.target}"
        sent = sum(r["up_bytes"] + r["down_bytes"] for r in rows)
        if self.comm_threshold_mb is not None and sent >= self.comm_threshold_mb * 1e6:
            return f"sent {sent / 1e6:.1f} MB"
        if self.seconds is not None and sum(r["seconds"] for r in rows) >= self.seconds:
            return f"ran for {self.seconds:g} seconds"
        if self.patience is not None and stale(rows, bound) >= self.patience:
            return f"no better value in {self.patience} evaluations"
        return None


def better(sign: str, a: float, b: float) -> bool:
    """Whether a is at least as good as b where larger (">=") or smaller ("<=") is better."""
    return a >= b if sign == ">=" else a <= b


def headline(rows: Sequence[Row], bound: tuple[str, str, float] | None = None) -> tuple[str, str] | None:
    """The metric that says how good the model is, and its direction: the target's, else accuracy, else loss."""
    if bound:
        return bound[0], bound[1]
    for name, sign in (("accuracy", ">="), ("clients/accuracy", ">="), ("loss", "<="), ("clients/loss", "<=")):
        if any(name in r for r in rows):
            return name, sign
    return None


def stale(rows: Sequence[Row], bound: tuple[str, str, float] | None) -> int:
    """Evaluations since the best value of the headline metric."""
    metric = headline(rows, bound)
    values = [r[metric[0]] for r in rows if metric and metric[0] in r]
    if not values or metric is None:
        return 0
    best = (max if metric[1] == ">=" else min)(range(len(values)), key=values.__getitem__)
    return len(values) - 1 - best
