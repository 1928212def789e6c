"""`lilliput run`, `resume` and `evaluate`: what a run leaves, how it goes on, and what it says when it fails."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from saying import FAST, Cli, Runs

from lilliput.experiment import checkpoint
from lilliput.report.live import Lines

MACHINE = ("seconds", "examples_per_second", "process_memory_bytes")


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rounds of a run without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MACHINE} for row in lines]


def final(folder: Path) -> dict[str, Any]:
    saved = checkpoint.load(folder / "checkpoint")
    assert saved is not None
    return saved.read_server(folder / "checkpoint")


def same_bits(a: Path, b: Path) -> bool:
    x, y = final(a)["params"], final(b)["params"]
    return rows(a) == rows(b) and all(torch.equal(x[name], y[name]) for name in x)


def test_a_run_leaves_a_folder_that_says_everything(lilliput: Cli, runs: Runs) -> None:
    said = lilliput(
        "run", *FAST, "algorithm=FedProx", "fedprox.mu=0.1", "partition=dirichlet", "clients=5", "plots=true"
    )
    assert said.status == 0 and not said.err
    (folder,) = runs()
    assert folder.parts[-5:-1] == ("runs", "fedprox", "mlp", "digits-dirichlet")
    assert said.out.splitlines()[-1] == str(Path(*folder.parts[-5:]))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["algorithm"] == "fedprox" and config["fedprox"] == {"compat": None, "mu": 0.1}
    assert config["model"] == "mlp" and config["dirichlet"] == {"alpha": 0.5, "min_size": 10} and config["lr"] == 0.1
    facts = json.loads((folder / "environment.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__ and facts["hardware"]["cores"] >= 1 and facts["finished"]
    assert len(facts["data"]) == len(facts["partition"]) == 16 and len(facts["fingerprint"]) == 24
    assert [row["round"] for row in rows(folder)] == [1, 2]
    assert len((folder / "ledger.jsonl").read_text().splitlines()) == 2
    assert (folder / "checkpoint" / "manifest.json").exists()
    assert (folder / "plots" / "partition.pdf").exists() and list((folder / "plots").glob("accuracy*.pdf"))


def test_tensorboard_events_are_written_where_it_is_installed(lilliput: Cli, runs: Runs) -> None:
    pytest.importorskip("tensorboard")
    lilliput("run", *FAST, "tensorboard=true", "rounds=1")
    assert list((runs()[0] / "tb").iterdir())


def test_a_config_repeats_a_run_to_the_bit(lilliput: Cli, runs: Runs) -> None:
    lilliput("run", *FAST, "name=first", "algorithm=moon", "partition=dirichlet", "cohort=0.5", "seed=3")
    assert lilliput("run", "--plain", "--config", "runs/first/config.yaml", "name=second").status == 0
    first, second = runs()
    assert same_bits(first, second)


def test_published_keys_make_the_same_run(lilliput: Cli, runs: Runs) -> None:
    lilliput(
        "run",
        *FAST,
        "name=ours",
        "clients=20",
        "partition=dirichlet_equal",
        "partition.alpha=0.3",
        "cohort=0.2",
        "rounds=2",
    )
    published = (
        "num_clients=20",
        "dataset.distribution=noniid_dirichlet",
        "dataset.alpha=0.3",
        "client_sample_ratio=0.2",
    )
    lilliput("run", *FAST, "name=theirs", *published, "comm_round=2")
    ours, theirs = runs()
    assert same_bits(ours, theirs)


def test_a_text_run_has_clients_of_its_own(lilliput: Cli, runs: Runs) -> None:
    words = (
        "dataset=stdlib",
        "cohort=2",
        "local_steps=1",
        "rounds=1",
        "evaluate=none",
        "char_lm.hidden=16",
        "char_lm.layers=1",
    )
    assert lilliput("run", *FAST, *words).status == 0
    (folder,) = runs()
    assert folder.parts[-4:-1] == ("fedavg", "char_lm", "stdlib-natural")
    assert yaml.safe_load((folder / "config.yaml").read_text())["clients"] > 10
    assert rows(folder)[0]["tokens_per_second"] > 0


@pytest.mark.parametrize("engine", ["sequential", "workers"])
def test_an_interrupted_run_is_resumed_to_the_bit(
    lilliput: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    words = (*FAST, "rounds=4", "algorithm=scaffold", "partition=dirichlet", "checkpoint_every=1", f"engine={engine}")
    lilliput("run", *words, "name=straight")
    with monkeypatch.context() as patch:
        patch.setattr(Lines, "row", _interrupt_at(3))
        said = lilliput("run", *words, "name=broken")
    assert said.status == 130 and "lilliput resume runs/broken" in said.err
    straight, broken = tmp_path / "runs" / "straight", tmp_path / "runs" / "broken"
    assert len(rows(broken)) < 4 and "finished" not in json.loads((broken / "environment.json").read_text())
    assert lilliput("resume", "runs", "--plain").status == 0
    assert same_bits(straight, broken)
    assert "finished already" in lilliput("resume", "runs").err


def _interrupt_at(number: int) -> Callable[..., None]:
    def row(self: Lines, row: dict[str, Any]) -> None:
        if row["round"] == number:
            raise KeyboardInterrupt

    return row


def test_a_finished_run_can_be_made_longer(lilliput: Cli, tmp_path: Path) -> None:
    lilliput("run", *FAST, "name=long", "rounds=3")
    lilliput("run", *FAST, "name=short", "rounds=2")
    assert lilliput("resume", "runs/short", "rounds=3", "--plain").status == 0
    assert same_bits(tmp_path / "runs" / "long", tmp_path / "runs" / "short")
    assert "rounds: 3" in (tmp_path / "runs" / "short" / "config.yaml").read_text()


def test_another_method_cannot_go_on_with_a_run(lilliput: Cli) -> None:
    lilliput("run", *FAST, "name=a")
    said = lilliput("resume", "runs/a", "algorithm=fedprox", "rounds=3", "--plain")
    assert said.status == 2 and "another experiment" in said.err


def test_changed_data_are_told(lilliput: Cli, tmp_path: Path) -> None:
    lilliput("run", *FAST, "name=a")
    path = tmp_path / "runs" / "a" / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": "0" * 16, "finished": None}))
    said = lilliput("resume", "runs/a")
    assert said.status == 2 and "the data of runs/a is not what it was" in said.err


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (("run", "algoritm=fedavg"), "did you mean 'algorithm'"),
        (("run", "--chck"), "did you mean '--check'"),
        (("run", "-x"), "settings are written key=value"),
        (("run", "hydra.launcher.n_jobs=2"), "add -m"),
        (("run", "--check"), "add recipe="),
        (("run", "--config"), "--config needs a file"),
        (("run", "--config", "nowhere.yaml"), "no configuration file nowhere.yaml"),
        (("run", "partition=dirichlet", "clients=5000"), "choose 1 to 1438"),
        (("run", "evaluate=clients"), "set test_fraction=0.2"),
        (("run", "model=cnn", "model.hidden=many"), "cnn.hidden=many must be a whole number"),
        (("run", "model=char_lm"), "char_lm"),
        (("run", "dataset=cifar10", "cifar10.folder=nowhere"), "nowhere"),
        (("run", "partition=natural"), "no clients of its own"),
        (("run", "device=cuda:99x"), "device=cuda:99x is not one of"),
        (("run", "algorithm=mine.py:Mine"), "no file"),
        (("resume", "nowhere"), "nowhere does not exist"),
        (("resume", "."), "is no run's folder"),
        (("evaluate", "nowhere"), "nowhere does not exist"),
        (("evaluate", "model=mlp"), "weights with init=FILE"),
        (("compare", "nowhere"), "nowhere"),
        (("compare", "--fast"), "--fast"),
        (("rnu",), "did you mean 'run'"),
        (("list", "colours"), "nothing called 'colours'"),
        (("doctor", "me"), "takes no argument"),
        (("new", "model"), "lilliput new method NAME"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
def test_what_the_user_can_put_right_is_one_line(
    lilliput: Cli, runs: Runs, command: tuple[str, ...], answer: str
) -> None:
    said = lilliput(*command)
    assert said.status == 2 and answer in said.err
    assert said.err.startswith("lilliput: ") and said.err.count("\n") == 1 and "Traceback" not in said.err
    assert not runs()


def test_a_name_is_given_once(lilliput: Cli) -> None:
    lilliput("run", *FAST, "name=a")
    said = lilliput("run", *FAST, "name=a")
    assert said.status == 2 and "lilliput resume runs/a" in said.err


def test_a_run_under_way_is_left_alone(lilliput: Cli, tmp_path: Path) -> None:
    from lilliput.cli.folder import held

    lilliput("run", *FAST, "name=a")
    with held(tmp_path / "runs" / "a"):
        said = lilliput("resume", "runs/a", "rounds=3")
    assert said.status == 2 and "another process" in said.err


def test_a_damaged_checkpoint_is_named(lilliput: Cli, tmp_path: Path) -> None:
    lilliput("run", *FAST, "name=a")
    for file in (tmp_path / "runs" / "a" / "checkpoint").glob("*-server.safetensors"):
        file.write_bytes(file.read_bytes()[:-8] + b"\xff" * 8)
    said = lilliput("resume", "runs/a", "rounds=3", "--plain")
    assert said.status == 2 and "server.safetensors" in said.err and said.err.count("\n") == 1
    (tmp_path / "runs" / "a" / "config.yaml").write_text("[")
    assert "runs/a/config.yaml" in lilliput("resume", "runs/a").err


def test_a_full_disk_is_one_line_and_what_was_done_stays(
    lilliput: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, saved: dict[str, Any], *rest: Any) -> float:
        if saved["round"] > 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        return original(folder, saved, *rest)

    original = checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        said = lilliput("run", *FAST, "name=a", "checkpoint_every=1")
    assert said.status == 2 and "the disk is full" in said.err and "lilliput resume runs/a" in said.err
    assert lilliput("resume", "runs/a", "--plain").status == 0
    lilliput("run", *FAST, "name=b")
    assert same_bits(tmp_path / "runs" / "a", tmp_path / "runs" / "b")


def test_a_run_that_never_began_leaves_nothing(lilliput: Cli, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text("def loss(logits, labels):\n    raise RuntimeError('no loss today')\n")
    said = lilliput("run", *FAST, "loss=failing.py:loss")
    assert said.status != 0 and said.err.count("\n") == 1
    assert not list(tmp_path.rglob("config.yaml")) and not list((tmp_path / "runs").glob("*"))


def test_debug_shows_the_traceback(lilliput: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_DEBUG", "1")
    said = lilliput("run", "algoritm=fedavg")
    assert said.status == 2 and "Traceback" in said.err


def test_a_setting_without_effect_is_remarked(lilliput: Cli) -> None:
    said = lilliput("run", *FAST, "rounds=1", "fedprox.mu=0.5")
    assert said.status == 0 and said.err == "lilliput: note: fedprox.mu does nothing here: algorithm is fedavg\n"


def test_what_the_data_leave_without_effect_is_remarked_when_they_have_chosen(lilliput: Cli) -> None:
    words = [word for word in FAST if not word.startswith("model=")]
    said = lilliput("run", *words, "rounds=1", "mlp.hidden=[16]", "cnn.hidden=8")
    assert said.status == 0 and said.err == "lilliput: note: cnn.hidden does nothing here: model is mlp\n"


def test_settings_are_shown_without_running(lilliput: Cli, runs: Runs) -> None:
    said = lilliput("run", "--cfg", "lr=0.5")
    assert yaml.safe_load(said.out)["lr"] == 0.5 and not runs()


def test_initial_weights_are_taken_from_a_file(lilliput: Cli, tmp_path: Path) -> None:
    from lilliput import models

    torch.manual_seed(1)
    model = models.build("mlp", shape=(1, 8, 8), classes=10)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert lilliput("run", *FAST, "init=w.pt", "local_epochs=0", "rounds=1", "name=a").status == 0
    state = final(tmp_path / "runs" / "a")["params"]
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters())
    assert "accuracy" in lilliput("evaluate", "model=mlp", "init=w.pt").out


@pytest.mark.parametrize("algorithm", ["fedavg", "fsl_sage"])
def test_a_run_starts_from_the_weights_of_another(lilliput: Cli, tmp_path: Path, algorithm: str) -> None:
    """From its folder, which is its last round, or from its best one; an auxiliary head is no part of the model."""
    assert lilliput("run", *FAST, f"algorithm={algorithm}", "name=a", "rounds=3").status == 0
    trained = final(tmp_path / "runs" / "a")["params"]
    for name, init in (("b", "runs/a"), ("c", "runs/a/best.safetensors")):
        said = lilliput("run", *FAST, f"init={init}", "local_epochs=0", "rounds=1", f"name={name}")
        assert said.status == 0, said.err
        rows_of = [rows(tmp_path / "runs" / run) for run in ("a", name)]
        best = max(row["accuracy"] for row in rows_of[0])
        assert rows_of[1][-1]["accuracy"] == (rows_of[0][-1]["accuracy"] if name == "b" else best)
    state = final(tmp_path / "runs" / "b")["params"]
    assert all(torch.equal(x, trained[n]) for n, x in state.items())
    assert lilliput("run", *FAST, "init=.", "name=d").status == 2


def test_evaluate_scores_the_last_and_the_best_model(lilliput: Cli, tmp_path: Path) -> None:
    lilliput("run", *FAST, "name=a", "rounds=3")
    last = rows(tmp_path / "runs" / "a")[-1]["accuracy"]
    best = max(row["accuracy"] for row in rows(tmp_path / "runs" / "a"))
    assert f"accuracy {100 * last:.1f} %" in lilliput("evaluate", "runs/a").out
    assert f"accuracy {100 * best:.1f} %" in lilliput("evaluate", "runs/a", "--best").out


def test_models_data_partitions_and_losses_of_a_users_own(lilliput: Cli, tmp_path: Path, runs: Runs) -> None:
    (tmp_path / "own.py").write_text(OWN)
    words = ("model=own.py:Net", "net.width=7", "dataset=own.py:squares", "squares.count=90", "loss=own.py:smooth")
    words += (
        "smooth.amount=0.2",
        "partition=own.py:halves",
        "clients=2",
        "optimizer=torch.optim:RMSprop",
        "rmsprop.alpha=0.9",
    )
    assert lilliput("run", *FAST, *words, "lr=0.01").status == 0
    (folder,) = runs()
    assert folder.parts[-4:-1] == ("fedavg", "net", "squares-halves")
    assert final(folder)["params"]["0.weight"].shape == (7, 4)
    assert json.loads((folder / "environment.json").read_text())["sources"].keys() == {
        "model", "dataset", "loss", "partition", "optimizer",
    }  # fmt: skip
    assert lilliput("resume", str(folder), "rounds=3", "--plain").status == 0


OWN = """
import torch
from lilliput.data import Dataset


class Net(torch.nn.Sequential):
    def __init__(self, shape, classes, width=3):
        super().__init__(torch.nn.Linear(shape[0], width), torch.nn.ReLU(), torch.nn.Linear(width, classes))


def squares(count=50):
    x = torch.arange(4 * count).view(count, 4).float() / count
    return Dataset("squares", (x, torch.arange(count) % 3), (x[:9], torch.arange(9) % 3), classes=3)


def smooth(logits, labels, amount=0.1):
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=amount)


def halves(dataset, clients, seed):
    n = len(dataset.train[0])
    return {0: range(n // 2), 1: range(n // 2, n)}
"""
