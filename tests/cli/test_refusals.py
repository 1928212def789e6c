"""A command that refuses changes no byte: names, contents and times of a folder are what they were before it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saying import FAST, Cli

from folders import opened_for_writing, snapshot
from lilliput.cli import main
from lilliput.report.live import Lines

sys.path.append(str(Path(__file__).parents[1] / "pretraining"))
from small import text, typed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every sort: finished, interrupted under a cosine, pre-training, and some that are damaged."""
    folder = tmp_path_factory.mktemp("refusals")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["run", *FAST, "name=done", "seed=1"]) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Lines, "row", interrupt)
            words = ("rounds=4", "schedule=cosine", "checkpoint_every=1", "evaluate=none")
            assert main(["run", *FAST, "name=stopped", *words]) == 130
        _pretrained(folder)
        torch.save({"w": torch.ones(2)}, "foreign.pt")
        damages: dict[str, Callable[[Path], None]] = {
            "bitten": _flip_server, "lacking": _drop_a_round, "garbled": _garble("metrics.jsonl"),
            "ledgerless": _garble("ledger.jsonl"), "forged": _forge, "unreadable": _write("config.yaml", "["),
            "moved": _other_data, "old": _write("checkpoint/manifest.json", _OLD), "begun": _no_checkpoint,
        }  # fmt: skip
        for name, damage in damages.items():
            shutil.copytree("runs/done", f"hurt/{name}")
            damage(folder / "hurt" / name)
    finally:
        os.chdir(before)
    return folder


_OLD = json.dumps({"format": "lilliput-checkpoint", "version": 1, "round": 2})


def interrupt(self: Lines, row: dict[str, Any]) -> None:
    if row["round"] == 3:
        raise KeyboardInterrupt


def _pretrained(folder: Path) -> None:
    pytest.importorskip("transformers")
    words = typed(data=text(folder), tensorboard=False, steps=4, warmup=1)
    assert main(["pretrain", "--plain", *words, "name=pre"]) == 0


def _flip_server(run: Path) -> None:
    (file,) = (run / "checkpoint").glob("*server*")
    file.write_bytes(file.read_bytes()[:-8] + b"\xff" * 8)


def _drop_a_round(run: Path) -> None:
    log = run / "metrics.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[1])


def _garble(name: str) -> Callable[[Path], None]:
    def garble(run: Path) -> None:
        first, rest = (run / name).read_text().split("\n", 1)
        (run / name).write_text(f"{first[:-5]}\n{rest}")

    return garble


def _forge(run: Path) -> None:
    file = run / "checkpoint" / "manifest.json"
    file.write_text(file.read_text().replace('"round": 2', '"round": 1'))


