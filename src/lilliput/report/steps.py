"""What a run shows that counts steps instead of rounds: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lilliput.report.live import suited
from lilliput.report.text import duration, megabytes, number

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Row = Mapping[str, Any]
SHOWN = 10  # rows in the live table
COLUMNS: dict[str, Callable[[Row], str]] = {
    "step": lambda row: f"{row['round']:,}",
    "loss": lambda row: number("loss", row["train_loss"]),
    "perplexity": lambda row: number("perplexity", row["perplexity"]) if "perplexity" in row else "",
    "lr": lambda row: f"{row['lr']:.2e}",
    "tokens": lambda row: quantity(row["tokens"]),
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "examples/s": lambda row: f"{row['examples_per_second']:,.3g}",
    "peak MB": lambda row: megabytes(row["peak_memory_bytes"]) if row["peak_memory_bytes"] else "",
}


def quantity(tokens: float) -> str:
    """A number of tokens as text: 512, 20.5K, 1.1B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if tokens >= size:
            return f"{tokens / size:.3g}{letter}"
    return f"{tokens:.0f}"


class Progress:
    """The progress of a run, and when it will end at the pace of its last rows."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.title, self.steps, self.step = clock, "", 0, 0
        self._marks: deque[tuple[int, float]] = deque(maxlen=20)  # (step, when)

    def start(self, run: Any, rows: Sequence[Row]) -> None:
        c, self.step = run.c, run.progress.step
        self.title, self.steps = f"{c.model}, {c.optimizer}, {c.total_steps:,} steps", c.total_steps
        self._marks.append((self.step, self.clock()))

    def mark(self, step: int) -> None:
        self.step = step
        self._marks.append((step, self.clock()))

    def eta(self) -> str:
        """The time left; "" before the first row."""
        (first, began), (last, now) = self._marks[0], self._marks[-1]
        return duration((now - began) / (last - first) * (self.steps - self.step)) if last > first else ""

    def summary(self, rows: Sequence[Row]) -> str:
        """The run in a sentence."""
        scored = [row for row in rows if "perplexity" in row]
        parts = [f"perplexity {number('perplexity', scored[-1]['perplexity'])}"] if scored else []
        if rows:
            rates = [row["tokens_per_second"] for row in rows]
            parts += [f"{quantity(rows[-1]['tokens'])} tokens", f"{sorted(rates)[len(rates) // 2]:,.0f} tokens/s"]
            parts += [f"peak {megabytes(max(row['peak_memory_bytes'] for row in rows))} MB"]
        return f"{self.step:,} of {self.steps:,} steps" + (": " if parts else "") + ", ".join(parts)


class StepLines:
    """Plain lines, one per row of metrics.jsonl."""

    def __init__(self, write: Callable[[str], Any] = print, clock: Callable[[], float] = time.monotonic) -> None:
        self.write, self.state = write, Progress(clock)

    def start(self, run: Any, rows: Sequence[Row]) -> None:
        self.state.start(run, rows)
        self.write(self.state.title + (f", resumed after step {self.state.step}" if self.state.step else ""))

    def progress(self, step: int, done: int, total: int) -> None:
        """Does nothing: each line is a whole row."""

    def row(self, row: Row) -> None:
        self.state.mark(row["round"])
        parts = [f"{name} {text}" for name, show in COLUMNS.items() if (text := show(row))]
        parts += [f"ETA {self.state.eta()}"] if row["round"] < self.state.steps else []
        self.write("  ".join(parts))

    def end(self, rows: Sequence[Row]) -> None:
        self.write(self.state.summary(rows))


class StepTable:
    """A live table of the last rows with the progress of the run, drawn when something happens."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.live import Live

        self.console, self.state = console, Progress(clock)
        self.rows: deque[Row] = deque(maxlen=SHOWN)
        self.live = Live(console=console, auto_refresh=False)
        self._drawn = -1.0

    def start(self, run: Any, rows: Sequence[Row]) -> None:
        self.state.start(run, rows)
        self.rows.extend(rows)
        self.live.start()
        self._draw()

    def progress(self, step: int, done: int, total: int) -> None:
        self.state.step = step
        if self.state.clock() - self._drawn >= 0.1:
            self._draw()

    def row(self, row: Row) -> None:
        self.state.mark(row["round"])
        self.rows.append(row)
        self._draw()

    def end(self, rows: Sequence[Row]) -> None:
        self.live.update(self._table(), refresh=True)
        self.live.stop()
        self.console.print(self.state.summary(rows), style="bold", highlight=False)

    def _draw(self) -> None:
        from rich.console import Group

        self._drawn = self.state.clock()
        self.live.update(Group(self._table(), self._status()), refresh=True)

    def _table(self) -> RenderableType:
        from rich import box
        from rich.table import Table

        grid = Table(title=self.state.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for name in COLUMNS:
            grid.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            grid.add_row(*(show(row) for show in COLUMNS.values()))
        return grid

    def _status(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        state = self.state
        grid = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(total=state.steps, completed=state.step, width=24, complete_style="cyan")
        eta = f"ETA {state.eta()}" if state.eta() else ""
        grid.add_row(f"step {state.step:,}/{state.steps:,}", bar, eta)
        return grid


def live_steps(console: Console | None = None, plain: bool = False) -> StepTable | StepLines:
    """The reporter for this console: the live table on a terminal, else (or with `plain`) lines."""
    return suited(StepTable, StepLines, console, plain)
