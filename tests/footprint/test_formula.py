"""Formulas say what a step on fake tensors shows, and what the papers count."""

import pytest
import torch

from lilliput import footprint
from lilliput.footprint import Setting

transformers = pytest.importorskip("transformers")

LLAMA = {
    "model": "llama_9m", "model_options": {"layers": 2, "hidden": 256, "mlp": 688, "vocabulary": 4096}, "batch_size": 8,
}  # fmt: skip
LOW_RANK = {"optimizer_options": {"rank": 64}}


@pytest.mark.parametrize(
    "changes",
    [
        {"lean": False},
        {"optimizer": "galore_adamw", "dtype": "bf16", "checkpointing": True, "lean": False, **LOW_RANK},
        {"optimizer": "galore_adamw8bit", "per_layer": True, "device": "cpu", **LOW_RANK},
        {"optimizer": "online_subspace_adamw", "dtype": "bf16", **LOW_RANK},
        {"precision": "bf16", "lean": False},
        {"precision": "bf16", "checkpointing": True, "accumulate": 2},
        {"optimizer": "galore_adamw8bit", "batch_size": 1, "dtype": "bf16", **LOW_RANK},  # the update takes most
        {"lora": 32},
    ],
    ids=str,
)
def test_formulas_agree_with_the_step(changes):
    given = {**LLAMA, **changes}
    quick, exact = (footprint.estimate(**given, certify=certify) for certify in (False, True))
    assert quick.peak == pytest.approx(exact.peak, rel=0.05)
    for kind in ("weights", "states", "projections"):
        assert getattr(quick, kind) == pytest.approx(getattr(exact, kind), rel=0.002)  # rotary tables, step counts


@pytest.mark.parametrize(
    ("family", "groups", "head"),
    [("llama", 2, 64), ("llama", 1, 128), ("mistral", 2, 64), ("qwen2", 1, 64), ("qwen3", 2, 128)],
)
@pytest.mark.parametrize(
    "changes", [{"lean": False}, {}, {"precision": "bf16"}, {"dtype": "bf16", "checkpointing": True}], ids=str
)
def test_so_they_do_with_grouped_queries(family, groups, head, changes):
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=groups,
        head_dim=head,
        max_position_embeddings=256,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    quick, exact = (footprint.estimate(model, batch_size=8, certify=certify, **changes) for certify in (False, True))
    assert quick.peak == pytest.approx(exact.peak, rel=0.05)
    assert quick.weights == pytest.approx(exact.weights, rel=0.002)


def test_a_window_shorter_than_the_text_has_no_formula():
    options = {"num_hidden_layers": 1, "hidden_size": 32, "sliding_window": 16, "vocab_size": 100}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("mistral", **options))
    with pytest.raises(ValueError, match="no formulas"):
        footprint.estimate(model, max_length=32, certify=False)


GIB = 2**30


@pytest.mark.parametrize(
    ("size", "rank", "adamw", "galore", "online"),
    [("350m", 256, 1.37, 0.61, 0.77), ("1b", 512, 4.99, 1.94, 2.60), ("7b", 1024, 25.1, 8.76, 12.3)],
)
def test_states_are_what_the_papers_count(size, rank, adamw, galore, online):
    """GiB of state in bfloat16 numbers, dense Adam for all that is not projected; ours are float32, twice that."""

    def states(optimizer: str, **options: int) -> float:
        found = footprint.estimate(f"llama_{size}", optimizer=optimizer, optimizer_options=options, certify=False)
        return (found.states + found.projections) / 2 / GIB

    assert states("adamw") == pytest.approx(adamw, rel=0.005)
    assert states("galore_adamw", rank=rank) == pytest.approx(galore, rel=0.005)
    assert states("online_subspace_adamw", rank=rank) == pytest.approx(online, rel=0.005)


def test_seven_billion_parameters_train_in_24_gb():
    recipe = {
        "optimizer": "galore_adamw8bit", "optimizer_options": {"rank": 1024}, "dtype": "bf16", "batch_size": 1,
        "max_length": 2048, "per_layer": True, "checkpointing": True,
    }  # fmt: skip
    found = footprint.estimate("llama_7b", **recipe)
    assert found.parameters == 6_738_415_616
    assert found.fits("24GB") and not found.fits("22GB")
    assert not footprint.estimate("llama_7b", **{**recipe, "per_layer": False}).fits("24GB")


def test_where_there_is_no_formula():
    with pytest.raises(ValueError, match="no formulas for resnet20 with adamw; use certify=true"):
        footprint.estimate("resnet20", certify=False)
    assert Setting(model="resnet20").module() is not None
