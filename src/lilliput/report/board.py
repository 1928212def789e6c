"""Run trackers: TensorBoard events under the run's folder, and Weights & Biases."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_SERVER = {"loss", "accuracy"}  # the server's evaluation, which has its own group


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, value) for each number of a row: server/…, clients/…, seconds/…, and all others under round/…"""
    for name, value in row.items():
        if name == "round" or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        yield (f"server/{name}" if name in _SERVER else name if "/" in name else f"round/{name}"), float(value)


class TensorBoard:
    """Writes each row as TensorBoard scalars; `tensorboard --logdir runs` shows them.

    It writes and flushes in the caller's thread, because engines fork, and so that a killed run keeps its events.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def start(self, experiment: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        """Open the event file.  Raises ValueError with the package to install if tensorboard is missing."""
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise ValueError("TensorBoard needs tensorboard; pip install 'lilliput[run]', or do without") from None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}", "wb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._add(Event(file_version="brain.Event:2"))
        if rows:
            # Hides the events that an interrupted session wrote after the checkpoint from which this one starts.
            self._add(Event(step=rows[-1]["round"] + 1, session_log=SessionLog(status=SessionLog.START)))

    def progress(self, round: int, done: int, total: int) -> None:
        """Does nothing: each event is a whole round."""

    def row(self, row: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row)]
        self._add(Event(step=row["round"], summary=Summary(value=values)))

    def end(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._file.close()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()


class WandB:
    """Sends each row to Weights & Biases.  The folder's name identifies a run, so a resumed run continues there."""

    def __init__(self, folder: str | Path, project: str = "lilliput", config: Mapping[str, Any] | None = None) -> None:
        self.folder, self.project, self.config = Path(folder), project, dict(config or {})

    def start(self, experiment: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        """Start or resume the run.  Raises ValueError with the package to install if wandb is missing."""
        try:
            import wandb
        except ImportError:
            raise ValueError("Weights & Biases needs wandb; pip install 'lilliput[wandb]', or do without") from None
        name = "-".join(self.folder.parts[-4:])
        identity = "".join(c if c.isalnum() else "-" for c in name)[-128:]
        self._run = wandb.init(
            project=self.project, name=name, id=identity, dir=str(self.folder), config=self.config, resume="allow"
        )

    def progress(self, round: int, done: int, total: int) -> None:
        """Does nothing: each step is a whole round."""

    def row(self, row: Mapping[str, Any]) -> None:
        self._run.log(dict(scalars(row)), step=row["round"])

    def end(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._run.finish()
