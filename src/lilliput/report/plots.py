"""Figures for papers: a metric against rounds, MB and simulated seconds, and against memory.

Lines are means over seeds, bands one standard deviation.  The colours are Okabe and Ito's, which colour-blind readers
can distinguish; line styles repeat the distinction for print without colour.  https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lilliput.report.labels import name_lines, name_points, name_target
from lilliput.report.runs import Row, Target, largest, series
from lilliput.report.text import is_share, lower_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REMEDY = "choose another metric, or run with evaluate=both"
Groups = Mapping[str, Sequence[Sequence[Row]]]  # label -> the rows of each seed
Curve = tuple[np.ndarray, np.ndarray, np.ndarray]  # x, mean and standard deviation over seeds

WIDTHS = {"single": 3.4, "double": 7.0}  # inches: the column and the page of the usual two-column styles
TITLES = {"rounds": "round", "mb": "MB sent, up and down", "gb": "GB sent, up and down", "seconds": "simulated seconds"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKS = "os^Dv>PX"
INK, FAINT = "#333333", "#999999"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"],
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "xtick.minor.width": 0.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.solid_capstyle": "round",
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # embedded as text that publishers accept, not as Type 3 outlines
    "ps.fonttype": 42,
}


def style() -> AbstractContextManager[None]:
    """The style of all figures, as a context; it changes nothing outside."""
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ValueError("figures need matplotlib; pip install 'lilliput[run]'") from None
    return rc_context(STYLE)  # type: ignore[arg-type]


def mean_curve(seeds: Sequence[Sequence[Row]], metric: str, against: str = "rounds") -> Curve:
    """Mean and sample standard deviation of the metric over seeds, at every x where any seed was evaluated.

    Interpolates a seed's value between its evaluations.  x spans the range that all seeds share, so that each point is
    a mean over all of them.  Empty if a seed never evaluated the metric, or if the ranges do not overlap.
    """
    lines = [tuple(map(np.asarray, series(rows, metric, against))) for rows in seeds]
    if not lines or any(len(x) == 0 for x, _ in lines):
        return np.empty(0), np.empty(0), np.empty(0)
    first, last = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    at = np.unique(np.concatenate([x for x, _ in lines]))
    at = at[(at >= first) & (at <= last)]
    values = np.stack([np.interp(at, x, y) for x, y in lines])
    spread = values.std(axis=0, ddof=1) if len(lines) > 1 else np.zeros(len(at))
    return at, values.mean(axis=0), spread


def curves(
    groups: Groups,
    metric: str = "accuracy",
    against: Sequence[str] = ("rounds",),
    target: Target | None = None,
    width: str = "single",
) -> Figure:
    """A panel for each axis of `against` (rounds, mb, gb, seconds), with one line per group.

    Raises ValueError if no group evaluated the metric.
    """
    target = target if target and target.metric == metric else None
    with style():
        figure, panels = frame(len(against), width)
        for ax, axis in zip(panels, against, strict=True):
            drawn = {name: mean_curve(seeds, metric, axis) for name, seeds in groups.items()}
            if not any(len(x) for x, _, _ in drawn.values()):
                raise ValueError(f"no run evaluated {metric!r}; {_REMEDY}")
            _draw(ax, drawn, metric, axis, target)
        panels[0].set_ylabel(axis_title(metric))
        if target:
            name_target(panels[0], target)
        name_lines(panels)
    return figure


def against_memory(groups: Groups, metric: str = "accuracy", width: str = "single") -> Figure:
    """The best value of the metric against the memory of the largest client: one point per group, bars over seeds."""
    best = min if lower_is_better(metric) else max
    with style():
        figure, (ax,) = frame(1, width)
        ends = {}
        for number, (name, seeds) in enumerate(groups.items()):
            seen = [(largest(rows, "peak_memory_bytes") / 1e6, series(rows, metric)[1]) for rows in seeds]
            points = np.array([(mb, best(values)) for mb, values in seen if values])
            if not len(points):
                continue
            ends[name] = (x, y) = points.mean(axis=0)
            dx, dy = points.std(axis=0, ddof=1) if len(points) > 1 else (0, 0)
            # Hollow, because settings with equal memory and equal scores would hide each other.
            look: dict[str, Any] = {"color": colour(number), "fmt": MARKS[number % len(MARKS)], "mfc": "none"}
            ax.errorbar(x, y, dy, dx, ms=4.5, lw=0.9, mew=1.1, label=name, **look)
        if not ends:
            raise ValueError(f"no run evaluated {metric!r}; {_REMEDY}")
        ax.set(xlabel="memory of the largest client, MB", ylabel=f"best {axis_title(metric)}")
        ax.margins(0.12, 0.15)
        _scale(ax, [x for x, _ in ends.values()], margin=1.12)
        per_cent(ax, metric)
        name_points(ax, [(name, *ends[name], colour(i)) for i, name in enumerate(groups) if name in ends])
    return figure


def save(figure: Figure, stem: str | Path) -> list[Path]:
    """Write `<stem>.pdf` (vectors) and `<stem>.png` (300 dpi), the same bytes for the same figure; return the paths."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".pdf", ".png")]
    with style():
        for path, stamp in zip(paths, ({"CreationDate": None}, {"Software": None}), strict=True):
            figure.savefig(path, metadata=stamp)
    return paths


