"""The picture of `lilliput memory`: what is there when most is needed, a bar for each way to train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lilliput.footprint import Footprint
from lilliput.footprint.result import KINDS
from lilliput.report import plots


def draw(rows: Mapping[str, Footprint], memory: int | None, stem: str | Path) -> list[Path]:
    """Write the figure as PDF and PNG; the line is the memory that there is, in bytes."""
    with plots.style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(plots.WIDTHS["double"], 0.6 + 0.32 * len(rows)), layout="constrained")
        ax = figure.subplots()
        places, ends = range(len(rows)), [0.0] * len(rows)
        for number, kind in enumerate(KINDS):
            sizes = [row.at_peak[kind] / 1e9 for row in rows.values()]
            ax.barh(places, sizes, left=ends, height=0.62, color=plots.colour(number), label=NAMES.get(kind, kind))
            ends = [end + size for end, size in zip(ends, sizes, strict=True)]
        for place, end in zip(places, ends, strict=True):
            blank = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            ax.text(end, place, f" {end:.3g} ", va="center", fontsize=6.5, bbox=blank)
        if memory is not None:
            ax.axvline(memory / 1e9, color=plots.INK, lw=0.9, ls=(0, (4, 2)))
        ax.set(yticks=places, yticklabels=list(rows), xlabel="GB at the peak of a training step")
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.grid(axis="x")
        figure.legend(loc="outside upper center", ncols=len(KINDS), frameon=False)
    return plots.save(figure, Path(stem).with_suffix("") if Path(stem).suffix in (".pdf", ".png") else stem)


NAMES = {"scratch": "update"}
