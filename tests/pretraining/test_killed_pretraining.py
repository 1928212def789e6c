"""Killed without warning at any step, a run is resumed and ends with the bits that it would have had."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small import text, typed, without_clock

from lilliput.cli import main
from lilliput.pretraining import saved

pytest.importorskip("transformers")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}


# What torchrun would set, but for the meeting, which needs no port here.
PROCESS = """
import sys, torch.distributed as dist
from lilliput.cli import main
meeting, rank, world, *words = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(world))
sys.exit(main(words))
"""


def start(folder: Path, words: list[str], processes: int = 1) -> list[subprocess.Popen]:
    """Start a command, by itself or as one of several processes."""
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    programs = [["-m", "lilliput"]]
    if processes > 1:
        programs = [["-c", PROCESS, str(meeting), str(rank), str(processes)] for rank in range(processes)]
    return [
        subprocess.Popen(
            [sys.executable, *program, *words], cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for program in programs
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors.decode()


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def everything(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The losses of a run, and the bits of its weights and optimizer."""
    checkpoint = saved.load(folder / "checkpoint")
    assert checkpoint is not None
    bodies = {"model": checkpoint.read(checkpoint.model), "optimizer": checkpoint.read(checkpoint.optimizer)}
    return without_clock(rows(folder)), bodies


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def kill(started: list[subprocess.Popen], metrics: Path, lines: int) -> None:
    """Kill processes without warning when so many lines are written; they must not have ended by themselves."""
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert all(process.poll() is None for process in started), "ended by itself"
        time.sleep(0.002)
    for process in started:
        process.send_signal(signal.SIGKILL)
    for process in started:
        process.communicate()


def compare(folder: Path, steps: int) -> None:
    a, b = (everything(folder / "runs" / name) for name in ("straight", "killed"))
    assert a[0] == b[0] and len(a[0]) == steps
    assert equal(a[1], b[1])


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"rank": 4, "update_proj_gap": 3}
    settings = {"optimizer": "galore_adamw", "optimizer_options": options, "steps": 40, "tensorboard": False}
    words = ["pretrain", "--plain", *typed(data=text(tmp_path), **settings)]
    started = start(tmp_path, [*words, "name=killed"])
    assert main([*words, "name=straight"]) == 0
    kill(started, tmp_path / "runs" / "killed" / "metrics.jsonl", lines=random.randint(2, 12))
    assert main(["resume", "runs/killed", "--plain"]) == 0
    compare(tmp_path, 40)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("packing", [True, False])
def test_two_killed_processes_end_with_the_bits_of_two_that_were_not(
    tmp_path: Path, parallel: str, packing: bool
) -> None:
    settings = {"optimizer": "online_subspace_adamw", "optimizer_options": {"rank": 4}, "steps": 25, "packing": packing}
    words = ["pretrain", "--plain", *typed(data=text(tmp_path), tensorboard=False, parallel=parallel, **settings)]
    killed = start(tmp_path, [*words, "name=killed"], 2)
    kill(killed, tmp_path / "runs" / "killed" / "metrics.jsonl", lines=8)
    finish(start(tmp_path, [*words, "name=straight"], 2))
    finish(start(tmp_path, ["resume", "runs/killed", "--plain"], 2))
    compare(tmp_path, 25)
