"""`lilliput memory` on the command line."""

import pytest

from lilliput.cli import main
from lilliput.config.fields import fields_of
from lilliput.footprint import Setting

pytest.importorskip("transformers")
pytest.importorskip("rich")

SMALL = ["model=llama_9m", "model.layers=2", "model.hidden=64", "model.mlp=160", "model.vocabulary=500", "length=32"]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def test_ways_to_train_stand_beside_the_chosen_one(capsys):
    assert main(["memory", *SMALL, "optimizer=galore_adamw8bit", "rank=16", "batch=2", "gpu=5MB"]) == 0
    out = capsys.readouterr().out
    for word in (
        "galore_adamw8bit",
        "AdamW",
        "8-bit AdamW",
        "LoRA",
        "GaLore",
        "Online Subspace",
        "certified by a step",
    ):
        assert word in out
    for kind in ("weights", "gradients", "states", "projections", "activations", "update", "total", "peak", "█"):
        assert kind in out
    assert "it fits, with" in out and "not counted:" in out


def test_too_little_memory_comes_with_a_remedy(capsys):
    assert main(["memory", *SMALL, "lean=false", "gpu=9MB", "certify=false"]) == 0
    out = capsys.readouterr().out
    assert "by formulas" in out and "too few;" in out and "would make it fit" in out


def test_the_published_scripts_words_are_understood(capsys):
    assert main(["memory", *SMALL, "optimizer=galore_adamw_per_layer", "rank=16", "certify=false"]) == 0
    assert "per_layer" in capsys.readouterr().out


def test_bars_are_drawn_into_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["memory", *SMALL, "certify=false", "gpu=100MB", "--figure", str(tmp_path / "bars")]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"bars.pdf", "bars.png"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["modle=llama_9m"], "there is no setting 'modle'; did you mean 'model'?"),
        (["--figures"], "there is no flag '--figures'"),
        (["--figure"], "--figure needs a file"),
        (["gpu=big"], "'big' is no size"),
        (["optimizer=galore"], "unknown optimizer 'galore'"),
        (["model=no/such/folder"], "no/such/folder"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(words, told, capsys):
    assert main(["memory", *words]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_help_lists_every_setting(capsys):
    assert main(["memory", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name}=" in out for name in [*fields_of(Setting), "gpu", "certify"])
    assert "checkpointing=false   recompute" in out
