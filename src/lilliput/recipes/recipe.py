"""The parts of a recipe: a published experiment as settings, its source's numbers, and those we expect of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import inf
from typing import Any, Literal

from lilliput.report.runs import Target, reached

Verdict = Literal["reproduced", "same ordering", "not reproduced", "not run", "nothing to compare with"]


@dataclass(frozen=True)
class Case:
    """One row of a table: its own settings, and numbers in the unit of the recipe's metric.

    published: the source's number; None if the source has no counterpart of this version.
    expected:  the number to compare a run with, reproduced if within `tolerance`; None if nothing was published.
    measured:  our number when the recipe last ran in full; None if it never did.
    mib:       MiB per round, up and down, as the source counts them: without labels, the mean over rounds.
    """

    name: str
    settings: Mapping[str, Any]
    expected: float | None = None
    tolerance: float = 0.0
    published: float | None = None
    measured: float | None = None
    mib: float | None = None

    def __post_init__(self) -> None:
        if self.tolerance < 0:
            raise ValueError(f"the tolerance of {self.name!r} is {self.tolerance}; it must not be negative")


@dataclass(frozen=True)
class Version:
    """One size of a recipe.  With `floor`, a run must reach expected - tolerance and may exceed it."""

    cases: Sequence[Case]
    hardware: str
    hours: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    floor: bool = False

    def verdict(self, measured: Mapping[str, float | None]) -> Verdict:
        """The verdict on this version, given the measured number of each case."""
        values = [measured.get(case.name) for case in self.cases]
        if any(value is None for value in values):
            return "not run"
        if all(case.expected is None for case in self.cases):
            return "nothing to compare with"
        if all(self._holds(case, value) for case, value in zip(self.cases, values, strict=True)):  # type: ignore[arg-type]
            return "reproduced"
        return "same ordering" if self._same_order(values) else "not reproduced"  # type: ignore[arg-type]

    def expectation(self, case: Case) -> str:
        """The number that a case must reach, as text."""
        if case.expected is None:
            return "nothing"
        return (
            f"at least {case.expected - case.tolerance:.4g}"
            if self.floor
            else f"{case.expected:g} ± {case.tolerance:g}"
        )

    def _holds(self, case: Case, value: float) -> bool:
        if case.expected is None:
            return True
        distance, allowed = value - case.expected, case.tolerance + 1e-9
        return -distance <= allowed if self.floor else abs(distance) <= allowed

    def _same_order(self, values: Sequence[float]) -> bool:
        """Whether every two rows have the order of the source; false for a table of one row."""
        source = [case.expected if case.published is None else case.published for case in self.cases]
        rows = [(a, b) for a, b in zip(source, values, strict=True) if a is not None]
        pairs = [(a, b) for a, b in combinations(rows, 2) if a[0] != b[0]]
        return bool(pairs) and all((a[0] < b[0]) == (a[1] < b[1]) for a, b in pairs)


@dataclass(frozen=True)
class Recipe:
    """A published table or figure.  Its settings spell out every number that it needs, defaults included.

    metric:  the column of metrics.jsonl to compare, at its `best` or its `final` round.
    until:   a value of the metric; if set, the recipe compares the GiB sent, up and down, until a run reaches it.
    command: the command that runs it: `run` or `pretrain`.
    """

    name: str
    title: str
    source: str
    settings: Mapping[str, Any]
    versions: Mapping[str, Version]
    metric: str = "accuracy"
    at: Literal["best", "final"] = "final"
    until: float | None = None
    note: str = ""
    command: str = "run"

    def __str__(self) -> str:
        """What the recipe compares, as text."""
        return f"{self.metric}, {self.at} round" if self.until is None else f"GiB until {self.metric} {self.until:g}"

    def version(self, scale: str) -> Version:
        """The version of a scale.  Raises ValueError if the recipe does not have it."""
        if scale not in self.versions:
            raise ValueError(f"recipe {self.name} has no scale {scale!r}; choose {' or '.join(self.versions)}")
        return self.versions[scale]

    def layers(self, scale: str) -> dict[str, dict[str, Any]]:
        """The settings of each case, by the case's name."""
        version = self.version(scale)
        return {case.name: {**self.settings, **version.settings, **case.settings} for case in version.cases}

    def value(self, rows: Sequence[Mapping[str, Any]]) -> float | None:
        """The number of a run to compare, from its rows; None if they lack the metric."""
        values = [row[self.metric] for row in rows if row.get(self.metric) is not None]
        if not values:
            return None
        if self.until is not None:
            reached_at = reached(rows, Target.parse(self.until, self.metric))
            return inf if reached_at is None else reached_at["gb"] * 1e9 / 2**30
        return values[-1] if self.at == "final" else (min if "loss" in self.metric else max)(values)
