"""Laws of a pre-training run: what may not change its numbers, exact resume, and what it leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SMALL, text, without_clock

import lilliput
from lilliput.core.tree import tensors
from lilliput.experiment.checkpoint import CheckpointError
from lilliput.pretraining import Pretrain, Result, saved
from lilliput.training.settings import warmup_rounds

pytest.importorskip("transformers")
GALORE = {"optimizer": "galore_adamw", "optimizer_options": {"rank": 4, "update_proj_gap": 3}}


def train(folder: Path, to: str | None = None, resume: bool = False, reporters: Any = (), **settings: Any) -> Result:
    c = Pretrain(**{**SMALL, "data": text(folder), **settings})
    return lilliput.pretrain(c, to=folder / to if to else None, resume=resume, reporters=reporters)


def losses(result: Result) -> list[float]:
    return [row["train_loss"] for row in result.rows]


class Stopper:
    """Ends a run, as an error anywhere would, after the row of a step."""

    def __init__(self, step: int):
        self.step = step

    def start(self, run, rows): ...

    def progress(self, step, done, total):
        if step == self.step:
            raise KeyboardInterrupt

    def row(self, row): ...

    def end(self, rows): ...


def bits(folder: Path) -> dict[str, Any]:
    found = saved.load(folder / "checkpoint")
    assert found is not None
    return {"model": found.read(found.model), "optimizer": found.read(found.optimizer), "progress": found.progress.step}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bf16", "clip": 1.0, "accumulate": 2},
        {**GALORE, "per_layer": True, "packing": False},
        {**GALORE, "optimizer": "online_subspace_adamw8bit", "schedule": "cosine_restarts", "restart_every": 4},
        {**GALORE, "optimizer": "fira", "checkpointing": True},
        {"optimizer": "adam", "precision": "bf16", "log_every": 5},
        {"optimizer": "torch.optim:Adagrad", "lean": False, "shuffle": 0},
        {"lora": 2},
    ],
    ids=["adamw", "per-layer", "online-8bit", "fira", "adam", "adagrad", "lora"],
)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not(tmp_path: Path, settings: dict[str, Any]) -> None:
    straight = train(tmp_path, "straight", save_every=3, **settings)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "stopped", save_every=3, reporters=[Stopper(8)], **settings)
    resumed = train(tmp_path, "stopped", resume=True, save_every=3, **settings)
    assert without_clock(resumed.rows) == without_clock(straight.rows)
    assert equal(bits(tmp_path / "stopped"), bits(tmp_path / "straight"))
    lines = (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()
    assert without_clock([json.loads(line) for line in lines]) == without_clock(straight.rows)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"accumulate": 4}, 1e-5),
        ({"accumulate": 4, "packing": False}, 1e-5),  # parts with unlike numbers of labels
        ({"lean": False}, 1e-5),
        ({"checkpointing": True}, 1e-5),
        ({**GALORE, "per_layer": True}, 1e-5),
        ({**GALORE, "per_layer": True, "accumulate": 2}, 1e-4),
    ],
)
def test_how_a_step_is_taken_changes_no_loss(tmp_path: Path, settings: dict[str, Any], tolerance: float) -> None:
    plain = {name: SMALL.get(name, settings[name]) for name in ("optimizer", "optimizer_options", "packing")
             if name in settings}  # fmt: skip
    assert losses(train(tmp_path, **settings)) == pytest.approx(losses(train(tmp_path, **plain)), rel=tolerance)


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", "adamw8bit", "adam8bit", "adafactor", "lion", "galore_adafactor", "galore_lion", "galore_adamw8bit",
     "apollo", "apollo_mini", "online_subspace_lion", "sgd"],
)  # fmt: skip
def test_every_optimizer_learns(tmp_path: Path, optimizer: str) -> None:
    options = {"rank": 2} if optimizer.startswith(("galore", "online", "apollo")) else {}
    lr = {"lion": 1e-3, "galore_lion": 1e-3, "online_subspace_lion": 1e-3, "sgd": 1.0}.get(optimizer, 0.01)
    result = train(tmp_path, optimizer=optimizer, optimizer_options=options, lr=lr, steps=16)
    first, last = losses(result)[0], losses(result)[-1]
    assert last < first - 0.05
    assert first == pytest.approx(math.log(320), rel=0.05)


def test_the_learning_rate_warms_up_and_falls_to_its_minimum(tmp_path: Path) -> None:
    c = Pretrain(steps=100, warmup=10, lr=1.0, min_lr_ratio=0.2)
    from lilliput.pretraining.schedule import factor

    assert [factor(c, step) for step in (0, 5, 10, 100)] == pytest.approx([0, 0.5, 1.0, 0.2])
    assert factor(c, 55) == pytest.approx(0.6)
    restarts = Pretrain(steps=100, warmup=10, schedule="cosine_restarts", restart_every=30, restart_warmup=5)
    assert [factor(restarts, s) for s in (30, 60, 90)] == [0, 0, 0]
    assert factor(restarts, 65) == pytest.approx(factor(Pretrain(steps=100, warmup=10), 65))
    assert factor(Pretrain(steps=100, warmup=0.5, schedule="linear", min_lr_ratio=0), 75) == pytest.approx(0.5)
    assert factor(Pretrain(steps=100, warmup=0, schedule="constant"), 99) == 1.0
    assert Pretrain(steps=100, warmup=0.29).warmup_steps == warmup_rounds(0.29, 100) == 29


def test_a_budget_of_tokens_is_so_many_steps() -> None:
    assert Pretrain(tokens="1.1B", batch_size=512, max_length=256).total_steps == 8392
    assert Pretrain(tokens="10M").total_steps == 10_000_000 // (16 * 256)


def test_the_perplexity_is_that_of_the_exported_model(tmp_path: Path) -> None:
    """model/ is read by transformers, in evaluation mode gives the loss that the last row says, token by token."""
    from transformers import AutoModelForCausalLM

    result = train(tmp_path, "run", **GALORE, validation=text(tmp_path), eval_tokens="1M")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = [
        b for line in Path(text(tmp_path)).read_text().splitlines() for b in (*json.loads(line)["text"].encode(), -2)
    ]
    stream = torch.tensor(ids) + 3  # ByT5 numbers its three special tokens first; the end of text is 1
    n = (len(stream) - 1) // 16
    windows = stream[: n * 16 + 1].unfold(0, 17, 16)
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert result.rows[-1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss.item()), rel=1e-4)
    assert result.rows[-1]["eval_tokens"] == n * 16


def test_adapters_are_in_the_exported_weights(tmp_path: Path) -> None:
    first = train(tmp_path, "first", lora=2)
    frozen = {name for name, p in first.model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 2 * 7 and all("base_layer" in name for name in frozen)
    second = train(tmp_path, init=str(tmp_path / "first"), lr=1e-12, steps=3, warmup=0)
    assert second.rows[-1]["loss"] == pytest.approx(first.rows[-1]["loss"], abs=1e-4)


def test_evaluation_stops_at_its_budget_and_switches_dropout_off(tmp_path: Path) -> None:
    options = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 320, "n_positions": 64, "dropout": 0.5}
    settings = {**GALORE, "model": "gpt2", "model_options": options, "validation": text(tmp_path), "eval_tokens": 300}
    a = train(tmp_path, lr=1e-12, **settings).rows[-1]
    b = train(tmp_path, lr=1e-12, seed=0, accumulate=2, **settings).rows[-1]
    assert a["eval_tokens"] == 3 * 8 * 16 and b["eval_tokens"] == 5 * 4 * 16
    quiet = train(tmp_path, lr=1e-12, **{**settings, "model_options": {**options, "dropout": 0.0}}).rows[-1]
    assert a["loss"] == pytest.approx(quiet["loss"], abs=1e-6) and a["train_loss"] != quiet["train_loss"]


def test_weights_alone_start_another_run(tmp_path: Path) -> None:
    first = train(tmp_path, "first", **GALORE)
    second = train(tmp_path, init=str(tmp_path / "first"), lr=1e-12, steps=3, warmup=0)
    assert second.rows[-1]["loss"] == pytest.approx(first.rows[-1]["loss"], abs=1e-5)


def test_a_folder_and_a_module_of_ones_own_are_models(tmp_path: Path) -> None:
    first = train(tmp_path, "first")
    folder = train(tmp_path, model=str(tmp_path / "first" / "model"), model_options={}, lr=1e-12, steps=3, warmup=0)
    assert folder.rows[-1]["loss"] == pytest.approx(first.rows[-1]["loss"], abs=1e-5)
    (tmp_path / "bigram.py").write_text(
        "from torch import nn\n\n\ndef Bigram(width=8):\n"
        "    return nn.Sequential(nn.Embedding(320, width), nn.Linear(width, 320))\n"
    )
    own = train(tmp_path, "own", model=f"{tmp_path}/bigram.py:Bigram", model_options={"width": 16}, steps=20)
    assert losses(own)[-1] < losses(own)[0] - 0.1 and (tmp_path / "own" / "model" / "model.safetensors").exists()


def test_a_run_goes_on_in_another_folder_with_new_settings(tmp_path: Path) -> None:
    straight = train(tmp_path, "straight", schedule="constant")
    train(tmp_path, "first", schedule="constant", steps=6)
    second = train(tmp_path, "second", schedule="constant", continue_from=str(tmp_path / "first"))
    assert without_clock(second.rows)[1:] == without_clock(straight.rows)[7:]
    lower = train(tmp_path, "third", schedule="constant", continue_from=str(tmp_path / "first"), lr=0.001)
    assert {row["lr"] for row in lower.rows} == {0.001}


def test_a_learning_rate_that_jumps_on_resume_is_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A cosine over more steps is higher where the run stands; a constant rate goes on as it was."""
    train(tmp_path, "cosine", steps=6)
    with pytest.warns(UserWarning, match=r"lr is 0\.00\d+ in step 7, where the run had come to 0\.001: the"):
        train(tmp_path, "cosine", resume=True, steps=12)
    recwarn.clear()
    train(tmp_path, "constant", steps=6, schedule="constant")
    train(tmp_path, "constant", resume=True, steps=12, schedule="constant")
    assert not [w for w in recwarn if "the run had come to" in str(w.message)]


