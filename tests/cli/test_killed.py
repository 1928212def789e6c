"""Killed without warning, again and again, a run is resumed from the command line and ends as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from saying import Cli

from lilliput.experiment import checkpoint

ROUNDS = 40
WORDS = (
    "--plain",
    f"rounds={ROUNDS}",
    "plots=false",
    "tensorboard=false",
    "algorithm=scaffold",
    "cohort=3",
    "model=mlp",
)


@pytest.mark.parametrize("engine", ["sequential", "workers"])
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(
    lilliput: Cli, tmp_path: Path, engine: str, kills: int
) -> None:
    words = (*WORDS, f"engine={engine}", "partition=dirichlet")
    assert lilliput("run", *words, "name=straight").status == 0
    draw = random.Random(kills)
    command = ("run", *words, "name=killed")
    died = 0
    for kill in range(1, kills + 1):
        died += run_until_killed(tmp_path, command, done=kill * ROUNDS // (kills + 2), wait=draw.uniform(0, 0.05))
        command = ("resume", "runs/killed", "--plain")
    assert died
    assert lilliput(*command).status == 0
    straight, killed = (end(tmp_path / "runs" / name) for name in ("straight", "killed"))
    assert straight.keys() == killed.keys() and all(torch.equal(straight[name], killed[name]) for name in straight)
    assert len((tmp_path / "runs" / "killed" / "metrics.jsonl").read_text().splitlines()) == ROUNDS


def run_until_killed(folder: Path, command: tuple[str, ...], done: int, wait: float) -> bool:
    """Start a command and kill it, and what it started, a moment after so many rounds; whether it died of that."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lilliput", *command], cwd=folder, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    metrics = folder / "runs" / "killed" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < done):
        time.sleep(0.005)
    time.sleep(wait)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return process.returncode != 0


def end(folder: Path) -> dict[str, torch.Tensor]:
    """The server's last parameters and control variates."""
    saved = checkpoint.load(folder / "checkpoint")
    assert saved is not None and saved.round == ROUNDS
    state = saved.read_server(folder / "checkpoint")
    return {f"{kind}/{name}": x for kind in ("params", "control") for name, x in state[kind].items()}
