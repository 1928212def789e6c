"""Names beside the lines and points of a figure, moved apart if they would overlap."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lilliput.report.runs import Target
from lilliput.report.text import is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE, LEADING = 7, 8.0  # points: the type size, and the least distance between two names


def name_lines(panels: Sequence[Axes]) -> None:
    """Write names at the ends of lines if there is one panel and all lines end together, else a legend above."""
    ax = panels[0]
    lines = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
    last = [(float(np.asarray(line.get_xdata())[-1]), float(np.asarray(line.get_ydata())[-1])) for line in lines]
    together = all(x > 0.97 * ax.get_xlim()[1] for x, _ in last)
    if len(panels) == 1 and len(lines) <= 7 and together:
        for line, y in zip(lines, apart(ax, [y for _, y in last]), strict=True):
            _beside(ax, str(line.get_label()), (1, y), (4, 0), color=line.get_color(), va="center", fontsize=SIZE)
    elif len(lines) > 1:
        columns = min(len(lines), 3 if len(panels) == 1 else 6)
        look: dict[str, Any] = {"frameon": False, "handlelength": 2.2, "columnspacing": 1.4}
        ax.figure.legend(handles=lines, loc="outside upper left", ncols=columns, **look)


def name_target(ax: Axes, target: Target) -> None:
    """Write the target's value above its line."""
    from matplotlib.patheffects import withStroke

    text = f"target {100 * target.value:g} %" if is_share(target.metric) else f"target {target.value:g}"
    halo = [withStroke(linewidth=2, foreground="white")]
    look = {"color": "#777777", "va": "bottom", "fontsize": 6.5, "path_effects": halo, "zorder": 5}
    _beside(ax, text, (0, target.value), (3, 2), **look)


def name_points(ax: Axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Write names beside points (name, x, y, colour), on the side that has room."""
    _lay_out(ax)
    across = ax.transAxes.inverted().transform(ax.transData.transform([(x, y) for _, x, y, _ in points]))[:, 0]
    for column in _columns(across):
        heights = apart(ax, [points[i][2] for i in column])
        for i, y in zip(column, heights, strict=True):
            left = across[i] > 0.6
            look: dict[str, Any] = {"ha": "right" if left else "left", "va": "center", "fontsize": SIZE}
            place: dict[str, Any] = {"xytext": (-6 if left else 6, 0), "textcoords": "offset points"}
            ax.annotate(points[i][0], (points[i][1], y), color=points[i][3], **place, **look)


def _columns(across: np.ndarray, width: float = 0.2) -> list[list[int]]:
    """Groups of points whose names could overlap: neighbours less than `width` of the axis apart."""
    order = [int(i) for i in np.argsort(across)]
    columns = [order[:1]]
    for before, i in pairwise(order):
        if across[i] - across[before] < width:
            columns[-1].append(i)
        else:
            columns.append([i])
    return columns


def _beside(ax: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **look: Any) -> None:
    """Write text at (share of the axis's width, data height), moved by `offset` points."""
    place: dict[str, Any] = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points"}
    ax.annotate(text, at, offset, annotation_clip=False, **place, **look)


def _lay_out(ax: Axes) -> None:
    """Fix the layout, which decides how many points a data unit has."""
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]


def apart(ax: Axes, heights: Sequence[float]) -> list[float]:
    """The heights (data units) moved as little as possible so that names do not overlap; keeps their order."""
    if not heights:
        return []
    _lay_out(ax)
    scale = 72 / ax.figure.dpi
    points = ax.transData.transform([(1, y) for y in heights])[:, 1] * scale
    order = np.argsort(points)
    gaps = LEADING * np.arange(len(order))
    # Isotonic regression of the sorted heights minus their gaps: least squares with names in order, a gap apart.
    placed = np.empty(len(order))
    placed[order] = isotonic(points[order] - gaps) + gaps
    return list(ax.transData.inverted().transform([(1, p / scale) for p in placed])[:, 1])


def isotonic(values: np.ndarray) -> np.ndarray:
    """The non-decreasing sequence nearest to the values in least squares; pools neighbours that break the order."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return np.concatenate([np.full(count, mean) for mean, count in blocks])
