"""Figures of ablations: a metric against a setting, and the seconds of a round on other links."""

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

Points = Mapping[str, Mapping[float, Sequence[float]]]  # line -> setting -> one value per seed
Bars = Mapping[str, Mapping[str, tuple[float, float]]]  # group -> link -> seconds on the link, seconds computing


def against_setting(points: Points, title: str, metric: str, width: str = "single") -> Figure:
    """The metric against a setting, one line per group: means over seeds with bars of one standard deviation.

    The x axis is logarithmic if the settings differ by more than a factor of 20.
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
    """Seconds by link, one bar per group: time on the link in full colour, time computing pale above it."""
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
    """Each round and its line in a run's ledger; if a round was repeated, the last attempt.

    Raises ValueError if the ledger is missing or damaged.
    """
    path = folder / "ledger.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        by_round = {line["round"]: _whole(line) for line in lines}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is missing or damaged ({type(error).__name__}); run {folder} again") from None
    yield from sorted(by_round.items())


def _whole(line: dict[str, Any]) -> dict[str, Any]:
    """Convert a line of an older ledger, which had an entry for every call, to today's format."""
    if "slowest" in line:
        return line
    ledger = Ledger(line["round"])
    for call in line["calls"]:
        ledger.add(Entry(**call))
    return json.loads(ledger.line())  # type: ignore[no-any-return]


def simulated(line: Mapping[str, Any], device: Profile) -> tuple[float, float]:
    """(seconds on the link, seconds computing) of a round on such devices; a call waits for its slowest client."""
    link = computing = 0.0
    for times, loads in line["slowest"]:
        spans = [(device.seconds(down, 0, up), device.seconds(0, flops, 0)) for down, up, flops in loads]
        slowest = max(spans, key=sum)
        link, computing = link + times * slowest[0], computing + times * slowest[1]
    return link, computing


def largest_message(folder: Path, kind: str) -> float:
    """The most MB of a kind of message (`auxiliary`, `cut`, ...) in one call of a run; 0 if it was never sent."""
    return max((line["largest"].get(kind, 0) for _, line in rounds(folder)), default=0) / 1e6
