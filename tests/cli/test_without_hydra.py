"""Without Hydra, matplotlib and TensorBoard everything but sweeps works; a single run loads none of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
EXTRAS = ("hydra", "hydra_zen", "matplotlib", "tensorboard", "wandb")
HEAVY = (*EXTRAS, "sklearn", "datasets", "torchvision", "pandas")


def python(code: str, folder: Path, blocked: tuple[str, ...] = EXTRAS) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = BLOCK.format(blocked=blocked) + code
    return subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_run_a_config_and_python_need_no_hydra(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("rounds: 1\nclients: 3\n")
    done = python(
        "from lilliput.cli import main\n"
        "assert main(['run', '--plain', '--config', 'c.yaml', 'name=a']) == 0\n"
        "assert main(['resume', 'runs/a', 'rounds=2', '--plain']) == 0\n"
        "assert main(['list']) == main(['doctor']) == main(['run', '--help']) == 0\n"
        "import torch\n"
        "from lilliput import Experiment\n"
        "from lilliput.algorithms import FedAvg\n"
        "from lilliput.tasks import Supervised\n"
        "data = {c: [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))] for c in range(2)}\n"
        "assert len(Experiment(FedAvg(), Supervised(torch.nn.Linear(3, 2)), data, rounds=1).run().rows) == 1\n"
        "from lilliput.config import settings\n"
        "from lilliput.config.build import build\n"
        "assert build(settings({'rounds': 1, 'clients': 2})).experiment.run().rows\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "a" / "metrics.jsonl").read_text().count("\n") == 2


def test_a_sweep_without_hydra_names_the_pip_line(tmp_path: Path) -> None:
    done = python("from lilliput.cli import main\nsys.exit(main(['run', '-m', 'seed=0,1']))", tmp_path)
    assert done.returncode == 2 and "pip install 'lilliput[run]'" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["run", "--plain", "rounds=1", "tensorboard=false"], ["list"], ["--help"]], ids=str)
def test_a_single_run_loads_nothing_heavy(tmp_path: Path, words: list[str]) -> None:
    code = (
        f"from lilliput.cli import main\nassert main({words}) == 0\n"
        f"loaded = {{name.split('.')[0] for name in sys.modules}} & set({HEAVY})\nassert not loaded, loaded\n"
    )
    done = python(code, tmp_path, blocked=())
    assert done.returncode == 0, done.stderr


def test_the_entry_points_are_the_same_command(tmp_path: Path) -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="lilliput")
    assert script.value == "lilliput.cli:main"
    done = subprocess.run([sys.executable, "-m", "lilliput", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("lilliput ") and done.returncode == 0
