"""What can be told to be wrong before any data are read: values out of range, and settings that do not go together."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lilliput.config import build
from lilliput.config.settings import Settings
from lilliput.config.values import show
from lilliput.training.settings import warmup_rounds


class Rule(NamedTuple):
    """A range: whether a value lies in it, and in words."""

    holds: Callable[[Any], bool]
    words: str


_COUNT = Rule(lambda v: v >= 1, "at least 1")
_POSITIVE = Rule(lambda v: v > 0, "greater than 0")
_SHARE = Rule(lambda v: 0 <= v <= 1, "between 0 and 1")

# By the last part of a setting's key, wherever it stands.  What a method's own dataclass checks is not repeated here.
RULES: dict[str, Rule] = {
    **dict.fromkeys(("rounds", "clients", "batch_size", "evaluate_every", "checkpoint_every"), _COUNT),
    **dict.fromkeys(("shards_per_client", "classes_per_client", "length"), _COUNT),
    **dict.fromkeys(("workers", "slots_per_gpu", "threads"), _COUNT),
    **dict.fromkeys(("alpha", "timeout", "comm_threshold_mb", "seconds", "patience", "cohort"), _POSITIVE),
    "quorum": _SHARE,
    "test_fraction": Rule(lambda v: 0 <= v < 1, "at least 0 and less than 1"),
    "min_size": Rule(lambda v: v >= 0, "at least 0"),
}


def check(s: Settings) -> None:
    """Raise ValueError, with the rule and the remedy, for settings that cannot make a run."""
    _ranges(s)
    _cohort(s)
    _warmup(s)
    _files(s)
    build.stop(s)
    build.profiles(s)
    build.make_codec(s)
    build.make_engine(s)
    build.make_algorithm(s, s["clients"])


def _ranges(s: Settings) -> None:
    nodes = [(f"{node}.{name}", name, value) for node, fields in s.nodes.items() for name, value in fields.items()]
    for key, name, value in [*((name, name, value) for name, value in s.top.items()), *nodes]:
        rule = RULES.get(name)
        if rule and isinstance(value, int | float) and not rule.holds(value):
            raise ValueError(f"{key}={show(value)} must be {rule.words}")


def _cohort(s: Settings) -> None:
    cohort, clients = s.top.get("cohort"), s["clients"]
    if cohort is None:
        return
    if cohort > 1 and cohort != int(cohort):
        raise ValueError(f"cohort={cohort} must be a number of clients, or a share of them below 1")
    if clients is not None and cohort > clients and not getattr(s.choices["algorithm"].target, "pooled", False):
        raise ValueError(f"cohort={cohort} exceeds clients={clients}; choose cohort <= {clients}, or more clients")


def _warmup(s: Settings) -> None:
    warmup = s.top.get("warmup") or 0
    if warmup and warmup_rounds(warmup, s["rounds"]) >= s["rounds"]:
        raise ValueError(f"warmup={warmup:g} leaves none of {s['rounds']} rounds; shorten it, or give a share below 1")


def _files(s: Settings) -> None:
    if s["init"] is not None and not Path(s["init"]).exists():
        raise ValueError(f"init={s['init']}: there is no such file of weights, and no such run")
    if s["wandb"] and not installed("wandb"):
        raise ValueError("wandb=true needs wandb; pip install 'lilliput[wandb]'")
    if s["name"] is not None and not str(s["name"]).strip("/. "):
        raise ValueError(f"name={show(s['name'])} is no name for a folder")


def installed(module: str) -> bool:
    """Whether an optional library can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
