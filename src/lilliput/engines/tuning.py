"""Applies the process settings of `lean.policy` for the length of a run, chosen by its task and reported with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lilliput.lean import policy

LARGE_MATRIX = 500_000  # elements from which the product with a batch outweighs oneDNN's cost per call


@contextmanager
def tuned(task: Any, threads: int = 1) -> Iterator[dict[str, Any]]:
    """Apply the settings that suit a task; yields a report of them.  LILLIPUT_TUNING=0 changes nothing.

    With one thread per slot all engines give the same bits.
    """
    with policy.tuned(threads, has_large_matrix(task)) as report:
        yield report


def has_large_matrix(task: Any) -> bool:
    """Whether the task's model multiplies by matrices large enough for oneDNN to be worth it."""
    params = task.init().get("params", {}) if hasattr(task, "init") else {}
    return any(p.dim() == 2 and p.numel() >= LARGE_MATRIX for p in params.values())
