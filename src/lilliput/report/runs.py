"""Reads a run from its folder.  Every report derives from metrics.jsonl, which has one row per round."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput.experiment.stop import Stop
from lilliput.report.text import lower_is_better, number

Row = Mapping[str, Any]
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Target:
    """A value that a metric must reach: at least, or at most for a loss."""

    metric: str
    value: float
    at_least: bool = True

    @classmethod
    def parse(cls, text: str | float, metric: str | None = None) -> Target:
        """The target of a text `accuracy>=0.9` or `loss<=0.5`, or of a number for `metric`.

        Raises ValueError for anything else.
        """
        try:
            value = float(text)
        except ValueError:
            name, sign, bound = Stop(target=str(text)).bound() or ("", "", 0.0)
            return cls(name, bound, sign == ">=")
        if metric is None:
            raise ValueError(f"target {text} does not name a metric; write accuracy>=0.9 or loss<=0.5")
        return cls(metric, value, not lower_is_better(metric))

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.at_least else '<='} {number(self.metric, self.value)}"

    def met(self, row: Row) -> bool:
        """Whether a row was evaluated and reaches the target."""
        value = row.get(self.metric)
        return value is not None and (value >= self.value if self.at_least else value <= self.value)


@dataclass(frozen=True)
class FinishedRun:
    """One finished run.  `config` is flat with dotted keys; `notes` are warnings for the reader of its numbers."""

    folder: Path
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()


def spent(rows: Iterable[Row]) -> Iterator[tuple[Row, dict[str, float]]]:
    """Each row with what the run had spent by its end: rounds, MB and GB of payload up and down, simulated seconds."""
    sent, seconds = 0, 0.0
    for row in rows:
        sent += row.get("up_bytes", 0) + row.get("down_bytes", 0)
        seconds += row.get("simulated_seconds", 0.0)
        yield row, {"rounds": row["round"], "mb": sent / 1e6, "gb": sent / 1e9, "seconds": seconds}


def series(rows: Iterable[Row], metric: str, against: str = "rounds") -> tuple[list[float], list[float]]:
    """(x, y): the finite values of the metric against the rounds, mb, gb or seconds spent until then."""
    seen = [(so_far[against], row[metric]) for row, so_far in spent(rows) if math.isfinite(row.get(metric, math.nan))]
    return [x for x, _ in seen], [y for _, y in seen]


def reached(rows: Iterable[Row], target: Target) -> dict[str, float] | None:
    """What the run had spent when the metric first reached the target; None if it never did."""
    return next((so_far for row, so_far in spent(rows) if target.met(row)), None)


def total(rows: Iterable[Row], name: str) -> float:
    """The sum of one column over the rounds; a row without it counts as 0."""
    return sum(row.get(name) or 0 for row in rows)


def largest(rows: Iterable[Row], name: str) -> float:
    """The largest value of one column; 0 if no row has it."""
    return max((row.get(name) or 0 for row in rows), default=0)


def find(folders: Iterable[str | Path]) -> list[Path]:
    """The run folders at or below the given ones, in order of path.

    Raises ValueError for a folder that does not exist or holds no run.
    """
    unique: dict[Path, None] = {}
    for folder in map(Path, folders):
        runs = sorted(path.parent for path in folder.rglob(METRICS))
        if not runs:
            why = "holds no run" if folder.is_dir() else "does not exist"
            raise ValueError(f"{folder} {why}; name a run's folder, which has a {METRICS}, or one above it")
        unique.update(dict.fromkeys(runs))
    return list(unique)


def read(folder: str | Path) -> FinishedRun:
    """Read the run in a folder.  Skips and notes a half-written last line; a run started from Python has no config.

    Raises ValueError with the damaged file and a remedy.
    """
    folder = Path(folder)
    rows, notes = _rows(folder / METRICS)
    config = _yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    environment = _json(folder / "environment.json") if (folder / "environment.json").exists() else {}
    return FinishedRun(folder, rows, flat(config), environment, notes)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves


def _rows(path: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    lines = _text(path).split("\n")
    rows, notes = {}, []
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _row(line)
        except ValueError as error:
            # Only the last line can be half-written, when a crash cuts it before its newline.
            if at == len(lines):
                notes.append(f"{path}: the last line is half-written and was ignored")
                continue
            # Without the line a round is missing, and a run whose checkpoint includes that round cannot resume.
            remedy = (
                f"restore the file and delete nothing; only where the checkpoint has not done that round, `lilliput "
                f"resume {path.parent}` runs it again"
            )
            raise ValueError(f"{path}: line {at} is damaged ({error}); {remedy}") from None
        rows[row["round"]] = row  # a round repeated after a crash replaces the first attempt
    if not rows:
        there = (path.parent / "checkpoint").is_dir()
        remedy = "restore it" if there else f"wait for the first, or delete {path.parent} and run it again"
        raise ValueError(f"{path} holds no round; {remedy}")
    return [rows[round] for round in sorted(rows)], tuple(notes)


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        raise ValueError("not JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("round"), int):
        raise ValueError("not an object with a whole number as its round")
    return row


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged: not UTF-8 text; restore it, or run {path.parent} again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name a folder that holds a run") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: not a JSON object; restore it, or delete it to compare without it")
    return content


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(_text(path))
    except yaml.YAMLError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: not a mapping in YAML; restore it, or run {path.parent} again")
    return content
