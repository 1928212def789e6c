"""Compares finished runs: what each setting reached, averaged over its seeds, and what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lilliput.experiment.stop import headline
from lilliput.report.runs import FinishedRun, Row, Target, find, largest, reached, read, series, total
from lilliput.report.text import is_share, lower_is_better

# Keys in which two runs of one setting may differ: the seed, and where and how they ran.
INCIDENTAL = {"seed", "name", "folder", "recipe", "scale", "case", "checkpoint_every", "engine", "device"}
INCIDENTAL |= {"profile", "plots", "tensorboard", "wandb", "log_every", "save_every", "prefetch", "memory", "tags"}


@dataclass(frozen=True)
class Spread:
    """A number over seeds: mean, sample standard deviation (0 for one seed) and the number of seeds."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """The spread of the values; None if there are none."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else 0.0, len(values)) if values else None


@dataclass(frozen=True)
class Column:
    """One column of the table: its key, its title with the unit, and whether high or low is best.

    `scale` converts a row's number to that unit.
    """

    key: str
    title: str
    scale: float
    best: str  # "high" or "low"


@dataclass(frozen=True)
class Group:
    """The runs of one setting, one per seed."""

    label: str
    runs: tuple[FinishedRun, ...]
    setting: Mapping[str, Any]

    @property
    def rows(self) -> list[list[dict[str, Any]]]:
        return [run.rows for run in self.runs]

    def called(self, label: str) -> Group:
        """The group with another label."""
        return Group(label, self.runs, self.setting)

    def column(self, key: str, metric: str, target: Target | None) -> Spread | None:
        """The spread of a column over the runs that have a number for it."""
        values = [_number(run.rows, key, metric, target) for run in self.runs]
        return Spread.of([value for value in values if value is not None])


@dataclass(frozen=True)
class Comparison:
    """Groups of runs and the metric to compare.  `notes` are warnings for the reader of the numbers."""

    groups: tuple[Group, ...]
    metric: str
    target: Target | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = sorted({len(group.runs) for group in self.groups})
        many = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        over = f", mean ± standard deviation over {many} seeds" if counts[-1] > 1 else ", one seed"
        return f"{self.metric}{over}" + (f"; target {self.target}" if self.target else "")

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """The columns for which at least one group has numbers."""
        percent, scale = (" %", 100) if is_share(self.metric) else ("", 1)
        best = "low" if lower_is_better(self.metric) else "high"
        every = (
            Column("final", f"final{percent}", scale, best),
            Column("best", f"best{percent}", scale, best),
            Column("worst_decile", f"worst decile{percent}", scale, "high"),
            Column("rounds_to", "rounds to target", 1, "low"),
            Column("mb_to", "MB to target", 1, "low"),
            Column("seconds_to", "seconds to target", 1, "low"),
            Column("peak_memory_bytes", "peak client MB", 1e-6, "low"),
            Column("up_bytes", "MB up", 1e-6, "low"),
            Column("down_bytes", "MB down", 1e-6, "low"),
            Column("simulated_seconds", "simulated seconds", 1, "low"),
        )
        reach = ("rounds_to", "mb_to", "seconds_to")
        return tuple(c for c in every if (self.target if c.key in reach else any(self.cells(c))))

    def cells(self, column: Column) -> list[Spread | None]:
        """A column's numbers, one per group; None for a group without any."""
        return [group.column(column.key, self.metric, self.target) for group in self.groups]

    def console(self, console: Any = None) -> None:
        """Print the table and the notes."""
        from lilliput.report.tables import to_console

        to_console(self, console)

    def latex(self) -> str:
        """The table as LaTeX with booktabs."""
        from lilliput.report.tables import to_latex

        return to_latex(self)

    def csv(self) -> str:
        """The table as CSV, unrounded: each group's setting, seeds, and mean, std and count of each column."""
        from lilliput.report.tables import to_csv

        return to_csv(self)

    def figures(self, folder: str | Path) -> list[Path]:
        """Draw the metric against rounds, MB and simulated seconds, apart and together, and against memory.

        Saves each as PDF and PNG, and returns the files.  Skips axes without numbers; a single group has only the
        combined figure.
        """
        from lilliput.report import plots

        groups, written = {group.label: group.rows for group in self.groups}, []
        rows = [row for seeds in groups.values() for run in seeds for row in run]
        costs = {"mb": "up_bytes", "seconds": "simulated_seconds"}
        axes = ["rounds", *(axis for axis, column in costs.items() if total(rows, column))]
        name = self.metric.replace("/", "_")
        if len(groups) > 1 or len(axes) == 1:
            for axis in axes:
                figure = plots.curves(groups, self.metric, [axis], self.target)
                written += plots.save(figure, Path(folder) / f"{name}_{axis}")
        if len(axes) > 1:
            figure = plots.curves(groups, self.metric, axes, self.target, width="double")
            written += plots.save(figure, Path(folder) / name)
        if len(groups) > 1 and largest(rows, "peak_memory_bytes"):
            written += plots.save(plots.against_memory(groups, self.metric), Path(folder) / f"{name}_memory")
        return written


def compare(
    folders: Iterable[str | Path],
    by: Sequence[str] | None = None,
    target: str | float | None = None,
    metric: str | None = None,
) -> Comparison:
    """Compare the runs at or below the folders, grouped by every setting but the seed, or by the settings in `by`.

    `target` is a metric and a value, such as accuracy>=0.9, or a value for the metric.  By default the metric is the
    target's, else the first of server accuracy, client accuracy and the losses that all runs evaluated.
    Raises ValueError if two runs have different data, a run is damaged, or the runs have no metric in common.
    """
    return beside([read(folder) for folder in find(folders)], by, target, metric)


