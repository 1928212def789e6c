"""Figures and tables of papers on these methods, described in a YAML file such as docs/figures.yaml.

Settings at the top of the file apply to all of its figures, and each figure may override them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lilliput.core.fleet import Profile
from lilliput.core.registry import nearest
from lilliput.report import ablations, plots
from lilliput.report.compare import Comparison, beside, common_metric, in_words
from lilliput.report.runs import FinishedRun, Target, find, read, series, spent
from lilliput.report.text import lower_is_better

SPENT = ("rounds", "mb", "gb", "seconds")


@dataclass(frozen=True)
class Described:
    """One figure.

    name:    of its files.
    kind:    curves (the metric against what was spent), setting (against a setting of the runs), latency (seconds per
             round on other links, or to the target), table.
    runs:    folders with the runs; `where`, {key: value or [values]}, selects runs by their settings.
    by:      the settings that separate lines.
    metric:  by default accuracy, or the first metric that all runs evaluated; target: a value to mark or to reach.
    labels:  replacements in labels: {fsl_sage: FSL-SAGE}.
    width:   single or double, the columns of a page.
    against: of curves: rounds, mb, gb or seconds, one panel each.
    x:       of setting: its key; `partition.alpha` is that of the chosen partition, `mb.auxiliary` the size of a kind
             of message.  `title` is the title of its axis.
    at:      of setting: best, final, or the last value within a budget: {gb: 80}, {rounds: 100}.
    links:   of latency: devices by name: {20 Mbit/s: {up_bps: 20e6, down_bps: 20e6, flops: 10e9}}, in bits per second.
    """

    name: str
    kind: str = "curves"
    runs: str | Sequence[str] = "runs"
    where: Mapping[str, Any] = field(default_factory=dict)
    by: str | Sequence[str] | None = None
    metric: str | None = None
    target: str | float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    width: str = "single"
    against: str | Sequence[str] = ("rounds",)
    x: str | None = None
    title: str | None = None
    at: str | Mapping[str, float] = "best"
    links: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._among("kind", self.kind, KINDS)
        self._among("width", self.width, plots.WIDTHS)
        for spending in [*_listed(self.against), *(self.at if isinstance(self.at, Mapping) else ())]:
            self._among("against", spending, SPENT)
        if not isinstance(self.at, Mapping):
            self._among("at", self.at, ("best", "final", "{gb: 80}"))
        for kind, key in (("setting", "x"), ("latency", "links")):
            if self.kind == kind and not getattr(self, key):
                raise ValueError(f"figure {self.name}: kind {kind} needs {key}")

    def _among(self, key: str, value: str, choices: Iterable[str]) -> None:
        if value not in choices:
            raise ValueError(f"figure {self.name}: {key} is {value!r}; choose one of {', '.join(choices)}")

    def draw(self, folder: Path, among: Sequence[str] | None = None) -> list[Path]:
        """Read the runs (those at or below `among`, if given) and write the figure's files."""
        chosen = [run for run in map(read, find(among or _listed(self.runs))) if self._wanted(run)]
        if not chosen:
            raise ValueError(f"figure {self.name}: no run has {dict(self.where)}")
        return KINDS[self.kind](self, chosen, folder / self.name)

    def _wanted(self, run: FinishedRun) -> bool:
        return all(setting(run, key) in _listed(value) for key, value in self.where.items())

    def named(self, text: str) -> str:
        """A label with the replacements of `labels`."""
        return self.labels.get(text) or ", ".join(self.labels.get(part, part) for part in text.split(", "))

    def lines(self, runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
        """The runs by the label of their settings in `by`; by default, of their method."""
        keys = [key for key in _listed(self.by or "algorithm")]
        labelled: dict[str, list[FinishedRun]] = {}
        for run in runs:
            label = in_words({key: setting(run, key) for key in keys}, keys) or "all runs"
            labelled.setdefault(self.named(label), []).append(run)
        return labelled


def described(path: str | Path) -> list[Described]:
    """The figures of a file.  Raises ValueError with the file and the wrong key."""
    import yaml

    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is missing or not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, Mapping) or not isinstance(tree.get("figures"), Mapping):
        raise ValueError(f"{path} describes no figures; write `figures:` and below it `name: {{kind: curves}}`")
    common = {key: value for key, value in tree.items() if key != "figures"}
    return [_described({**common, **(own or {}), "name": str(name)}, path) for name, own in tree["figures"].items()]


def _described(tree: Mapping[str, Any], path: str | Path) -> Described:
    known = [f.name for f in fields(Described)]
    unknown = [key for key in tree if key not in known]
    if unknown:
        raise ValueError(f"{path}: figure {tree['name']} has no {unknown[0]!r}; {nearest(unknown[0], known)}")
    return Described(**tree)


