"""Split methods from the command line: cut by name, by number and by budget, resumed, evaluated and compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from saying import FAST, Cli, Runs

TINY = [*FAST, "local_steps=2", "cohort=2"]


def ledger(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def sent(folder: Path, kind: str) -> int:
    return sum(call[way].get(kind, 0) for line in ledger(folder) for call in line["calls"] for way in ("up", "down"))


@pytest.mark.parametrize("method", ["splitfed_v1", "sl_single_server", "cse_fsl", "FSL-SAGE"])
def test_a_split_run_is_cut_resumed_evaluated_and_compared(lilliput: Cli, runs: Runs, method: str) -> None:
    assert lilliput("run", *TINY, f"algorithm={method}", "rounds=1", "codec=int8:activations+bf16").status == 0
    (folder,) = runs()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"] == "mlp" and config["cut"]["at"] == "hidden.1"
    assert sent(folder, "cut") and sent(folder, "labels") and sent(folder, "codec.int8")
    again = lilliput("resume", str(folder), "rounds=2")
    assert again.status == 0 and len(ledger(folder)) == 2
    score = lilliput("evaluate", str(folder)).out
    assert score.splitlines()[-1].startswith("accuracy ")
    assert lilliput("run", *TINY, "rounds=2", "name=other").status == 0
    table = lilliput("compare", "runs").out
    assert config["algorithm"] in table and "fedavg" in table


def test_a_cut_is_a_name_a_number_of_blocks_or_a_budget(lilliput: Cli, runs: Runs) -> None:
    small = ["model=resnet20", "resnet20.width=4", "algorithm=splitfed_v1", "rounds=1", "evaluate=none"]
    for number, cut in enumerate(("cut=layer2", "cut=3", "cut.memory=300KB", "cut.bytes_per_round=1MB")):
        assert lilliput("run", *TINY, *small, cut, f"name={number}").status == 0, cut
    sizes = [sent(folder, "params") for folder in runs()]
    assert sizes[0] == sizes[1] > 0 and len(set(sizes)) > 1  # three blocks are the first stage


def test_the_published_cut_is_the_default(lilliput: Cli, runs: Runs) -> None:
    lilliput("run", *TINY, "algorithm=splitfed_v2", "model=resnet18", "resnet18.width=4", "rounds=1", "evaluate=none")
    config = yaml.safe_load((runs()[0] / "config.yaml").read_text())
    assert config["cut"]["at"] == "layer3"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("model=resnet20 resnet20.width=4 cut=layr2", "did you mean 'layer2'"),
        ("model=resnet20 resnet20.width=4 cut=layer2.0.conv2", "layer2.0.conv2"),
        ("cut=hidden.0", "hidden.0"),
        ("cut=hidden.1 cut.memory=1MB", "cut.at and cut.memory are several ways to cut; choose one"),
        ("cut.memory=much", "'much' is no size"),
        ("cut.memory=1KB", "cut"),
        ("fsl_sage.align_interval=0", "at least 1"),
        ("server_update_interval=0", "at least 1"),
        ("fsl_sage.memory_size=3", "memory_size"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_anything_trains(
    lilliput: Cli, runs: Runs, words: str, answer: str
) -> None:
    said = lilliput("run", *TINY, "algorithm=fsl_sage", *words.split())
    assert said.status == 2 and answer in said.err and said.err.count("\n") == 1
    assert not runs()


def test_weights_to_start_from_are_those_of_the_whole_model(lilliput: Cli, runs: Runs, tmp_path: Path) -> None:
    import torch

    from lilliput import models

    weights = models.build("mlp", shape=(1, 8, 8), classes=10).state_dict()
    torch.save(weights, tmp_path / "w.pt")
    whole = lilliput("evaluate", "model=mlp", f"init={tmp_path / 'w.pt'}").out
    cut = lilliput("evaluate", "model=mlp", "algorithm=splitfed_v1", f"init={tmp_path / 'w.pt'}").out
    assert whole == cut


def test_a_sweep_over_cuts(lilliput: Cli, runs: Runs) -> None:
    pytest.importorskip("hydra")
    said = lilliput("run", "-m", *TINY, "algorithm=splitfed_v1", "cut=hidden.1,out", "rounds=1", "evaluate=none")
    assert said.status == 0 and said.out.splitlines()[-1] == "2 ran"
    assert len({sent(folder, "params") for folder in runs()}) == 2
