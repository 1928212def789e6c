"""Figures of ablations: a metric against a setting, and how long a round lasts on other links."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lilliput.core.fleet import Profile
from lilliput.core.ledger import Entry, Ledger
from lilliput.report import plots
from lilliput.report.labels import name_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Mapping[str, Mapping[float, Sequence[float]]]  # by line and setting, a value a seed
Bars = Mapping[str, Mapping[str, tuple[float, float]]]  # by group and link, seconds on the link and computing


def against_setting(points: Points, title: str, metric: str, width: str = "single") -> Figure:
    """The metric against a setting, a line a group: means over seeds, bars of one standard deviation.

    The axis is logarithmic where settings lie more than twentyfold apart.
    """
    with plots.style():
        figure, (ax,) = plots.frame(1, width)
        for number, (name, values) in enumerate(points.items()):
            xs = sorted(values)
            means, deviations = zip(*(_spread(values[x]) for x in xs), strict=True)
            look: dict[str, Any] = {"color": plots.colour(number), "marker": plots.MARKS[number % len(plots.MARKS)]}
            ax.errorbar(xs, means, deviations if any(deviations) else None, ms=3.5, lw=1.2, label=name, **look)
        every = [x for values in points.values() for x in values]
        if min(every) > 0 and max(every) > 20 * min(every):
            ax.set_xscale("log")
        ax.set(xlabel=title, ylabel=plots.axis_title(metric))
        plots.per_cent(ax, metric)
        if len(points) > 1:
            name_lines([ax])
    return figure


def latency(bars: Bars, title: str, width: str = "single") -> Figure:
    """Seconds by link, a bar a group: what passes on the link full, what is computing above it pale."""
    links = list(next(iter(bars.values())))
    with plots.style():
        figure, (ax,) = plots.frame(1, width)
        thick = 0.8 / len(bars)
        for number, (name, seconds) in enumerate(bars.items()):
            at = np.arange(len(links)) + (number - (len(bars) - 1) / 2) * thick
            sending, computing = (np.array([seconds[link][part] for link in links]) for part in (0, 1))
            ax.bar(at, sending, 0.9 * thick, color=plots.colour(number), label=name)
            ax.bar(at, computing, 0.9 * thick, bottom=sending, color=plots.colour(number), alpha=0.35)
        ax.set(ylabel=title, xticks=range(len(links)), xticklabels=links)
        handles, names = ax.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=3, frameon=False)
    return figure


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def rounds(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each round and its line, from a run's ledger; the last attempt of each round.

    Raises ValueError for a run without a ledger, or with one that is damaged.
    """
    path = folder / "ledger.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = {line["round"]: _whole(line) for line in lines}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is missing or damaged ({type(error).__name__}); run {folder} again") from None
    yield from sorted(found.items())


def _whole(line: dict[str, Any]) -> dict[str, Any]:
    """A line as it is written now, of one from when a ledger had an entry for every call."""
    if "slowest" in line:
        return line
    ledger = Ledger(line["round"])
    for call in line["calls"]:
        ledger.add(Entry(**call))
    return json.loads(ledger.line())  # type: ignore[no-any-return]


def simulated(line: Mapping[str, Any], device: Profile) -> tuple[float, float]:
    """(seconds on the link, seconds computing) of a round on devices like this: a call waits for its slowest member."""
    link = computing = 0.0
    for times, loads in line["slowest"]:
        own = [(device.seconds(down, 0, up), device.seconds(0, flops, 0)) for down, up, flops in loads]
        slowest = max(own, key=sum)
        link, computing = link + times * slowest[0], computing + times * slowest[1]
    return link, computing


def largest_message(folder: Path, kind: str) -> float:
    """MB of a kind of message (`auxiliary`, `cut`, ...) in the largest call of a run; 0 if none had it."""
    return max((line["largest"].get(kind, 0) for _, line in rounds(folder)), default=0) / 1e6