def setting(run: FinishedRun, key: str) -> Any:
    """The value of a key in a run's configuration; None if it has none."""
    first, _, rest = key.partition(".")
    if first == "mb" and rest:
        return ablations.largest_message(run.folder, rest)
    return run.config.get(key, run.config.get(f"{run.config.get(first)}.{rest}"))


def value(run: FinishedRun, metric: str, at: str | Mapping[str, float]) -> float | None:
    """The metric's best or final value, or its last value within a budget; None if it was not evaluated."""
    if isinstance(at, Mapping):
        within = [row for row, so_far in spent(run.rows) if all(so_far[name] <= most for name, most in at.items())]
        values = series(within, metric)[1][-1:]
    else:
        values = series(run.rows, metric)[1]
        values = values[-1:] if at == "final" else [(min if lower_is_better(metric) else max)(values)] if values else []
    return values[0] if values else None


def _curves(figure: Described, runs: Sequence[FinishedRun], stem: Path) -> list[Path]:
    compared = _compared(figure, runs)
    groups, axes = {figure.named(group.label): group.rows for group in compared.groups}, _listed(figure.against)
    return plots.save(plots.curves(groups, compared.metric, axes, compared.target, figure.width), stem)


def _table(figure: Described, runs: Sequence[FinishedRun], stem: Path) -> list[Path]:
    compared = _compared(figure, runs)
    groups = tuple(group.called(figure.named(group.label)) for group in compared.groups)
    compared = Comparison(groups, compared.metric, compared.target)
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, text in ((".tex", compared.latex()), (".csv", compared.csv())):
        written.append(stem.with_name(stem.name + suffix))
        written[-1].write_text(text, encoding="utf-8")
    return written


def _compared(figure: Described, runs: Sequence[FinishedRun]) -> Comparison:
    return beside(runs, _listed(figure.by) if figure.by else None, figure.target, figure.metric)


def _setting(figure: Described, runs: Sequence[FinishedRun], stem: Path) -> list[Path]:
    metric, x = figure.metric or common_metric(runs), str(figure.x)
    points: dict[str, dict[float, list[float]]] = {}
    for name, members in figure.lines(runs).items():
        for run in members:
            at, y = setting(run, x), value(run, metric, figure.at)
            if isinstance(at, int | float) and y is not None:
                points.setdefault(name, {}).setdefault(float(at), []).append(y)
    if not points:
        raise ValueError(f"figure {figure.name}: no run has a number for {x} and a value of {metric} at {figure.at}")
    title = figure.title or x.rpartition(".")[2].replace("_", " ")
    return plots.save(ablations.against_setting(points, title, metric, figure.width), stem)


def _latency(figure: Described, runs: Sequence[FinishedRun], stem: Path) -> list[Path]:
    aim = None if figure.target is None else Target.parse(figure.target, figure.metric or common_metric(runs))
    devices = {name: _device(link) for name, link in figure.links.items()}
    bars: dict[str, dict[str, tuple[float, float]]] = {}
    for name, members in figure.lines(runs).items():
        until = {run.folder: _last_round(run, aim) for run in members}
        lasting = [run for run in members if until[run.folder]]
        if lasting:
            bars[name] = {link: _mean(lasting, until, device, aim) for link, device in devices.items()}
    if not bars:
        raise ValueError(f"figure {figure.name}: no run reached {aim}")
    title = f"simulated seconds {f'to {aim}' if aim else 'per round'}"
    return plots.save(ablations.latency(bars, title, figure.width), stem)


def _device(link: Mapping[str, Any]) -> Profile:
    return Profile(**{key: float(rate) for key, rate in link.items()})  # type: ignore[arg-type]  # YAML: 20e6 is text


def _last_round(run: FinishedRun, aim: Target | None) -> int:
    """The round in which a run reached the target, 0 if it never did; without a target, its last round."""
    if aim is None:
        return run.rows[-1]["round"]
    return next((row["round"] for row in run.rows if aim.met(row)), 0)


def _mean(
    runs: Sequence[FinishedRun], until: Mapping[Path, int], device: Profile, aim: Target | None
) -> tuple[float, float]:
    """(seconds on the link, seconds computing), up to the target or per round: the mean over runs."""
    sums = [0.0, 0.0]
    for run in runs:
        rounds = [ablations.simulated(e, device) for n, e in ablations.rounds(run.folder) if n <= until[run.folder]]
        for part in (0, 1):
            sums[part] += sum(seconds[part] for seconds in rounds) / (1 if aim else len(rounds)) / len(runs)
    return sums[0], sums[1]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


KINDS: dict[str, Callable[[Described, Sequence[FinishedRun], Path], list[Path]]] = {
    "curves": _curves,
    "setting": _setting,
    "latency": _latency,
    "table": _table,
}
