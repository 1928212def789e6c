"""What users install: the wheel alone, in an empty environment, away from the source."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FEDERATED_WITHOUT_HYDRA = """
import sys, torch
sys.modules["hydra"] = sys.modules["hydra_zen"] = None  # importing them now fails
import lilliput
data = {c: [(torch.randn(4, 6), torch.randint(3, (4,)))] for c in range(3)}
task = lilliput.tasks.Supervised(torch.nn.Linear(6, 3))
history = lilliput.Experiment(lilliput.algorithms.FedAvg(), task, data, rounds=2, test=data[0]).run()
print(len(history.rows), "rounds from", lilliput.__file__)
"""


def call(*command: str | Path, cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_wheel_with_its_extra_runs_the_demo_in_an_empty_environment(tmp_path: Path) -> None:
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    call(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
    call(*install, "torch", cwd=tmp_path)
    call(*install, wheel, cwd=tmp_path)
    away = call(python, "-c", FEDERATED_WITHOUT_HYDRA, cwd=tmp_path)  # before Hydra is even there
    assert away.startswith("2 rounds from") and str(ROOT) not in away
    assert "fedprox.mu=" in call(tmp_path / "env" / "bin" / "lilliput", "run", "--help", "fedprox", cwd=tmp_path)
    call(*install, f"{wheel}[run]", cwd=tmp_path)
    table = call(tmp_path / "env" / "bin" / "lilliput", "demo", cwd=tmp_path)
    assert "FedAvg over those that can" in table
    assert (tmp_path / "demo" / "demo.png").is_file()
