"""`lilliput run -m`: combinations, what is missing of them, nodes of other methods, launchers; no trace of Hydra."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from saying import FAST, Cli, Runs

from lilliput.experiment import checkpoint
from lilliput.report.live import Lines

pytest.importorskip("hydra")


def methods(folders: list[Path]) -> list[tuple[str, float | None]]:
    """(method, its mu) of each run."""
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
    return sorted((c["algorithm"], c.get("fedprox", {}).get("mu", -1.0)) for c in configs)


def test_a_sweep_over_methods_sets_what_one_of_them_has(lilliput: Cli, runs: Runs) -> None:
    said = lilliput("run", "-m", *FAST, "algorithm=fedavg,fedprox", "fedprox.mu=0.1,0.2")
    assert said.status == 0 and not said.err
    # FedAvg has no mu: its two jobs are one run.
    assert methods(runs()) == [("fedavg", -1.0), ("fedprox", 0.1), ("fedprox", 0.2)]
    assert said.out.splitlines()[-1] == "3 ran, 1 asked for twice"


def test_a_sweep_typed_again_runs_what_is_missing(lilliput: Cli, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("-m", *FAST, "algorithm=fedavg,local_only", "checkpoint_every=1")
    lilliput("run", *words, "seed=0")
    first = {folder: (folder / "metrics.jsonl").stat().st_mtime_ns for folder in runs()}
    assert "2 ran, 2 finished before" in lilliput("run", *words, "seed=0,1").out
    assert len(runs()) == 4 and all((f / "metrics.jsonl").stat().st_mtime_ns == t for f, t in first.items())
    # One of them is broken off in its second round: it is resumed where it stopped, the others are left alone.
    victim = runs()[0]
    facts = json.loads((victim / "environment.json").read_text())
    (victim / "environment.json").write_text(json.dumps({**facts, "finished": None}))
    assert "3 finished before" in (out := lilliput("run", *words, "seed=0,1").out) and "1 resumed" in out
    assert len(runs()) == 4 and json.loads((victim / "environment.json").read_text())["finished"]


def test_an_interrupted_sweep_ends_with_the_same_bits(
    lilliput: Cli, runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def row(self: Lines, row: dict) -> None:
        if row["round"] == 2:
            raise KeyboardInterrupt

    words = ("-m", *FAST, "rounds=3", "checkpoint_every=1", "seed=0,1")
    lilliput("run", *words, "folder=whole")
    with monkeypatch.context() as patch:
        patch.setattr(Lines, "row", row)
        assert lilliput("run", *words, "folder=broken").status == 130
    assert "1 ran, 1 resumed" in lilliput("run", *words, "folder=broken").out
    ends = {name: [params(f) for f in runs() if name in f.parts] for name in ("whole", "broken")}
    assert len(ends["whole"]) == 2
    for whole, broken in zip(ends["whole"], ends["broken"], strict=True):
        assert all(torch.equal(whole[name], broken[name]) for name in whole)


def params(folder: Path) -> Any:
    saved = checkpoint.load(folder / "checkpoint")
    assert saved is not None
    return saved.read_server(folder / "checkpoint")["params"]


def test_published_keys_and_the_chosen_names_own_can_be_swept(lilliput: Cli, runs: Runs) -> None:
    words = ("partition=iid,dirichlet", "partition.alpha=0.3", "client_sample_ratio=0.2,0.5", "target=accuracy>=0.99")
    assert lilliput("run", "-m", *FAST, "rounds=1", *words).status == 0
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in runs()]
    assert sorted((c["partition"], c["cohort"]) for c in configs) == [
        ("dirichlet", 0.2), ("dirichlet", 0.5), ("iid", 0.2), ("iid", 0.5),
    ]  # fmt: skip
    assert all(c["dirichlet"]["alpha"] == 0.3 for c in configs if c["partition"] == "dirichlet")
    assert {c["target"] for c in configs} == {"accuracy>=0.99"}


def test_hydras_own_grammar_and_lists_pass_through(lilliput: Cli, runs: Runs) -> None:
    lilliput("run", "-m", *FAST, "rounds=1", "seed=range(3)", "model=mlp", "mlp.hidden=[8],[8,8]", "name=grid")
    assert len(runs()) == 6
    names = {f"seed={seed},mlp.hidden={hidden}" for seed in range(3) for hidden in ("[8]", "[8,8]")}
    assert {folder.name for folder in runs()} == names and {folder.parent.name for folder in runs()} == {"grid"}


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("algorithm=fedavg,fedprx",), "did you mean 'fedprox'"),
        (("fedprx.mu=1,2",), "no 'fedprx' to set; did you mean 'fedprox'"),
        (("algorithm=fedavg,scaffold", "fedprox.mu=0.1"), "fedprox.mu does nothing here"),
        (("partition=iid,shards", "partition.alpha=0.1"), "in any other run of the sweep"),
        (("lr=0.1,-1",), "lr is -1.0; it must be positive"),
        (("clients=10,20", "cohort=15"), "cohort=15 exceeds clients=10"),
        (("seed=0,1", "hydra/launcher=rocket"), "hydra/launcher/rocket"),
        (("seed=0,1", "hydra.nonsense=1"), "hydra.nonsense"),
        (("seed=[0,1",), "seed"),
        (("model=char_lm,mlp", "rounds=0"), "rounds=0 must be at least 1"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
def test_a_sweep_is_checked_whole_before_it_starts(
    lilliput: Cli, runs: Runs, words: tuple[str, ...], answer: str
) -> None:
    said = lilliput("run", "-m", *FAST, *words)
    assert said.status == 2 and answer in said.err and said.err.count("\n") == 1
    assert not runs()


def test_a_job_that_fails_leaves_the_others(lilliput: Cli, runs: Runs) -> None:
    said = lilliput("run", "-m", *FAST, "rounds=1", "model=char_lm,mlp")
    assert said.status == 2 and "failed: char_lm takes texts" in said.out and "1 ran, 1 failed" in said.out
    assert len(runs()) == 1


def test_hydra_leaves_no_trace(lilliput: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    lilliput("run", "-m", *FAST, "rounds=1", "seed=0,1")
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "scratch"} and not list(scratch.iterdir())
    assert Path.cwd() == tmp_path


def test_the_joblib_launcher_runs_in_processes_of_its_own(lilliput: Cli, runs: Runs) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ("-m", *FAST, "algorithm=fedavg,fedprox", "fedprox.mu=0.1,0.2")
    assert lilliput("run", *words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2").status == 0
    assert methods(runs()) == [("fedavg", -1.0), ("fedprox", 0.1), ("fedprox", 0.2)]
    assert "3 finished before" in lilliput("run", *words).out


def test_a_method_of_a_users_own_can_be_swept(lilliput: Cli, runs: Runs) -> None:
    lilliput("new", "method", "MyMethod")
    said = lilliput("run", "-m", *FAST, "rounds=1", "algorithm=fedavg,my_method.py:MyMethod", "my_method.beta=0.5,0.9")
    assert said.status == 0 and len(runs()) == 3
    assert {folder.parts[-4] for folder in runs()} == {"fedavg", "my_method"}