def test_a_foreign_or_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    train(tmp_path, "run", **GALORE)
    with pytest.raises(CheckpointError, match="holds a run already"):
        train(tmp_path, "run", **GALORE)
    for settings, words in (
        ({"max_length": 32}, "its max_length is 16, not 32"),
        ({"data": "stdlib"}, "its data is"),
        ({"optimizer": "adamw", "optimizer_options": {}}, "its optimizer is 'galore_adamw'"),
        ({"optimizer_options": {"rank": 5}}, "parameter 0 is .* another model or optimizer"),
    ):
        with pytest.raises(CheckpointError, match=words):
            train(tmp_path, "run", resume=True, steps=20, **{**GALORE, **settings})
    file = next((tmp_path / "run" / "checkpoint").glob("*-model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        train(tmp_path, "run", resume=True, steps=20, **GALORE)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing or has another size"):
        train(tmp_path, "run", resume=True, steps=20, **GALORE)
    manifest = tmp_path / "run" / "checkpoint" / "manifest.json"
    manifest.write_text(json.dumps({"format": "lilliput-checkpoint"}))
    with pytest.raises(CheckpointError, match="'lilliput-checkpoint', not of 'lilliput-pretraining'"):
        train(tmp_path, "run", resume=True, **GALORE)
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        train(tmp_path, "run", resume=True, **GALORE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"model_options": {**SMALL["model_options"], "vocab_size": 128}},
            r"up to 258.*vocabulary of 128; set model.voc",
        ),
        ({"max_length": 128}, "max_length=128 exceeds the 64 positions.*set model.max_position_embeddings=128"),
        ({"batch_size": 7, "accumulate": 2}, "batch_size=7 does not divide into accumulate=2"),
        ({"steps": None, "tokens": 100}, "tokens=100 is below one step of 128 tokens"),
        ({"steps": None, "tokens": "1X"}, "tokens=1X is not a number of tokens; write 5000, 500M or 1.1B"),
        ({"tokens": "1M"}, "steps and tokens"),
        ({"warmup": 12}, "warmup=12 leaves none of 12 steps"),
        ({"optimizer": "galore_adam"}, "did you mean 'galore_adamw'"),
        ({**GALORE, "optimizer_options": {"rnk": 4}}, "no option 'rnk'; did you mean 'rank'"),
        ({**GALORE, "optimizer_options": {"rank": 16}}, "has both sides longer than rank 16"),
        ({"optimizer": "sgd", "per_layer": True}, "(?i)per_layer=true works with our own optimizers, not sgd"),
        ({"dtype": "bf16", "precision": "bf16"}, "does nothing to bf16 weights"),
        ({"schedule": "cosine_restarts"}, "restart_every and schedule=cosine_restarts belong together"),
        ({"device": "tpu?"}, "device=tpu"),
        ({"tokenizer": "./nowhere"}, "there is no tokenizer at"),
        ({"continue_from": "nowhere"}, "nowhere holds no checkpoint"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio is 2.0"),
        ({"lr": 0.0}, "lr is 0.0; it must be positive"),
        ({"memory": "650kB"}, "needs .* and there are 650 kB, .* too few; .* would make it fit"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        train(tmp_path, **settings)


def test_text_of_nothing_is_refused_on_either_side(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n')
    with pytest.raises(ValueError, match="no usable text for training"):
        train(tmp_path, data=str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"no usable text for validation; raise held_out="):
        train(tmp_path, held_out=1e-9)


def test_a_sentinel_of_t5_needs_no_place_in_the_vocabulary() -> None:
    from lilliput.pretraining.checks import largest_id

    class T5:
        eos_token_id, pad_token_id, unk_token_id, bos_token_id = 1, 0, 2, None
        all_special_ids = (0, 1, 2, 32000, 32099)

        def get_vocab(self):
            return {"<pad>": 0, "</s>": 1, "<unk>": 2, "word": 31999, "<extra_id_0>": 32099, "<extra_id_99>": 32000}

    assert largest_id(T5()) == 31999


@pytest.mark.parametrize("optimizer", ["galore_adamw", "online_subspace_adamw"])
@pytest.mark.parametrize("lean", [True, False])
def test_gpt2_trains_in_subspaces_of_its_transposed_layers(tmp_path: Path, optimizer: str, lean: bool) -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=320)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path / "gpt2")
    train(
        tmp_path, "run", model=str(tmp_path / "gpt2"), model_options={}, optimizer=optimizer, lean=lean,
        optimizer_options={"rank": 4, "update_proj_gap": 3},
    )  # fmt: skip
    held = bits(tmp_path / "run")
    layers = [x for name, x in held["model"].items() if ".h." in name and x.dim() == 2]
    assert len(layers) == 8  # c_attn, c_proj, c_fc, c_proj of two blocks
    # A moment in the subspace is 4 long on the side that is projected, and as long as the weight on the other.
    shapes = [{tuple(x.shape) for x in tensors(state)} for state in held["optimizer"]["state"].values()]
    for w in layers:
        assert any({(4, max(w.shape)), (max(w.shape), 4)} & found for found in shapes)
    assert sum(any(4 in shape for shape in found) for found in shapes) == len(layers)
