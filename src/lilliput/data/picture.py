"""A picture of a partition: how many examples of each class every client has.

A dot's area is the number of examples, its shade their share of the client's data.  Bars above show clients' sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.data.datasets import Dataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, LIGHT, DARK = "#333333", "#E4E4E4", "#9CC9E6", "#003F66"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"],
    "font.size": 7.5, "axes.labelsize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7, "axes.titlesize": 8,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.axisbelow": True,
    "pdf.fonttype": 42, "savefig.dpi": 300,
}  # fmt: skip
WIDTH, HEIGHT = (2.4, 5.2), 5.0  # inches of the dots: (least, most) across, most down
LEFT, RIGHT, ABOVE, BELOW = 0.7, 0.7, 0.3, 0.42  # inches: the margins
BARS, GAP, ROW = 0.45, 0.07, 0.19  # inches: the bars' height, the gap below them, most of a class's row


def class_counts(dataset: Dataset, partition: Mapping[int, Tensor]) -> Tensor:
    """Counts (clients, classes) int64 of the examples of each class on each client, clients in ascending order.

    Data without one label per example, such as text, count as one class.
    """
    labels = dataset.train[1] if len(dataset.train) > 1 else dataset.train[0]
    if labels.dim() != 1 or labels.is_floating_point():
        return torch.tensor([[len(partition[c])] for c in sorted(partition)])
    return torch.stack([torch.bincount(labels[partition[c]], minlength=dataset.classes) for c in sorted(partition)])


def picture(dataset: Dataset, partition: Mapping[int, Tensor], path: str | Path | None = None) -> Figure:
    """Draw a partition, {client: indices}, and save the figure if there is a path (.png, .pdf, .svg).

    Raises ValueError if matplotlib is missing or cannot write files of the path's suffix.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture of the partition needs matplotlib; pip install 'lilliput[run]'") from None
    counts, names = class_counts(dataset, partition), _names(dataset, partition)
    title = _title(dataset, counts)
    with rc_context(STYLE):
        across, down = _inches(counts, title)
        gap = GAP if down else 0.0
        below = BELOW + 0.048 * max(map(len, names)) * (names != _numbers(partition))
        figure = Figure(figsize=(LEFT + across + (RIGHT if down else 0.15), ABOVE + BARS + gap + down + below), dpi=150)
        bars = _panel(figure, below + down + gap, BARS, across)
        _bars(bars, counts.sum(1))
        bars.set_title(title, loc="left", pad=6)
        last = bars
        if down:
            bars.tick_params(labelbottom=False)
            last = _panel(figure, below, down, across)
            _dots(last, counts, min(ROW, 2 * across / len(counts), 2 * down / counts.shape[1]))
        _clients(last, names, turned=names != _numbers(partition))
        bars.set_xlim(last.get_xlim())
        if path is not None:
            _save(figure, Path(path))
    return figure


def _inches(counts: Tensor, title: str) -> tuple[float, float]:
    """Inches of the dots of counts (clients, classes): across, no less than the title, and down, 0 for one class."""
    clients, classes = counts.shape
    across = max(WIDTH[0], min(0.26 * clients, WIDTH[1]), 0.054 * len(title) - 0.15)
    return across, min(ROW * classes, HEIGHT) if classes > 1 else 0.0


def _panel(figure: Figure, bottom: float, tall: float, across: float) -> Axes:
    """Axes of `across` x `tall` inches, `bottom` inches above the figure's lower edge, label at its left edge."""
    width, height = figure.get_size_inches()
    ax = figure.add_axes((LEFT / width, bottom / height, across / width, tall / height))
    ax.yaxis.set_label_coords(-0.48 / across, 0.5)
    return ax


def _clients(ax: Axes, names: list[str], turned: bool) -> None:
    """Label the clients below the axes: all of them by name, or some of them by number."""
    places = range(0, len(names), 1 if turned else _step(len(names), 20))
    ax.set_xticks(list(places), [names[i] for i in places])
    ax.tick_params(axis="x", labelrotation=90 if turned else 0)
    ax.set_xlabel("client")
    ax.set_xlim(-0.7, len(names) - 0.3)


def _names(dataset: Dataset, partition: Mapping[int, Tensor]) -> list[str]:
    """The clients' names if they are at most 40 and each is one owner of the data set, else their numbers."""
    numbers = _numbers(partition)
    if dataset.owners is None or not dataset.owner_names or len(numbers) > 40:
        return numbers
    owners = [dataset.owners[partition[c]].unique().tolist() for c in sorted(partition)]
    return [dataset.owner_names[o[0]] for o in owners] if all(len(o) == 1 for o in owners) else numbers


def _numbers(partition: Mapping[int, Tensor]) -> list[str]:
    return [str(client) for client in sorted(partition)]


def _bars(ax: Axes, sizes: Tensor) -> None:
    ax.bar(range(len(sizes)), sizes.tolist(), width=0.72, color=LIGHT, linewidth=0)
    ax.set_yticks([0, int(sizes.max())])
    ax.set_yticklabels(["0", f"{int(sizes.max()):,}"])
    ax.set_ylabel("examples")
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(bottom=False)


def _dots(ax: Axes, counts: Tensor, pitch: float) -> None:
    """Dots of at most `pitch` inches with areas proportional to counts, and a legend of three sizes."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("share", [LIGHT, "#0072B2", DARK])
    most = int(counts.max())
    area = (0.94 * pitch * 72) ** 2 / most  # points squared, of one example
    client, label = counts.nonzero(as_tuple=True)
    examples = counts[client, label]
    share = examples / counts.sum(1)[client]
    look: Any = {"cmap": shades, "vmin": 0, "vmax": 1, "linewidths": 0.2, "edgecolors": "white", "clip_on": False}
    ax.scatter(client, label, s=area * examples, c=share, **look)
    ax.set_ylim(counts.shape[1] - 0.4, -0.6)
    ax.set_yticks(range(0, counts.shape[1], _step(counts.shape[1], 25)))
    ax.set_ylabel("class")
    ax.grid(axis="y", color=FAINT, linewidth=0.5)
    ax.spines[["top", "right", "left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    sizes = sorted({_round(most * share) for share in (0.1, 0.4, 1)} - {0})
    marks = [ax.scatter([], [], s=area * size, color="#0072B2", linewidths=0, label=f"{size:,}") for size in sizes]
    place: Any = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.02), "frameon": False}
    ax.legend(handles=marks, **place, borderpad=0.2, handletextpad=0.4, labelspacing=0.9)


def _step(many: int, most: int) -> int:
    """The smallest round step that labels at most `most` of `many` ticks."""
    return next(step for power in range(9) for step in (10**power, 2 * 10**power, 5 * 10**power) if many <= most * step)


def _round(count: float) -> int:
    """A count rounded down to one significant digit."""
    scale = 10 ** max(len(str(int(count))) - 1, 0)
    return int(count // scale * scale)


def _title(dataset: Dataset, counts: Tensor) -> str:
    least, most = int(counts.sum(1).min()), int(counts.sum(1).max())
    sizes = f"{least:,} each" if least == most else f"{least:,} to {most:,}"
    return f"{dataset.name}: {int(counts.sum()):,} examples, {len(counts)} clients of {sizes}"


def _save(figure: Figure, path: Path) -> None:
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"a picture cannot be saved as {path.name!r}; choose .png, .pdf or .svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
