"""`lilliput new method NAME`: what it writes runs, and obeys the laws that it writes beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from saying import FAST, Cli, Runs

from lilliput.cli.new import names


def test_a_new_method_runs_and_passes_its_own_test(lilliput: Cli, runs: Runs, tmp_path: Path) -> None:
    said = lilliput("new", "method", "MyMethod")
    assert said.out.split() == ["my_method.py", "test_my_method.py"]
    assert 30 <= len((tmp_path / "my_method.py").read_text().splitlines()) <= 50
    environment = {**os.environ, "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_method.py"]
    done = subprocess.run(tests, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout
    assert lilliput("run", *FAST, "algorithm=my_method.py:MyMethod", "my_method.beta=0.9").status == 0
    assert runs()[0].parts[-4:-1] == ("my_method", "mlp", "digits-iid")


def test_its_test_can_fail(lilliput: Cli, tmp_path: Path) -> None:
    """A method that forgets its velocity's sign is no FedAvg any more."""
    lilliput("new", "method", "MyMethod")
    file = tmp_path / "my_method.py"
    file.write_text(file.read_text().replace('add(sums["delta"], state', 'add(state["velocity"], state'))
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_method.py"]
    done = subprocess.run(tests, cwd=tmp_path, env={**os.environ, "PYTEST_ADDOPTS": ""}, capture_output=True, text=True)
    assert done.returncode == 1 and "test_without_momentum_it_is_fedavg" in done.stdout


def test_what_it_writes_is_clean(lilliput: Cli, tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    lilliput("new", "method", "MyMethod")
    check = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length=120", str(tmp_path)]
    assert subprocess.run(check, capture_output=True).returncode == 0


@pytest.mark.parametrize("text", ["my-method", "my_method", "MyMethod", "my method"])
def test_names_are_written_as_python_writes_them(text: str) -> None:
    assert names(text) == ("my_method", "MyMethod")


@pytest.mark.parametrize(
    ("name", "answer"),
    [("3d", "cannot be the name"), ("fedprox", "a method 'fedprox' already"), ("torch", "an installed module")],
)
def test_a_name_that_cannot_be_is_refused(lilliput: Cli, tmp_path: Path, name: str, answer: str) -> None:
    said = lilliput("new", "method", name)
    assert said.status == 2 and answer in said.err and not list(tmp_path.iterdir())


def test_nothing_is_overwritten(lilliput: Cli, tmp_path: Path) -> None:
    lilliput("new", "method", "own_one", "--folder", "methods")
    said = lilliput("new", "method", "own_one", "--folder", "methods")
    assert said.status == 2 and "methods/own_one.py exists" in said.err
