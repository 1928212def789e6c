"""`lilliput memory`: what training needs, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lilliput.cli.arguments import Line
from lilliput.config.aliases import pretraining
from lilliput.config.layers import words
from lilliput.config.single import read
from lilliput.footprint import Footprint, Setting, measured
from lilliput.footprint.beside import beside
from lilliput.footprint.sizes import show
from lilliput.footprint.verdict import sentence
from lilliput.splitter.budget import parsed

if TYPE_CHECKING:
    from rich.console import Console

_LINE = Line(figure="a file to draw into: --figure memory")
SHORT = {"batch": "batch_size", "length": "max_length"}
LEFT_OUT = "not counted: the allocator's rounding, the device's context (about 0.5 GB of CUDA), workspace in kernels"
NAMES = {"scratch": "update"}
STYLES = {
    "weights": "blue", "gradients": "yellow", "states": "green", "projections": "magenta", "activations": "red",
    "scratch": "cyan",
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    flags, given = _LINE.parse(argv)
    typed, _ = pretraining({SHORT.get(key, key): value for key, value in words(given).items()})
    limit, certify = typed.pop("gpu", None), bool(typed.pop("certify", True))
    setting = read(Setting, typed, command="memory")
    memory = None if limit is None else parsed(limit)
    own = measured(setting, certify or None)
    rows = {_name(setting): own, **_others(setting)}
    _print(setting, rows, memory)
    if memory is not None:
        print(sentence(setting, own, memory, measured))
    if flags["figure"] is not None:
        from lilliput.cli.memory_picture import draw

        print(*draw(rows, memory, flags["figure"]), sep="\n")
    return 0


def _others(setting: Setting) -> dict[str, Footprint]:
    """The ways beside the setting that its model can be trained in."""
    found = {}
    for name, other in beside(setting):
        try:
            found[name] = measured(other)
        except ValueError:  # nothing to project or to adapt, or no update in the backward pass
            continue
    return found


def _name(setting: Setting) -> str:
    rank = setting.optimizer_options.get("rank")
    also = [("rank", rank), ("LoRA", setting.lora), ("subspace", setting.subspace)]
    return ", ".join([setting.optimizer, *(f"{word} {number}" for word, number in also if number)])


def _print(setting: Setting, rows: Mapping[str, Footprint], memory: int | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, own = Console(), next(iter(rows.values()))
    how = "certified by a step on fake tensors" if own.certified else "by formulas"
    title = f"{setting.model}, {own.parameters / 1e6:,.1f} M parameters: {_training(setting)}; {how}"
    console.print(title, highlight=False)
    size, unit = _unit(max(row.peak for row in rows.values()))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(unit, vertical="bottom")
    for name in rows:
        table.add_column(name, justify="right", vertical="bottom", overflow="fold")
    for kind, style in STYLES.items():
        cells = [f"{getattr(row, kind) / size:.2f}" if getattr(row, kind) else "-" for row in rows.values()]
        table.add_row(f"[{style}]{NAMES.get(kind, kind)}[/]", *cells, end_section=kind == list(STYLES)[-1])
    table.add_row("total", *(f"{row.total / size:.2f}" for row in rows.values()))
    table.add_row("[bold]peak[/]", *(f"[bold]{row.peak / size:.2f}[/]" for row in rows.values()))
    console.print(table)
    _bars(console, rows, memory)
    console.print(LEFT_OUT, style="dim", highlight=False)


def _unit(largest: int) -> tuple[float, str]:
    return (1e9, "GB") if largest >= 1e9 else (1e6, "MB") if largest >= 1e6 else (1e3, "kB")


def _bars(console: Console, rows: Mapping[str, Footprint], memory: int | None) -> None:
    """What is there at the peak, a row each; the line is the device's memory."""
    from rich.text import Text

    width = max(map(len, rows))
    room = max(20, console.width - width - 14)
    scale = room / max(memory or 0, *(row.peak for row in rows.values()))
    for name, row in rows.items():
        line, end, drawn = Text(f"{name:{width}}  "), 0.0, 0
        for kind, style in STYLES.items():
            end += row.at_peak[kind] * scale
            line.append("█" * (round(end) - drawn), style)
            drawn = round(end)
        if memory is not None and (mark := round(memory * scale)) > drawn:
            line.append(" " * (mark - drawn - 1) + "│")
            drawn = mark
        line.append(" " * (room - drawn) + f"  {show(row.peak)}")
        if memory is not None and row.peak > memory:
            line.append(" !", "red")
        console.print(line, no_wrap=True, overflow="crop")


def _training(setting: Setting) -> str:
    """How is trained, in few words."""
    batch = f"batch {setting.batch_size}" + (f" in {setting.accumulate} passes" if setting.accumulate > 1 else "")
    kind = "autocast to bf16" if setting.autocast else setting.dtype
    flags = [name for name in ("per_layer", "checkpointing", "lean", "padded") if getattr(setting, name)]
    return ", ".join([batch, kind, *flags, setting.device])
