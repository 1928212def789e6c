"""A comparison as a table: on the console, in LaTeX with booktabs, or as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lilliput.report.compare import Column, Comparison, Spread

Body = list[tuple[str, list[tuple[str, bool]]]]

_LATEX = {c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}
_NONE = "\N{EN DASH}"


def to_console(comparison: Comparison, console: Any = None) -> None:
    """Print a table with the best of each column in bold, then the notes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    console.print(str(comparison), highlight=False)
    heads, body = [column.title for column in comparison.columns], _body(comparison)
    for chosen in _fitting(heads, body, console.width):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("setting", overflow="fold")
        for place in chosen:
            table.add_column(heads[place].replace(" ", "\n", 1), justify="right", no_wrap=True, vertical="bottom")
        for label, cells in body:
            table.add_row(label, *(f"[bold]{cells[i][0]}[/]" if cells[i][1] else cells[i][0] for i in chosen))
        console.print(table)
    for note in comparison.notes:
        console.print(f"note: {note}", style="dim", highlight=False, markup=False)


def _fitting(heads: list[str], body: Body, width: int) -> Iterator[list[int]]:
    """Split the columns into as few tables as the width allows, each with the column of settings."""
    room = width - max(len("setting"), *(min(len(label), width // 3) for label, _ in body))
    chosen: list[int] = []
    used = 0
    for place, head in enumerate(heads):
        need = 3 + max(*map(len, head.split(" ", 1)), *(len(cells[place][0]) for _, cells in body))
        if chosen and used + need > room:
            yield chosen
            chosen, used = [], 0
        chosen.append(place)
        used += need
    yield chosen


def to_latex(comparison: Comparison) -> str:
    """A tabular for a paper; it needs \\usepackage{booktabs}."""
    head = ["setting", *(column.title for column in comparison.columns)]
    lines = [f"% {comparison}", rf"\begin{{tabular}}{{l{'r' * len(comparison.columns)}}}", r"\toprule"]
    lines += [" & ".join(map(_escaped, head)) + r" \\", r"\midrule"]
    for label, cells in _body(comparison):
        texts = [text.replace("±", r"$\pm$").replace(_NONE, "--") for text, _ in cells]
        bold = [rf"\textbf{{{text}}}" if best else text for text, (_, best) in zip(texts, cells, strict=True)]
        lines.append(" & ".join([_escaped(label), *bold]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def to_csv(comparison: Comparison) -> str:
    """Every number unrounded and in plain units: shares of 1, bytes (MB if the name says so), seconds."""
    settings = list(dict.fromkeys(key for group in comparison.groups for key in group.setting))
    head = ["label", "seeds"]
    for column in comparison.columns:
        name = f"{column.key}_{comparison.metric}" if column.key in ("final", "best") else column.key
        head += [name, f"{name}_std", f"{name}_runs"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head + settings)
    columns = [comparison.cells(column) for column in comparison.columns]
    for number, group in enumerate(comparison.groups):
        cells = [cell for column in columns for cell in _plain(column[number])]
        writer.writerow([group.label, len(group.runs), *cells, *(group.setting.get(key, "") for key in settings)])
    return text.getvalue()


def _plain(cell: Spread | None) -> list[Any]:
    return [cell.mean, cell.std, cell.count] if cell else ["", "", 0]


def _body(comparison: Comparison) -> Body:
    """(setting, [(cell, whether it is the best of its column)]) for each group."""
    columns = [_cells(column, comparison) for column in comparison.columns]
    return [(group.label, [cells[row] for cells in columns]) for row, group in enumerate(comparison.groups)]


def _cells(column: Column, comparison: Comparison) -> list[tuple[str, bool]]:
    """A column's cells.  The best is marked only among groups with a number for every seed, and if they differ."""
    pairs = list(zip(comparison.cells(column), comparison.groups, strict=True))
    whole = [cell.mean for cell, group in pairs if cell and cell.count == len(group.runs)]
    best = (max if column.best == "high" else min)(whole) if len(set(whole)) > 1 else None
    return [
        (_text(cell, column.scale, len(group.runs)), cell is not None and cell.mean == best and cell.mean in whole)
        for cell, group in pairs
    ]


def _text(cell: Spread | None, scale: float, runs: int) -> str:
    """`840 ± 21`, with as many decimals as the mean needs for three figures; one decimal for per cent.

    Adds `(2/3)` if one of three seeds has no number; an en dash if none has.
    """
    if cell is None:
        return _NONE
    decimals = 1 if scale == 100 else _decimals(cell.mean * scale)
    spread = f" ± {cell.std * scale:,.{decimals}f}" if cell.std else ""
    some = f" ({cell.count}/{runs})" if cell.count < runs else ""
    return f"{cell.mean * scale:,.{decimals}f}{spread}{some}"


def _decimals(value: float) -> int:
    """The decimals for three figures: 0 for 840 or a whole number, 1 for 87.04, 4 for 0.01234."""
    if not math.isfinite(value) or value == round(value) or abs(value) >= 100:
        return 0
    return min(6, 2 - math.floor(math.log10(abs(value))))


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)
