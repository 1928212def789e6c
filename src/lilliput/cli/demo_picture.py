"""The demo's picture: who has seen what, what each way of training learned, and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lilliput.report import plots
from lilliput.report.runs import series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lilliput.cli.demo import Outcome
    from lilliput.data import Dataset, Federated

HOLDS, TOO_SMALL = "#0072B2", "#D55E00"


def draw(
    dataset: Dataset, held: Federated, outcomes: Sequence[Outcome], large: Sequence[int], folder: Path
) -> list[Path]:
    """Write demo.png and demo.pdf into a folder; `large` are the devices that can hold the model."""
    with plots.style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.2, 2.9), layout="constrained")
        who, what, when = figure.subplots(1, 3, width_ratios=(1.0, 1.05, 0.9))
        _devices(who, dataset, held, large)
        _scores(what, outcomes)
        _curves(when, outcomes)
        for ax, title in (
            (who, "who has seen which digit"),
            (what, "what the model learned"),
            (when, "digits 5-9, round by round"),
        ):
            ax.set_title(title, loc="left", fontsize=8, fontweight="bold", pad=9)
    return plots.save(figure, folder / "demo")


def _devices(ax: Axes, dataset: Dataset, held: Federated, large: Sequence[int]) -> None:
    """A dot for each device and digit, as large as it has examples."""
    for device, index in held.partition.items():
        counts = torch.bincount(dataset.train[1][index], minlength=dataset.classes)
        digits = counts.nonzero().flatten()
        colour = HOLDS if device in large else TOO_SMALL
        ax.scatter([device + 1] * len(digits), digits, s=2.2 * counts[digits], color=colour, linewidths=0)
    for place, words, colour in ((5.5, "can hold the model", HOLDS), (15.5, "too small for it", TOO_SMALL)):
        ax.text(place, 10.0, words, color=colour, ha="center", fontsize=7)
    ax.axvline(10.5, color=plots.FAINT, lw=0.6)
    ax.set(
        xlabel="device",
        ylabel="digit",
        yticks=range(10),
        xticks=(1, 5, 10, 15, 20),
        ylim=(-0.6, 10.7),
        xlim=(0.2, 20.8),
    )
    ax.grid(visible=False)


def _scores(ax: Axes, outcomes: Sequence[Outcome]) -> None:
    """A row for each way, from its accuracy on one half of the digits to that on the other."""
    for number, outcome in enumerate(outcomes):
        early, late = (100 * outcome.last[name] for name in ("0-4", "5-9"))
        ax.plot((early, late), (number, number), color=plots.colour(number), lw=1.6, alpha=0.45, solid_capstyle="butt")
        ax.plot(early, number, "o", ms=5.5, color=plots.colour(number), mfc="white", mew=1.2)
        ax.plot(late, number, "o", ms=5.5, color=plots.colour(number))
        ax.text(-8, number, outcome.way.name, ha="right", va="center", color=plots.colour(number), fontsize=7.5)
        ax.text(late, number - 0.24, f"{late:.0f}", ha="center", va="bottom", fontsize=6.5)
    ax.set(
        xlabel="accuracy (%): hollow digits 0-4, filled digits 5-9",
        xlim=(-4, 104),
        ylim=(len(outcomes) - 0.5, -0.75),
        yticks=[],
    )
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")


def _curves(ax: Axes, outcomes: Sequence[Outcome]) -> None:
    for number, outcome in enumerate(outcomes):
        x, y = series(outcome.rows, "5-9")
        ax.plot(x, [100 * value for value in y], color=plots.colour(number))
    ax.set(xlabel="round", ylabel="accuracy (%)", ylim=(-3, 103), xlim=(0, len(outcomes[0].rows)))
