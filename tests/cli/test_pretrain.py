"""`lilliput pretrain` by words: run, go on, compare, the published script's own options, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from saying import Cli, Runs

from lilliput.cli.pretrain import settings

sys.path.append(str(Path(__file__).parents[1] / "pretraining"))
from small import text, typed

pytest.importorskip("transformers")


def words(folder: Path, **more) -> list[str]:
    return ["pretrain", "--plain", *typed(data=text(folder), tensorboard=False, **more)]


def test_a_run_leaves_what_it_was_and_what_came_of_it(lilliput: Cli, runs: Runs, tmp_path: Path) -> None:
    said = lilliput(*words(tmp_path, steps=6))
    assert said.status == 0, said.err
    (folder,) = runs()
    assert folder.relative_to(tmp_path).parts[:4] == ("runs", "pretrain", "llama_9m", "text.jsonl")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5, 6] and "perplexity" in rows[-1]
    facts = json.loads((folder / "environment.json").read_text())
    assert facts["finished"] and facts["data"] and "held out" in facts["validation"]
    assert (folder / "model" / "model.safetensors").exists()
    lines = said.out.splitlines()
    assert lines[0] == "llama_9m, adamw, 6 steps" and lines[-1] == str(folder.relative_to(tmp_path))
    assert "perplexity" in lines[-2] and "tokens/s" in lines[-2]


def test_a_runs_config_repeats_it(lilliput: Cli, tmp_path: Path) -> None:
    assert lilliput(*words(tmp_path, steps=4), "name=a", "optimizer=galore_adamw", "optimizer.rank=4").status == 0
    assert lilliput("pretrain", "--plain", "--config", "runs/a/config.yaml", "name=b").status == 0
    a, b = ((tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines() for name in "ab")
    assert [json.loads(x)["train_loss"] for x in a] == [json.loads(x)["train_loss"] for x in b]


def test_evaluate_says_where_the_score_of_a_pretrained_model_is(lilliput: Cli, tmp_path: Path) -> None:
    assert lilliput(*words(tmp_path, steps=3, warmup=0), "name=a").status == 0
    said = lilliput("evaluate", "runs/a")
    assert said.status == 2 and "its perplexity is in metrics.jsonl" in said.err


def test_a_finished_run_goes_on_for_longer(lilliput: Cli, tmp_path: Path) -> None:
    assert lilliput(*words(tmp_path, steps=4), "name=a").status == 0
    said = lilliput("resume", "runs/a")
    assert said.status == 0 and "finished already" in said.err
    assert lilliput("resume", "runs/a", "steps=7", "--plain").status == 0
    rows = (tmp_path / "runs" / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["round"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert yaml.safe_load((tmp_path / "runs" / "a" / "config.yaml").read_text())["steps"] == 7


def test_a_change_that_is_refused_leaves_the_run_as_it_was(lilliput: Cli, tmp_path: Path) -> None:
    assert lilliput(*words(tmp_path, steps=4), "name=a").status == 0
    before = (tmp_path / "runs" / "a" / "config.yaml").read_text()
    said = lilliput("resume", "runs/a", "max_length=32", "steps=9")
    assert said.status == 2 and "its max_length is 16, not 32" in said.err
    assert (tmp_path / "runs" / "a" / "config.yaml").read_text() == before


def test_runs_are_compared(lilliput: Cli, tmp_path: Path) -> None:
    for seed in (0, 1):
        for optimizer in ("adamw", "lion"):
            assert lilliput(*words(tmp_path, steps=3, warmup=0, seed=seed, optimizer=optimizer)).status == 0
    said = lilliput("compare", "runs", "--metric", "perplexity")
    assert said.status == 0 and "over 2 seeds" in said.out and "optimizer lion" in said.out


def test_the_published_script_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    layer = {
        "model_config": "configs/llama_130m.json", "lr": 0.01, "galore_scale": 0.25, "rank": 256, "proj_type": "std",
        "update_proj_gap": 200, "batch_size": 64, "total_batch_size": 512, "num_training_steps": 20000,
        "warmup_steps": 2000, "weight_decay": 0, "dtype": "bfloat16", "eval_every": 1000, "grad_clipping": 0.0,
        "optimizer": "galore_adamw8bit_per_layer", "scheduler": "cosine", "activation_checkpointing": True, "beta1": 0,
        "save_dir": "checkpoints/galore", "workers": 8, "single_gpu": True, "min_lr_ratio": 0.1, "max_length": 256,
    }  # fmt: skip
    c = settings([layer])
    assert (c.model, c.batch_size, c.accumulate, c.steps, c.warmup) == ("llama_130m", 512, 4, 20000, 2000)
    assert (c.optimizer, c.per_layer, c.dtype, c.clip) == ("galore_adamw8bit", True, "bf16", None)
    assert c.optimizer_options == {"rank": 256, "scale": 0.25, "update_proj_gap": 200, "proj_type": "std"}
    assert (c.folder, c.name, c.checkpointing) == ("checkpoints", "galore", True)
    assert settings([{"batch_size": 8, "gradient_accumulation": 2}]).batch_size == 32
    assert settings([{"max_train_tokens": "1.1B", "batch_size": 512}]).total_steps == 8392
    assert settings([{"optimizer": "sgd", "beta1": 0.9}]).optimizer_options == {"momentum": 0.9}


def test_a_recipe_lies_below_what_is_typed() -> None:
    from lilliput.recipes.pretraining import PRETRAINING

    recipe = PRETRAINING[0]
    c = settings([{"recipe": recipe.name, "case": "GaLore", "tokens": "1M", "accumulate": 8}])
    assert (c.model, c.optimizer, c.accumulate, c.steps, c.total_steps) == ("llama_60m", "galore_adamw", 8, None, 7)
    with pytest.raises(ValueError, match="choose one with case=: AdamW, GaLore"):
        settings([{"recipe": recipe.name}])
    with pytest.raises(ValueError, match="did you mean 'GaLore'"):
        settings([{"recipe": recipe.name, "case": "Galor"}])


def test_finished_rows_of_a_recipe_are_held_against_what_was_published(lilliput: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from lilliput.config import words\nfrom lilliput.recipes import Case, Recipe, Version\n"
        f"ROWS = words({typed(data=text(tmp_path), steps=3, warmup=0)!r})\n"
        "CASES = [Case('A', {'lr': 0.01}, 200, 50, 200), Case('B', {'lr': 0.001}, 300, 50, 300)]\n"
        "MINE = Recipe('mine', 't', 's', ROWS, {'full': Version(CASES, 'h', 1)}, 'perplexity', command='pretrain')\n"
    )
    recipe = "recipe=mine.py:MINE"
    assert "mine: not run" in lilliput("pretrain", recipe, "--check").out
    for case in "AB":
        assert lilliput("pretrain", recipe, f"case={case}", "--plain", "tensorboard=false", "accumulate=2").status == 0
    said = lilliput("pretrain", recipe, "--check")
    assert said.status == 0 and said.out.splitlines()[-1] == "mine: reproduced"
    assert "A: perplexity 19" in said.out and "published 200" in said.out


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["optimiser=adamw"], "there is no setting 'optimiser'; did you mean 'optimizer'?"),
        (["lr=fast"], "lr=fast must be a number"),
        (["seed.a=1"], "seed has no parts"),
        (["-l", "0.01"], "settings are written key=value, flags are"),
        (["steps=10", "tokens=1M"], "give one of them"),
        (["data=nowhere.txt"], "there is no text at 'nowhere.txt'"),
        (["model.hiden=4"], "has no option 'hiden'; did you mean 'hidden'"),
        (["recipe=fedavg/cifar10_cnn"], "`lilliput run recipe=fedavg/cifar10_cnn`"),
    ],
)
def test_what_is_refused_says_how_to_put_it_right(lilliput: Cli, tmp_path: Path, typed: list[str], words: str) -> None:
    said = lilliput("pretrain", *typed)
    assert said.status == 2 and words in said.err and len(said.err.splitlines()) == 1
    assert not list(tmp_path.rglob("config.yaml"))


def test_help_tells_every_setting(lilliput: Cli) -> None:
    from dataclasses import fields

    from lilliput.pretraining import Pretrain

    said = lilliput("pretrain", "--help")
    own = [f.name for f in fields(Pretrain) if not f.name.endswith("_options")]
    assert said.status == 0 and all(f"  {name}=" in said.out for name in own)
    assert "galore_adamw" in said.out


def test_settings_are_shown_and_nothing_runs(lilliput: Cli, runs: Runs) -> None:
    said = lilliput("pretrain", "--cfg", "optimizer.rank=8", "optimizer=fira")
    assert said.status == 0 and yaml.safe_load(said.out)["optimizer_options"] == {"rank": 8}
    assert not runs()
