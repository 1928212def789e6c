"""What a run shows while it runs: a live table on a terminal, elsewhere one plain line per round.

Bytes and simulated time count from round 1; memory is that of the largest client so far.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from lilliput.experiment.experiment import Experiment
from lilliput.experiment.stop import Row, better, headline
from lilliput.report.text import duration, megabytes, number

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Wide = TypeVar("Wide")
Plain = TypeVar("Plain")
SHOWN = 10  # rounds in the live table
SPLIT = ("encode", "transfer", "decode", "compute", "wait")  # the parts of time that profile= measures


@dataclass(frozen=True)
class Line:
    """One round as the views show it; `then` makes the next round's from its row."""

    round: int = 0
    metrics: Row = field(default_factory=dict)
    up_bytes: int = 0
    down_bytes: int = 0
    memory_bytes: int = 0
    simulated: float = 0.0
    dropped: int = 0

    def then(self, row: Row) -> Line:
        return Line(
            round=row["round"],
            metrics=row,
            up_bytes=self.up_bytes + row.get("up_bytes", 0),
            down_bytes=self.down_bytes + row.get("down_bytes", 0),
            memory_bytes=max(self.memory_bytes, row.get("peak_memory_bytes") or 0),
            simulated=self.simulated + row.get("simulated_seconds", 0.0),
            dropped=self.dropped + row.get("dropped", 0),
        )

    def value(self, metric: str | None) -> str:
        """The metric of this round as text; "" if it was not evaluated."""
        return number(metric, self.metrics[metric]) if metric in self.metrics and metric else ""


class Watch:
    """The state that both views share: the run's progress, its best round, and when it will end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.title, self.rounds = "", 0
        self.metric: str | None = None  # the headline: the target's, else the accuracy, else the loss
        self.line = Line()
        self.best: Line | None = None
        self.now: tuple[int, int, int] | None = None  # (round, clients done, clients of the round)
        self._took: deque[float] = deque(maxlen=20)  # seconds of the last rounds
        self._since = 0.0
        self._bound: tuple[str, str, float] | None = None

    def start(self, experiment: Experiment, rows: Sequence[Row]) -> None:
        self.title = title(experiment)
        self.rounds, self._bound = experiment.rounds, experiment.stop.bound()
        for row in rows:
            self.add(row)
        self._took.clear()  # an earlier session may have run on another machine
        self._since = self.clock()

    def add(self, row: Row) -> Line:
        """Record the row of a finished round."""
        self.line, self.now = self.line.then(row), None
        if aim := headline([row], self._bound):
            self.metric, sign = aim
            if self.metric in row and (self.best is None or not better(sign, self._best_value(), row[self.metric])):
                self.best = self.line
        self._took.append(self.clock() - self._since)
        self._since = self.clock()
        return self.line

    def _best_value(self) -> float:
        return self.best.metrics[str(self.metric)] if self.best else math.nan

    def fraction(self) -> float:
        """The share of the current round's clients that are done."""
        return self.now[1] / self.now[2] if self.now and self.now[2] else 0.0

    def eta(self) -> str:
        """The time left at the pace of the last rounds; "" before the first round has ended."""
        if not self._took:
            return ""
        pace = sum(self._took) / len(self._took)
        return duration(max(0.0, pace * (self.rounds - self.line.round - self.fraction())))

    def summary(self, rows: Sequence[Row]) -> str:
        """The run in a sentence: its final metric, its best round, its cost."""
        line, parts = self.line, []
        if self.metric and (last := [row for row in rows if self.metric in row]):
            parts.append(f"{self.metric} {number(self.metric, last[-1][self.metric])}")
        if self.best and self.metric:
            parts.append(f"best {self.best.value(self.metric)} in round {self.best.round}")
        parts += [f"{megabytes(line.up_bytes)} MB up", f"{megabytes(line.down_bytes)} MB down"]
        parts += [f"largest client {megabytes(line.memory_bytes)} MB"] if line.memory_bytes else []
        parts += [f"{duration(line.simulated)} simulated"] if line.simulated else []
        parts += [f"{line.dropped} dropped"] if line.dropped else []
        return f"{line.round} of {self.rounds} rounds: " + ", ".join(parts)


