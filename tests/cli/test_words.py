"""What the command line says of itself: help, lists, doctor; and `compare`, tested in full with the reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from saying import FAST, Cli, Runs

from lilliput.cli import COMMANDS
from lilliput.cli.facts import FILE, read
from lilliput.cli.help import GROUPS
from lilliput.config.axes import AXES, PROFILE, Axis, Choice
from lilliput.config.fields import summary
from lilliput.config.shared import top
from lilliput.recipes import RECIPES


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(lilliput: Cli, command: str) -> None:
    said = lilliput(command, "--help")
    assert said.status == 0 and said.out.startswith("usage: lilliput " + command) and not said.err
    assert command in lilliput("--help").out


def test_the_file_that_help_reads_says_what_the_code_says() -> None:
    """After a change of names, settings or their words: `python -m lilliput.cli.facts`."""
    assert json.loads(FILE.read_text(encoding="utf-8")) == read()


@pytest.mark.parametrize(
    "words",
    ["", "--help", "list", "list codecs recipes", "list --help", "run --help", "run --help fedprox", "run --help cut",
     "run -h engine", "run --help batch_size", "evaluate --help", "resume --help", "new --help", "compare --help",
     "memory --help"],
)  # fmt: skip
def test_help_and_lists_do_not_wait_for_torch(words: str) -> None:
    code = (
        "import sys; from lilliput.cli import main; "
        f"assert main({words.split()}) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_the_help_of_run_tells_every_setting_with_its_default(lilliput: Cli) -> None:
    said = lilliput("run", "--help").out
    for name in top():
        assert f"  {name}=" in said, name
    assert "  lr=0.1  " in said and "lilliput run --help NAME" in said
    grouped = [key for keys in GROUPS.values() for key in keys]
    assert sorted(grouped) == sorted([*top(), PROFILE, "lora", "cut"])


def test_every_name_has_help_and_a_line_in_the_list(lilliput: Cli) -> None:
    listed = lilliput("list").out
    for axis in AXES.values():
        for choice in axis.nodes():
            said = lilliput("run", "--help", choice.name).out
            assert f"{axis.key}={choice.name}: " in said
            assert all(f"{choice.name}.{name}=" in said for name in choice_fields(axis, choice)), choice.name
            assert f"\n  {choice.name} " in listed or f"\n  {choice.name}\n" in listed
    assert all(name in listed for name in RECIPES)


@pytest.mark.parametrize("axis", AXES.values(), ids=lambda axis: axis.key)
def test_no_two_names_are_said_to_be_the_same(axis: Axis) -> None:
    lines = [summary(choice.target) for choice in axis.nodes()]
    assert len(set(lines)) == len(lines) and all(lines)


def choice_fields(axis: Axis, choice: Choice) -> list[str]:
    from lilliput.config.shared import training

    return [name for name in axis.fields(choice.target) if axis.key != "algorithm" or name not in training()]


def test_help_on_a_node_says_what_its_fields_mean(lilliput: Cli) -> None:
    said = lilliput("run", "--help", "FedProx").out
    assert "fedprox.mu=0.01" in said and "strength of the pull" in said
    assert "did you mean 'fedprox'" in lilliput("run", "--help", "fedprx").err
    assert "fedavg" in lilliput("run", "--help", "algorithm").out
    assert "learning rate" in lilliput("run", "--help", "lr").out
    assert "device_profile.up_bps" in lilliput("run", "--help", "device_profile").out


def test_help_on_a_method_of_a_users_own(lilliput: Cli) -> None:
    lilliput("new", "method", "OwnMethod")
    assert "own_method.beta=0.5" in lilliput("run", "--help", "own_method.py:OwnMethod").out


def test_lists_can_be_asked_for_one_by_one(lilliput: Cli) -> None:
    assert lilliput("list", "codecs").out.split()[:2] == ["codecs", "none"]
    assert lilliput("list", "methods").out == lilliput("list", "algorithm").out
    assert "partitions" in lilliput("list", "partition", "engines").out
    assert "recipes --markdown" in lilliput("list", "--markdown").err


def test_doctor_names_what_is_missing(lilliput: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from lilliput.cli import doctor

    said = lilliput("doctor").out
    for word in ("lilliput", "torch", "cores", "GB free", "workers", "devices"):
        assert word in said
    monkeypatch.setattr(doctor, "extras", lambda: {"run": ["hydra-core", "no-such-package"], "dev": ["pytest"]})
    said = lilliput("doctor").out
    assert "[run]      no no-such-package; pip install 'lilliput[run]'" in said and "[dev]      complete" in said


def test_compare_prints_tables_and_draws_figures(lilliput: Cli, runs: Runs, tmp_path: Path) -> None:
    for seed in (0, 1):
        for method in ("fedavg", "fedprox"):
            lilliput("run", *FAST, f"seed={seed}", f"algorithm={method}")
    table = lilliput("compare", "runs").out
    assert "fedavg" in table and "fedprox" in table and "2 seeds" in table
    assert r"\toprule" in lilliput("compare", "runs", "--latex").out
    assert len(lilliput("compare", "runs", "--csv").out.splitlines()) == 3
    said = lilliput("compare", "runs", "--by", "algorithm", "--figures", "figures", "--csv", "numbers.csv")
    assert said.status == 0 and (tmp_path / "numbers.csv").exists() and list((tmp_path / "figures").glob("*.pdf"))


DATA = """
import torch
from lilliput.data import Dataset

def noise():
    x, y = torch.arange(160.0).view(20, 8), torch.arange(20) % 2
    return Dataset("noise", (x, y), (x, y), classes=2)
"""


def test_compare_refuses_other_data(lilliput: Cli, tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(DATA)
    for dataset in ("digits", "noisy.py:noise"):
        assert lilliput("run", *FAST, "rounds=1", "clients=2", f"dataset={dataset}").status == 0
    said = lilliput("compare", "runs")
    assert said.status == 2 and "compare runs on the same data" in said.err