def beside(
    runs: Sequence[FinishedRun],
    by: Sequence[str] | None = None,
    target: str | float | None = None,
    metric: str | None = None,
) -> Comparison:
    """Compare runs that are read already; arguments and errors are those of `compare`."""
    _refuse_other_data(runs)
    if metric is not None and not any(metric in row for run in runs for row in run.rows):
        raise ValueError(f"no run has a metric {metric!r}; leave --metric out, or name a column of metrics.jsonl")
    aim = Target.parse(target, metric or common_metric(runs)) if target is not None else None
    metric = metric or (aim.metric if aim else common_metric(runs))
    notes = [note for run in runs for note in run.notes]
    return Comparison(_groups(runs, by, notes), metric, aim, tuple(notes))


def _refuse_other_data(runs: Sequence[FinishedRun]) -> None:
    recorded = [run for run in runs if run.environment.get("data")]
    for run in recorded[1:]:
        if run.environment["data"] != recorded[0].environment["data"]:
            shown = " and ".join(f"{r.folder} ({str(r.environment['data'])[:12]})" for r in (recorded[0], run))
            raise ValueError(f"the data of {shown} differ; compare runs on the same data")


def common_metric(runs: Sequence[FinishedRun]) -> str:
    """The most important metric that every run evaluated.  Raises ValueError if there is none."""
    common = set.intersection(*({name for row in run.rows for name in row} for run in runs))
    first = headline([dict.fromkeys(common)])
    if first is None and "train_loss" not in common:
        names = ", ".join(str(run.folder) for run in runs)
        raise ValueError(f"no metric was evaluated by all of {names}; name one that was, or compare fewer runs")
    return first[0] if first else "train_loss"


def _groups(runs: Sequence[FinishedRun], by: Sequence[str] | None, notes: list[str]) -> tuple[Group, ...]:
    settings = [_setting(run) for run in runs]
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    for key in by or ():
        if key not in keys:
            raise ValueError(f"no run has a setting {key!r} to group by; choose from {', '.join(keys) or 'none'}")
    differ = [key for key in keys if len({repr(setting.get(key)) for setting in settings}) > 1]
    # A setting that only some methods have appears in labels only if two of those methods differ in it.
    shown = by or [key for key in differ if len({repr(s[key]) for s in settings if key in s}) > 1]
    grouped: dict[tuple[str, ...], list[FinishedRun]] = {}
    for run, setting in zip(runs, settings, strict=True):
        grouped.setdefault(tuple(repr(setting.get(key)) for key in (by or keys)), []).append(run)
    groups = []
    for label, members in zip(_labels(list(grouped.values()), shown, differ), grouped.values(), strict=True):
        inner = [key for key in differ if len({repr(_setting(run).get(key)) for run in members}) > 1]
        if inner:
            notes.append(f"the runs of {label!r} differ in {', '.join(inner)}: their spread is not only over seeds")
        chosen = tuple(members) if inner else _one_a_seed(members, label, notes)
        groups.append(Group(label, chosen, _setting(members[0])))
    return tuple(groups)


def _labels(groups: Sequence[Sequence[FinishedRun]], shown: Sequence[str], differ: Sequence[str]) -> list[str]:
    """A label for each group: the settings to show, or, if two groups share those, all that differ."""
    settings = [_setting(members[0]) for members in groups]
    for keys in (shown, differ):
        labels = [in_words(s, keys) or in_words(s, ["algorithm"]) or "all runs" for s in settings]
        if len(set(labels)) == len(labels):
            return labels
    return [str(members[0].folder) for members in groups]


def _setting(run: FinishedRun) -> dict[str, Any]:
    """A run's configuration without the incidental keys; its folder if it has no configuration."""
    if not run.config:
        return {"folder": str(run.folder)}
    without = {*INCIDENTAL, run.config.get("engine")}  # an engine's own settings are under its name
    return {key: value for key, value in run.config.items() if key.split(".")[0] not in without}


def in_words(setting: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The settings as text: names alone, others as "key value" without the key's prefix."""
    bare = ("algorithm", "model", "dataset", "partition", "slice", "combine", "folder")
    given = {key: setting[key] for key in keys if setting.get(key) is not None}
    return ", ".join(str(v) if k in bare else f"{k.rsplit('.', 1)[-1]} {v}" for k, v in given.items())


def _one_a_seed(runs: Sequence[FinishedRun], label: str, notes: list[str]) -> tuple[FinishedRun, ...]:
    """The last run of each seed, because two runs of a setting with one seed are one sample, not two."""
    last = {run.config.get("seed", run.folder): run for run in runs}
    if len(last) < len(runs):
        notes.append(f"{len(runs) - len(last)} earlier runs of {label!r} with the same seed were left out")
    lengths = sorted({run.rows[-1]["round"] for run in last.values()})
    if len(lengths) > 1:
        notes.append(f"the runs of {label!r} ended after different rounds: {', '.join(map(str, lengths))}")
    return tuple(last.values())


def _number(rows: Sequence[Row], key: str, metric: str, target: Target | None) -> float | None:
    if key in ("final", "best"):
        values = series(rows, metric)[1]
        pick = min if lower_is_better(metric) else max
        return (values[-1] if key == "final" else pick(values)) if values else None
    if key == "worst_decile":
        values = [y for name in (metric, f"clients/{metric}") for y in series(rows, f"{name}/worst_decile")[1][-1:]]
        return values[0] if values else None
    if key.endswith("_to"):
        hit = reached(rows, target) if target else None
        return hit[key.removesuffix("_to")] if hit else None
    return (largest if key == "peak_memory_bytes" else total)(rows, key) or None
