"""Engines: where the device's half of a method runs, by the names of the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lilliput.engines.attempts import WorkerLost, run_attempts
from lilliput.engines.auto import Auto
from lilliput.engines.base import DivergedError, Engine, QuorumError, Round
from lilliput.engines.dry import Dry
from lilliput.engines.sequential import Sequential
from lilliput.engines.workers import Workers

ENGINES: dict[str, Callable[..., Engine]] = {"auto": Auto, "sequential": Sequential, "workers": Workers, "dry": Dry}

__all__ = [
    "ENGINES",
    "Auto",
    "DivergedError",
    "Dry",
    "Engine",
    "QuorumError",
    "Round",
    "Sequential",
    "WorkerLost",
    "Workers",
    "resolve",
    "run_attempts",
]


def resolve(engine: str | Engine, **options: Any) -> Engine:
    """The engine of this name with these options, or `engine` itself if it is one.  Raises ValueError if unknown."""
    if not isinstance(engine, str):
        return engine
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
    return ENGINES[engine](**options)