def frame(count: int, width: str) -> tuple[Figure, Sequence[Axes]]:
    """A figure of `count` panels side by side that share their y axis."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    inches = WIDTHS[width]
    height = inches * 0.66 if count == 1 else inches / count * 0.86
    figure = Figure(figsize=(inches, height), layout="constrained")
    return figure, figure.subplots(1, count, sharey=True, squeeze=False)[0]


def colour(number: int) -> str:
    """The colour of the group with this number; colours repeat after eight, with another dash."""
    return COLOURS[number % len(COLOURS)]


def _draw(ax: Axes, drawn: Mapping[str, Curve], metric: str, axis: str, target: Target | None) -> None:
    for number, (name, (x, mean, spread)) in enumerate(drawn.items()):
        if not len(x):
            continue
        ax.plot(x, mean, color=colour(number), linestyle=DASHES[number // 4 % len(DASHES)], label=name, zorder=3)
        if spread.any():
            ax.fill_between(x, mean - spread, mean + spread, color=colour(number), alpha=0.16, linewidth=0, zorder=2)
        if target and (hit := _first(mean, target)) is not None:
            ax.plot(x[hit], mean[hit], "o", color=colour(number), ms=4, mec="white", mew=0.7, zorder=4)
    if target:
        ax.axhline(target.value, color=FAINT, lw=0.8, linestyle=(0, (2, 2)), zorder=1)
    ax.set_xlabel(TITLES[axis])
    ax.locator_params(axis="x", nbins=5)  # labels of five digits must not touch
    _scale(ax, [x[-1] for x, _, _ in drawn.values() if len(x)])
    per_cent(ax, metric)


def _first(mean: np.ndarray, target: Target) -> int | None:
    hits = np.flatnonzero(mean >= target.value if target.at_least else mean <= target.value)
    return int(hits[0]) if len(hits) else None


def _scale(ax: Axes, ends: Sequence[float], margin: float = 1.0) -> None:
    """Scale the x axis from zero, or logarithmically if the groups' ends differ by more than a factor of 20."""
    positive = [end for end in ends if end > 0]
    if positive and max(positive) > 20 * min(positive):
        ax.set_xscale("log", nonpositive="mask")
    else:
        ax.set_xlim(0, margin * max(positive, default=1))


def axis_title(metric: str) -> str:
    """The title of a metric's axis."""
    words = metric.replace("clients/accuracy/worst_decile", "accuracy, worst tenth of clients").replace("_", " ")
    if words.startswith("clients/"):
        words = words.removeprefix("clients/") + " at the clients"
    return f"{words} (%)" if is_share(metric) else words


def per_cent(ax: Axes, metric: str) -> None:
    """Show shares of 1 in per cent on the y axis."""
    from matplotlib.ticker import FuncFormatter

    if is_share(metric):
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
