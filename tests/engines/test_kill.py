"""Killed at any moment, a run resumes and ends with the bits of one that was not."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures import assert_same_history, experiment

from lilliput import checkpoint, store
from lilliput.engines import Sequential, Workers
from lilliput.fleet import Device

ENGINES: dict[str, Callable[[], Any]] = {
    "sequential": Sequential,
    "wire": lambda: Sequential(wire=True),
    "workers": lambda: Workers(2),
}
MOMENTS = ("before a reply", "after a reply", "before a file counts", "after a file counts", "after a checkpoint")
ROUNDS = 8


def arm(moment: str, countdown: int) -> None:
    """Make this process and its children kill the run the n-th time that this moment comes."""
    run = os.getpid()
    left = mp.get_context("fork").Value("i", countdown)

    def strike(when: str) -> None:
        if when != moment:
            return
        with left.get_lock():
            left.value -= 1
            if left.value == 0:
                os.kill(run, signal.SIGKILL)

    def around(owner: Any, name: str, before: str, after: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            strike(before)
            out = original(*args, **kwargs)
            strike(after)
            return out

        setattr(owner, name, wrapped)

    around(Device, "handle", "before a reply", "after a reply")
    around(os, "replace", "before a file counts", "after a file counts")
    around(checkpoint, "save", "", "after a checkpoint")


def run_to_the_end_or_be_killed(name: str, engine: str, folder: Path, moment: str, countdown: int) -> None:
    os.setpgrp()
    arm(moment, countdown)
    run(name, engine, folder)
    os._exit(0)


def run(name: str, engine: str, folder: Path | None, resume: bool = True) -> Any:
    return experiment(name, rounds=ROUNDS, folder=folder, checkpoint_every=1 if folder else None, store_bytes=2048).run(
        ENGINES[engine](), resume=resume
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["scaffold", "two_calls"])
def test_killed_ten_times_and_resumed_equals_straight(name: str, engine: str, tmp_path: Path) -> None:
    draw = random.Random(f"{name} {engine}")
    kills = 0
    for attempt in range(10):
        moment = MOMENTS[attempt % len(MOMENTS)]
        process = mp.get_context("fork").Process(
            target=run_to_the_end_or_be_killed, args=(name, engine, tmp_path, moment, draw.randint(1, 6))
        )
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
    assert kills >= 4
    assert_same_history(run(name, engine, tmp_path), run(name, "sequential", None, resume=False))


def test_a_file_is_old_or_new_but_never_torn(tmp_path: Path) -> None:
    path = tmp_path / "file"
    store.replace(path, b"old")

    def torn() -> None:
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        store.replace(path, b"new")

    process = mp.get_context("fork").Process(target=torn)
    process.start()
    process.join(10)
    assert process.exitcode == -signal.SIGKILL and path.read_bytes() == b"old"