class Lines:
    """Plain lines, one per round: for files, pipes and sweeps."""

    def __init__(self, write: Callable[[str], Any] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.write = write or (lambda text: print(text, flush=True))
        self.watch = Watch(clock)

    def start(self, experiment: Experiment, rows: Sequence[Row]) -> None:
        self.watch.start(experiment, rows)
        self.write(self.watch.title + (f", resumed after round {self.watch.line.round}" if rows else ""))

    def progress(self, round: int, done: int, total: int) -> None:
        """Does nothing: each line is a whole round."""

    def row(self, row: Row) -> None:
        line, watch = self.watch.add(row), self.watch
        digits = len(str(watch.rounds))
        parts = [f"round {line.round:>{digits}}/{watch.rounds}"]
        parts += [f"{name} {number(name, row[name])}" for name in _metrics(row, watch.metric)]
        parts += [f"up {megabytes(line.up_bytes)} MB  down {megabytes(line.down_bytes)} MB"]
        parts += [f"memory {megabytes(line.memory_bytes)} MB"] if line.memory_bytes else []
        parts += [f"simulated {duration(line.simulated)}"] if line.simulated else []
        parts += [f"dropped {row['dropped']}"] if row.get("dropped") else []
        parts += [f"ETA {watch.eta()}"] if line.round < watch.rounds else []
        self.write("  ".join(parts))

    def end(self, rows: Sequence[Row]) -> None:
        self.write(self.watch.summary(rows))
        if split := time_split(rows):
            self.write(split)


class Table:
    """A live table of the last rounds, with the progress of the current one, for a terminal.

    It draws when something happens, at most ten times a second, and starts no thread, because engines fork.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.live import Live

        self.console, self.watch = console, Watch(clock)
        self.lines: deque[Line] = deque(maxlen=SHOWN)
        self.live = Live(console=console, auto_refresh=False, transient=False)
        self._drawn = -1.0

    def start(self, experiment: Experiment, rows: Sequence[Row]) -> None:
        self.watch.start(experiment, rows)
        self.live.start()
        self._draw()

    def progress(self, round: int, done: int, total: int) -> None:
        self.watch.now = (round, done, total)
        if self.watch.clock() - self._drawn >= 0.1:
            self._draw()

    def row(self, row: Row) -> None:
        self.lines.append(self.watch.add(row))
        self._draw()

    def end(self, rows: Sequence[Row]) -> None:
        self.live.update(self._table(), refresh=True)
        self.live.stop()
        self.console.print(self.watch.summary(rows), style="bold", highlight=False)
        if split := time_split(rows):
            self.console.print(split, highlight=False)

    def _draw(self) -> None:
        from rich.console import Group

        self._drawn = self.watch.clock()
        self.live.update(Group(self._table(), self._status()), refresh=True)

    def _table(self) -> RenderableType:
        from rich import box
        from rich.table import Table as Grid

        metrics = _metrics(_union(self.lines), self.watch.metric)[: 1 if self.console.width < 80 else None]
        grid = Grid(title=self.watch.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        grid.pad_edge = False
        for name in ("round", *metrics, "MB up", "MB down", "peak MB", "simulated"):
            grid.add_column(name, justify="right", no_wrap=True)
        for line in self.lines:
            cells = [str(line.round), *map(line.value, metrics), megabytes(line.up_bytes), megabytes(line.down_bytes)]
            cells += [megabytes(line.memory_bytes) if line.memory_bytes else "", duration(line.simulated)]
            grid.add_row(*cells, style="bold" if line is self.watch.best else None)
        return grid

    def _status(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table as Grid

        watch = self.watch
        number, done, total = watch.now or (min(watch.line.round + 1, watch.rounds), 0, 0)
        bar = ProgressBar(
            total=max(watch.rounds, 1), completed=watch.line.round + watch.fraction(), width=24, complete_style="cyan"
        )
        clients = f"{done}/{total} clients" if total else ""
        eta = f"ETA {watch.eta()}" if watch.eta() else ""
        best = f"best {watch.best.value(watch.metric)} in round {watch.best.round}" if watch.best else ""
        grid = Grid.grid(padding=(0, 2, 0, 0))
        grid.add_row(f"round {number}/{watch.rounds}", bar, clients, eta, best)
        return grid


def live(console: Console | None = None, plain: bool = False) -> Table | Lines:
    """The reporter for this console: the live table on a terminal, else (or with `plain`) lines."""
    return suited(Table, Lines, console, plain)


def suited(
    table: Callable[..., Wide], lines: Callable[..., Plain], console: Console | None, plain: bool
) -> Wide | Plain:
    """`table` for a console that is a terminal, else (or with `plain`) `lines` printed on it."""
    from rich.console import Console

    console = console or Console()
    if plain or not console.is_terminal or console.is_dumb_terminal:
        return lines(lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True))
    return table(console)


def title(experiment: Experiment) -> str:
    """The method and the numbers of clients and rounds, as text."""
    return f"{type(experiment.algorithm).__name__}, {len(experiment.data)} clients, {experiment.rounds} rounds"


def time_split(rows: Sequence[Row]) -> str:
    """How a profiled run spent its time, as text; "" if it was not profiled."""
    seconds = {part: sum(row.get(f"seconds/{part}") or 0.0 for row in rows) for part in SPLIT}
    whole = sum(seconds.values())
    if not whole:
        return ""
    return "time: " + ", ".join(f"{part} {duration(s)} ({100 * s / whole:.0f} %)" for part, s in seconds.items())


def _metrics(row: Row, metric: str | None) -> list[str]:
    """The metrics worth a column: the headline, its companions, and the training loss."""
    beside = ("clients/accuracy", "accuracy/worst_decile", "clients/accuracy/worst_decile", "loss", "train_loss")
    names = [metric, *(name for name in beside if name != metric)]
    return [name for name in names if name and name in row]


def _union(lines: Sequence[Line] | deque[Line]) -> dict[str, Any]:
    return {name: value for line in lines for name, value in line.metrics.items()}
