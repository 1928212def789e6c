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

from lilliput.engines import Sequential, Workers, serving
from lilliput.engines.device import Device
from lilliput.experiment import checkpoint
from lilliput.wire import store

ENGINES: dict[str, Callable[[], Any]] = {
    "sequential": Sequential,
    "wire": lambda: Sequential(wire=True),
    "workers": lambda: Workers(2),
}
MOMENTS = ("before a reply", "after a reply", "before a file counts", "after a file counts", "after a checkpoint")
ROUNDS = 8
INTERRUPTED, WORKERS_LEFT = 130, 99


def watched(strike: Callable[[str], None], owner: Any, name: str, before: str = "", after: str = "") -> Any:
    """What an owner has under a name, to be put in its place: it strikes before and after each call."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        strike(before)
        out = original(*args, **kwargs)
        strike(after)
        return out

    return wrapped


def arm(moment: str, countdown: int, number: int = signal.SIGKILL) -> None:
    """Make this process and its children send the run a signal the n-th time that this moment comes.

    An interrupt goes to the whole process group, as a terminal's does.
    """
    run = os.getpid()
    left = mp.get_context("fork").Value("i", countdown)

    def strike(when: str) -> None:
        if when != moment:
            return
        with left.get_lock():
            left.value -= 1
            if left.value == 0 and number == signal.SIGINT:
                os.killpg(os.getpgid(run), number)
            elif left.value == 0:
                os.kill(run, number)

    for owner, name, before, after in (
        (Device, "handle", "before a reply", "after a reply"),
        (os, "replace", "before a file counts", "after a file counts"),
        (checkpoint, "save", "", "after a checkpoint"),
    ):
        setattr(owner, name, watched(strike, owner, name, before, after))


def run_to_the_end_or_be_killed(
    name: str, engine: str, folder: Path, moment: str, countdown: int, number: int = signal.SIGKILL
) -> None:
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arm(moment, countdown, number)
    if engine != "workers":  # which knows its parent by it
        os.getpid = lambda: 7  # type: ignore[assignment]  # in containers all runs have the same
    try:
        run(name, engine, folder)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED if mp.active_children() == [] else WORKERS_LEFT)
    os._exit(0)


def run(name: str, engine: str, folder: Path | None, resume: bool = True, rounds: int = ROUNDS) -> Any:
    return experiment(name, rounds=rounds, folder=folder, checkpoint_every=1 if folder else None, store_bytes=2048).run(
        ENGINES[engine](), resume=resume
    )


def stop_ten_times(name: str, engine: str, folder: Path, number: int, ended: int) -> None:
    """Start or resume a run ten times, each stopped by a signal at some moment; `ended`: its exit code then."""
    draw = random.Random(f"{name} {engine} {number}")
    stops = 0
    for attempt in range(10):
        moment = MOMENTS[attempt % len(MOMENTS)]
        process = mp.get_context("fork").Process(
            target=run_to_the_end_or_be_killed, args=(name, engine, folder, moment, draw.randint(1, 6), number)
        )
        process.start()
        process.join(60)
        assert process.exitcode in (0, ended)
        stops += process.exitcode != 0
    assert stops >= 4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["scaffold", "two_calls"])
def test_killed_ten_times_and_resumed_equals_straight(name: str, engine: str, tmp_path: Path) -> None:
    stop_ten_times(name, engine, tmp_path, signal.SIGKILL, -signal.SIGKILL)
    assert_same_history(run(name, engine, tmp_path), run(name, "sequential", None, resume=False))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["scaffold", "splitfed_v1"])
def test_a_process_group_that_is_interrupted_resumes_and_equals_straight(
    name: str, engine: str, tmp_path: Path
) -> None:
    stop_ten_times(name, engine, tmp_path, signal.SIGINT, INTERRUPTED)
    assert_same_history(run(name, engine, tmp_path), run(name, "sequential", None, resume=False))


# A worker that ends: the run goes on.

POINTS = (
    "an order came", "a message was read", "a handler ran", "a reply was written", "a reply was announced",
    "a descriptor is due", "states are asked for", "states were gathered", "a state is due",
)  # fmt: skip


def arm_workers(monkeypatch: pytest.MonkeyPatch, point: str, countdown: int) -> Any:
    """Make the workers that are forked from now on end, once among them, the n-th time that one is at this point."""
    main, left = os.getpid(), mp.get_context("fork").Value("i", countdown)

    def strike(here: str) -> None:
        if here == point and os.getpid() != main:
            with left.get_lock():
                left.value -= 1
                last = left.value == 0
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

    for owner, name, before, after in (
        (serving._Loop, "_call", "an order came", "a reply was announced"),
        (serving.View, "read", "", "a message was read"),
        (Device, "handle", "", "a handler ran"),
        (serving.Segment, "write", "", "a reply was written"),
        (serving, "send_fd", "a descriptor is due", ""),
        (Device, "commit", "states are asked for", "states were gathered"),
        (serving._Loop, "_reply", "a state is due", ""),
    ):
        monkeypatch.setattr(owner, name, watched(strike, owner, name, before, after))
    return left


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", ["scaffold", "two_calls", "splitfed_v1"])
def test_a_worker_that_ends_at_any_point_changes_no_bit(
    name: str, point: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    draw, short = random.Random(f"{name} {point}"), {"resume": False, "rounds": 3}
    straight = run(name, "sequential", None, **short)
    struck = 0
    for attempt in range(3):
        with monkeypatch.context() as patch:
            left = arm_workers(patch, point, draw.randint(1, 1 + 5 * attempt))
            history = run(name, "workers", tmp_path / str(attempt), **short)
        struck += left.value <= 0
        assert_same_history(straight, history)
        assert [row["dropped"] for row in history.rows] == [0, 0, 0]
    assert struck


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
