"""What a run leaves line by line, a JSON object a round, and how a resumed run goes on with it.

A crash may leave rounds behind the checkpoint's, and a last line half written: these are cut.  Up to the checkpoint's
round every line must be there; where one is not, nothing is touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lilliput.experiment.checkpoint import CheckpointError

Row = dict[str, Any]


@dataclass
class Log:
    """A file of JSON lines: where it lies, the bytes of the lines that count, and these lines where they are kept."""

    path: Path
    size: int = 0
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path, done: int, *, every: bool = True, keep: bool = True) -> Log:
        """The log of a run that has done so many rounds; reads only.

        every: there is a line for every round, not just for some.
        Raises CheckpointError, with what to do, for one that is damaged or lacks rounds.
        """
        log, last = cls(path), 0
        with open(path, "rb") if path.exists() else open(os.devnull, "rb") as lines:
            for at, line in enumerate(lines, 1):
                row = _row(line)
                behind = row is None or row["round"] > done
                if behind and (last == done or (not every and not _counts(lines, done))):
                    break  # written after the checkpoint: its rounds are run again
                if row is None or row["round"] != last + 1 if every else row is None or row["round"] <= last:
                    what = "damaged" if row is None else f"of round {row['round']}, after round {last}"
                    raise _damaged(path, f"line {at} is {what}", done)
                assert row is not None
                last = row["round"]
                log.size += len(line)
                if keep:
                    log.rows.append(row)
        if every and last < done:
            raise _damaged(path, f"it ends with round {last}", done)
        return log

    def begin(self) -> None:
        """Cut off what lies behind the lines that count; a file of these alone is not touched."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size != self.size:
            os.truncate(self.path, self.size)

    def write(self, line: str) -> None:
        """Append a line, and wait until it is on the disk."""
        with open(self.path, "a") as out:
            out.write(line + "\n")
            out.flush()
            os.fsync(out.fileno())


def _row(line: bytes) -> Row | None:
    """The object of a line with a whole number as its round, or None."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("round")) is int else None


def _counts(lines: Iterable[bytes], done: int) -> bool:
    """Whether any of these lines is of a round that was done."""
    return any(row is not None and row["round"] <= done for row in map(_row, lines))


def _damaged(path: Path, what: str, done: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what}, and the checkpoint beside it has done round {done}; nothing was changed: restore the file, "
        f"or train on from the weights in a new run with init={path.parent}"
    )
