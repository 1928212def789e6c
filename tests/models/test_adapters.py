"""LoRA: the model is unchanged until trained, adapters alone train, and merging gives the same outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lilliput.models import build, pretrained
from lilliput.models.adapters import lora, merged
from lilliput.tasks import Supervised

pytest.importorskip("peft")
SMALL = {"layers": 2, "hidden": 32, "heads": 2, "mlp": 64}


def gpt2(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return pretrained("gpt2", **SMALL, vocabulary=50, **options)


@pytest.mark.parametrize("family", ["gpt2", "llama_9m", "bert", "roberta", "distilbert", "t5_encoder", "vit"])
def test_an_adapted_model_starts_as_it_was(family: str) -> None:
    image = {"patch": 4, "image_size": 8} if family == "vit" else {"vocabulary": 50}
    model = pretrained(family, **SMALL, **image).eval()
    x = torch.randn(2, 3, 8, 8) if family == "vit" else torch.randint(3, 50, (2, 6))
    before = model(x)["logits"]
    torch.testing.assert_close(lora(model, rank=4)(x)["logits"], before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or name.startswith(("classifier.", "pre_classifier.")) for name in trained)
    assert any(name.startswith("classifier.") for name in trained) == (family not in ("gpt2", "llama_9m"))


def test_what_is_trained_is_the_papers_count() -> None:
    model, rank, hidden, layers = lora(gpt2(), rank=4), 4, 32, 2
    params = Supervised(model).init()["params"]
    assert sum(x.numel() for x in params.values()) == layers * rank * (hidden + 3 * hidden)


def test_merging_gives_the_same_outputs_without_adapters() -> None:
    model = lora(gpt2(dropout=0.0), rank=4, alpha=32, dropout=0.1, targets=["c_attn", "c_fc"]).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    x = torch.randint(50, (2, 6))
    whole = merged(model)
    torch.testing.assert_close(whole(x)["logits"], model(x)["logits"], rtol=1e-5, atol=1e-5)
    assert {name for name, _ in whole.named_parameters()} == {name for name, _ in gpt2().named_parameters()}
    assert any("lora_A" in name for name, _ in model.named_parameters()), "the original keeps its adapters"
    assert not torch.allclose(whole(x)["logits"], gpt2(dropout=0.0).eval()(x)["logits"])


def test_a_lean_model_is_adapted_all_the_same() -> None:
    x = torch.randint(50, (2, 6))
    found = []
    for lean in (False, True):
        torch.manual_seed(0)
        sizes = {**SMALL, "dropout": 0.0, "shape": (6,), "classes": 50}
        model = lora(build("gpt2", lean=lean, **sizes), rank=4)
        found.append((model(x)["logits"], merged(model)(x)["logits"]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_residents_share_what_is_frozen() -> None:
    """Eight roles of an adapted model cost one copy of its base."""
    task = Supervised(lora(gpt2(), rank=4))
    params = task.init()["params"]
    one, other = (dict(task.resident(params, role=role).named_parameters()) for role in ("train", "evaluate"))
    for name, p in one.items():
        assert (p.data_ptr() == other[name].data_ptr()) == (name not in params), name


def test_any_model_of_linear_layers_is_adapted() -> None:
    model = lora(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), rank=1, targets=["0"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "0.lora_A.default.weight", "0.lora_B.default.weight"
    }  # fmt: skip


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"targets": ["c_atn"]}, "no linear layer 'c_atn' to adapt; did you mean 'c_attn'"),
    ],
)
def test_what_cannot_be_adapted_is_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lora(gpt2(), **options)


def test_models_without_usual_targets_say_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"set lora.targets \(there are 0\)"):
        lora(nn.Sequential(nn.Linear(3, 4)))
