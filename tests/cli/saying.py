"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

FAST = ("--plain", "rounds=2", "plots=false", "tensorboard=false")


class Said(NamedTuple):
    """What a command ended with."""

    status: int
    out: str
    err: str


Cli = Callable[..., Said]
Runs = Callable[[], list[Path]]