def _write(name: str, content: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(content) and None


def _other_data(run: Path) -> None:
    file = run / "environment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "data": "0" * 16}))


def _no_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoint")


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of these runs, and the folder that commands work in."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"


TINY = ("model=llama_9m", "steps=4", "data=text.jsonl")
REFUSED = [
    ("run name=done", "runs/done exists; go on with `lilliput resume runs/done`"),
    ("run name=fresh algoritm=fedavg", "did you mean"),
    ("run name=fresh lr=-1", "lr is -1"),
    ("run name=fresh partition=dirichlet clients=5000", "choose 1 to 1438"),
    ("run name=fresh evaluate=clients", "test_fraction"),
    ("run name=fresh init=foreign.pt", "foreign.pt"),
    ("run name=fresh init=nowhere.pt", "no such file"),
    ("run folder=elsewhere/deep model=char_lm", "char_lm"),
    ("run folder=elsewhere/deep algorithm=splitfed_v2 cut.at=nowhere", "nowhere"),
    ("run folder=elsewhere/deep algorithm=fedsub fedsub.rank=5000", "5000"),
    ("run folder=elsewhere/deep device_profile.memory_bytes=10", "fewer than the quorum"),
    ("run folder=elsewhere optimizer=adam momentum=0.9", "momentum is SGD's"),
    ("run -m folder=elsewhere optimizer=sgd,adam momentum=0.9", "momentum is SGD's"),
    ("run folder=foreign.pt", "foreign.pt"),
    ("run -m name=fresh lr=0.1,-1", "lr is -1"),
    ("run -m name=fresh lr=0.1 algoritm=fedavg,fedprox", "algorit"),
    ("run -m folder=elsewhere lr=0.1,0.2 model=char_lm", "2 failed"),
    ("resume runs/done lr=0.5", "lr=0.5 instead of 0.1"),
    ("resume runs/stopped lr=0.5 engine=sequential", "lr=0.5 instead of 0.1"),
    ("resume runs/stopped batch_size=16", "batch_size=16 instead of 32"),
    ("resume runs/stopped seed=7 batch_size=16", "batch_size=16 instead of 32, seed=7 instead of 0"),
    ("resume runs/stopped algorithm=fedprox", "algorithm=fedprox instead of fedavg"),
    ("resume runs/stopped optimizer=adam", "optimizer=adam instead of sgd"),
    ("resume runs/stopped model=cnn", "model=cnn instead of mlp"),
    ("resume runs/stopped mlp.hidden=[9]", "mlp.hidden=[9] instead of"),
    ("resume runs/stopped partition=dirichlet", "partition=dirichlet"),
    ("resume runs/stopped augment=null device_profile.availability=0.5", "augment"),
    ("resume runs/stopped rounds=8", "its learning rate would jump"),
    ("resume runs/stopped rounds=1", "has done 2 rounds, more than rounds=1"),
    ("resume runs/done rounds=1", "has done 2 rounds, more than rounds=1"),
    ("resume runs/stopped rounds=0", "rounds=0 must be at least 1"),
    ("resume runs/stopped target=fast", "target"),
    ("resume runs/stopped loss=nowhere.py:loss", "nowhere.py"),
    ("resume runs/stopped --fast", "there is no setting 'fast'"),
    ("resume runs/stopped runs/done lr=0.5", "lr=0.5"),
    ("resume nowhere", "does not exist"),
    ("resume runs lr=0.5", "lr=0.5 instead of 0.1"),
    ("resume runs/pre model.hidden=32", "model_options.hidden is 16, not 32"),
    ("resume runs/pre steps=2 warmup=0", "has done 4 steps"),
    ("resume runs/pre lr=-1", "lr is -1"),
    ("resume runs/pre optimizer=galore_adamw optimizer.rank=4", "its optimizer is 'adamw', not 'galore_adamw'"),
    *((f"resume hurt/{name} rounds=3", told) for name, told in (
        ("bitten", "server.safetensors"), ("lacking", "line 1 is of round 2, after round 0"),
        ("garbled", "line 1 is damaged"), ("ledgerless", "ledger.jsonl: line 1 is damaged"), ("forged", "is damaged"),
        ("unreadable", "config.yaml"), ("moved", "the data of hurt/moved is not what it was"), ("old", "version 1"),
    )),
    ("evaluate runs/stopped --best", "no best model"),
    ("evaluate runs/done --fast", "there is no setting 'fast'"),
    ("evaluate runs/done lr=-1", "lr is -1"),
    ("evaluate runs/pre", "perplexity"),
    ("evaluate runs/done dataset=cifar10 cifar10.folder=nowhere", "nowhere"),
    ("evaluate model=mlp init=foreign.pt", "foreign.pt"),
    ("evaluate hurt/begun", "no checkpoint yet"),
    ("evaluate hurt/bitten", "server.safetensors"),
    ("compare nowhere", "nowhere"),
    ("compare runs/done --metric=beauty --csv=out.csv --figures=drawn", "beauty"),
    ("compare runs/done --by=colour --csv=out.csv", "colour"),
    ("compare runs/done --target=soon --csv=out.csv", "soon"),
    ("compare hurt/garbled --csv=out.csv", "line 1 is damaged"),
    ("pretrain name=done", "runs/done exists"),
    ("pretrain data=text.jsonl name=fresh lr=-1", "lr is -1"),
    ("pretrain data=text.jsonl name=fresh sptes=3", "did you mean"),
    ("pretrain data=nowhere.jsonl name=fresh", "nowhere.jsonl"),
    ("pretrain data=text.jsonl folder=elsewhere/deep memory=1MB", "1.00 MB"),
    ("pretrain data=text.jsonl folder=elsewhere/deep init=foreign.pt", "foreign.pt"),
    ("pretrain data=text.jsonl folder=elsewhere/deep continue_from=runs/done", "lilliput-checkpoint"),
    ("memory model=llama_9m colour=red", "colour"),
    ("memory model=llama_9m optimizer=galore --figure drawn", "galore"),
    ("memory --figure", "--figure needs a file"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "told"), REFUSED, ids=[command for command, _ in REFUSED])
def test_a_refused_command_changes_no_byte(place: Path, lilliput: Cli, command: str, told: str) -> None:
    first, *rest = command.split()
    fast = FAST if first == "run" and not any(word.startswith("rounds") for word in rest) else ()
    os.chdir(place)  # the fixture `lilliput` has a folder of its own
    before = snapshot(place)
    said = lilliput(first, *fast, *rest)
    assert said.status in (1, 2) and told in said.err + said.out, said
    assert snapshot(place) == before
    # Nothing goes on with what is refused: the remedy is another.
    assert "goes on with it" not in said.err


@pytest.mark.parametrize(
    "command",
    ["evaluate runs/done", "evaluate runs/done --best", "evaluate runs/stopped", "compare runs/done",
     "resume runs/done", "resume runs/done rounds=2", "resume runs/done engine=sequential",
     "compare runs/done --csv", "run --cfg lr=0.5", "run --dry", "pretrain --cfg", "list models",
     "compare hurt/begun --latex"],
)  # fmt: skip
def test_a_command_that_reads_opens_nothing_for_writing(place: Path, lilliput: Cli, command: str) -> None:
    os.chdir(place)
    with open("runs/stopped/metrics.jsonl", "a") as log:  # a round behind the checkpoint, as a crash leaves it
        log.write('{"round": 3, "loss": 1.0}\n{"rou')
    before = snapshot(place)
    with opened_for_writing() as opened:
        said = lilliput(*command.split())
    assert said.status == 0, said
    assert snapshot(place) == before and not [path for path in opened if str(place) in os.path.abspath(path)]


VALUES: dict[str, Any] = {
    "lr": [0.1, 0.5, -1], "batch_size": [16, 32, 0], "rounds": [1, 2, 3, 4, 8], "seed": [0, 1], "momentum": [0.0, 0.9],
    "schedule": ["constant", "cosine", "steps"], "optimizer": ["sgd", "adam"], "local_epochs": [1, 2],
    "local_steps": ["null", 2], "clip": ["null", 1.0], "engine": ["sequential", "dry", "fast"], "cohort": [1, 5, 50],
    "loss": ["cross_entropy", "none.py:loss"], "model": ["mlp", "cnn"], "evaluate": ["none", "server", "clients"],
    "quorum": [0.5, 2], "target": ["null", 0.01, "x"], "codec": ["bf16", "null", "gzip"], "clients": [10, 9],
    "test_fraction": [0.0, 0.2], "buffers": ["local", "average"], "nesterov": ["true", "false"], "colour": ["red"],
}  # fmt: skip
drawn = st.dictionaries(st.sampled_from(sorted(VALUES)), st.integers(0, 9), min_size=1, max_size=3).map(
    lambda chosen: [f"{key}={VALUES[key][i % len(VALUES[key])]}" for key, i in chosen.items()]
)


@given(run=st.sampled_from(["resume runs/done", "resume runs/stopped", "evaluate runs/stopped"]), words=drawn)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_drawn_change_is_taken_or_leaves_every_byte(
    made: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch, run: str, words: list[str]
) -> None:
    place = tmp_path_factory.mktemp("drawn")
    shutil.copytree(made / "runs", place / "runs")
    monkeypatch.chdir(place)
    before = snapshot(place)
    status = main([*run.split(), *words])
    if status or run.startswith("evaluate"):
        assert snapshot(place) == before, words


def test_an_optimizer_that_cannot_be_made_is_refused_before_data_or_folders(
    lilliput: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[str] = []
    monkeypatch.setattr("lilliput.config.build.load", lambda s: touched.append("data"))
    monkeypatch.setattr("lilliput.cli.folder.make", lambda s: touched.append("folder"))
    said = lilliput("run", *FAST, "optimizer=adam", "momentum=0.9")
    assert said.status == 2 and "momentum is SGD's" in said.err and not touched


@pytest.mark.parametrize("existed", [False, True], ids=["new", "empty"])
def test_a_failed_first_round_leaves_the_folders_that_there_were(tmp_path: Path, lilliput: Cli, existed: bool) -> None:
    if existed:
        (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "failing.py").write_text("def loss(logits, labels):\n    raise RuntimeError('no loss today')\n")
    before = {path for path in tmp_path.rglob("*")}
    said = lilliput("run", *FAST, "loss=failing.py:loss", "name=mine")
    assert said.status != 0 and "goes on with it" not in said.err
    assert {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts} == before


def test_runs_below_a_folder_go_on_and_finished_and_longer_ones_are_left_alone(place: Path, lilliput: Cli) -> None:
    os.chdir(place)
    finished = {name: snapshot(place / "runs" / name) for name in ("done", "pre", "stopped")}
    said = lilliput("resume", "runs", "rounds=3", "--plain")
    assert said.status == 0 and "runs/stopped: planned for longer than that, left as it is" in said.err
    assert {name: snapshot(place / "runs" / name) for name in finished} == finished
