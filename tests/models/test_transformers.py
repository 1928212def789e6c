"""Models of Hugging Face transformers: sizes as published, options, and what does not fit the data is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from lilliput import models
from lilliput.models.transformers import NAMES, pretrained

transformers = pytest.importorskip("transformers")
SMALL = {"layers": 2, "hidden": 32, "heads": 2, "mlp": 64}
TEXTS = ("gpt2", "llama_9m")
CLASSIFIERS = ("bert", "roberta", "distilbert", "t5_encoder")


def build(name: str, seed: int = 0, **options: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    shape = (3, 16, 16) if name == "vit" else (12,)
    patch = {"patch": 4} if name == "vit" else {}
    return models.build(name, shape=shape, classes=7, **SMALL, **patch, **options).eval()


@pytest.mark.parametrize("name", [*TEXTS, *CLASSIFIERS, "vit"])
def test_logits_alone_come_out_and_the_seed_decides_them(name: str) -> None:
    x = torch.randn(2, 3, 16, 16) if name == "vit" else torch.randint(7, (2, 12))
    out = build(name)(x)
    assert list(out) == ["logits"]  # no cache of keys and values, which would be an output too
    assert out["logits"].shape == ((2, 12, 7) if name in TEXTS else (2, 7))
    assert torch.equal(out["logits"], build(name)(x)["logits"])
    assert not torch.equal(out["logits"], build(name, seed=1)(x)["logits"])


@pytest.mark.parametrize("name", [*TEXTS, *CLASSIFIERS])
def test_padding_changes_nothing(name: str) -> None:
    model, x = build(name), torch.randint(1, 7, (2, 9))
    padded = torch.cat([x, torch.zeros(2, 3, dtype=torch.int64)], dim=1)
    mask = (torch.arange(12) < 9).long().expand(2, 12)
    alone = model(input_ids=x, attention_mask=torch.ones_like(x))["logits"]
    beside = model(input_ids=padded, attention_mask=mask)["logits"]
    torch.testing.assert_close(beside[:, :9] if name in TEXTS else beside, alone, rtol=1e-4, atol=1e-5)


# Millions of parameters, and of those in attention and feed-forward matrices: the table of the GaLore paper's programs.
MILLIONS = {
    "9m": (9.0, 0.8), "20m": (19.6, 3.2), "35m": (35.2, 10.6), "40m": (42.4, 15.8), "60m": (58.07, 25.30),
    "71m": (70.6, 37.8), "100m": (100.1, 59.0), "130m": (134.1, 84.9), "250m": (247.4, 198.2), "350m": (368.0, 302.4),
    "1b": (1339, 1208), "3b": (2686, 2522), "7b": (6738, 6476),
}  # fmt: skip


@pytest.mark.parametrize("size", models.LLAMA)
def test_llamas_have_their_published_sizes(size: str) -> None:
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in pretrained(f"llama_{size}").named_parameters()}
    inner = sum(n for name, n in sizes.items() if "attn" in name or "mlp" in name)
    assert (sum(sizes.values()) / 1e6, inner / 1e6) == pytest.approx(MILLIONS[size], rel=1e-3, abs=0.06)


@pytest.mark.parametrize(
    "name, count", [("gpt2", 124_439_808), ("gpt2_medium", 354_823_168), ("gpt2_xl", 1_557_611_200)]
)
def test_gpt2s_have_their_published_sizes(name: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in pretrained(name).parameters()) == count


def test_words_and_the_library_s_names_say_the_same() -> None:
    ours = pretrained("gpt2", layers=1, hidden=32, heads=2, mlp=48, dropout=0.0, vocabulary=50).config
    theirs = pretrained("gpt2", n_layer=1, n_embd=32, num_attention_heads=2, n_inner=48, vocab_size=50).config
    assert (ours.attn_pdrop, ours.embd_pdrop, ours.resid_pdrop) == (0, 0, 0)
    for name in ("n_layer", "n_embd", "n_head", "n_inner", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert pretrained("llama_9m", hidden=64, heads=2).config.num_key_value_heads == 2


def test_what_follows_from_a_changed_size_changes_with_it(tmp_path: Path) -> None:
    """Heads that share keys and values still do, and a head's width is that of the new model."""
    sizes = {"layers": 1, "hidden": 64, "heads": 8, "mlp": 64, "vocabulary": 50}
    for shared, heads, expected in ((2, 4, 2), (8, 4, 4), (8, 16, 16)):
        pretrained("llama_9m", **sizes, num_key_value_heads=shared).config.save_pretrained(tmp_path)
        config = pretrained(str(tmp_path / "config.json"), hidden=32, heads=heads).config
        assert (config.num_key_value_heads, config.head_dim) == (expected, 32 // heads)


def test_a_folder_gives_its_weights_back(tmp_path: Path) -> None:
    model = pretrained("gpt2", **SMALL, vocabulary=50)
    model.save_pretrained(tmp_path)
    again = models.build("pretrained", source=str(tmp_path), shape=(12,), classes=50)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    fewer = pretrained(str(tmp_path), layers=1).state_dict()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in fewer.items())
    fresh = pretrained(str(tmp_path / "config.json")).state_dict()  # a configuration alone
    assert not torch.equal(fresh["transformer.wte.weight"], model.state_dict()["transformer.wte.weight"])


def test_weights_keep_their_body_under_a_head_for_the_data(tmp_path: Path) -> None:
    model = build("bert")
    model.save_pretrained(tmp_path)
    other = models.build("pretrained", source=str(tmp_path), shape=(12,), classes=3)
    body = {name: x for name, x in model.state_dict().items() if name.startswith("bert.")}
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in body.items())
    assert other.classifier.weight.shape == (3, 32)


def test_the_hub_is_a_name_and_its_copy_here_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the hub: its files are fetched once, then found."""
    pretrained("gpt2", **SMALL, vocabulary=50).save_pretrained(tmp_path)
    asked: list[bool] = []

    def files(kind: Any) -> Any:
        real = kind.__func__

        def load(cls: Any, name: str, *args: Any, local_files_only: bool = False, **options: Any) -> Any:
            asked.append(local_files_only)
            if local_files_only:
                raise OSError("not kept")
            return real(cls, str(tmp_path), *args, **options)

        return classmethod(load)

    for owner, name in (
        (transformers.PretrainedConfig, "get_config_dict"),
        (transformers.AutoModelForCausalLM, "from_pretrained"),
    ):
        monkeypatch.setattr(owner, name, files(getattr(owner, name)))
    assert pretrained("somebody/gpt2-small").config.n_embd == 32
    assert asked == [True, False, True, False]


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("gpt2", {"shape": (2000,)}, "2000 tokens exceed the 1024 positions of gpt2; cut .* or set positions=2000"),
        ("roberta", {"shape": (511,)}, "exceed the 510 positions of roberta"),
        ("gpt2", {"shape": (3, 8, 8)}, "takes texts"),
        ("vit", {"shape": (1, 8, 8)}, "at least 16 x 16"),
        ("gpt2", {"hidden": 30, "heads": 4}, "hidden=30 does not divide into heads=4"),
        ("gpt2", {"patch": 4}, "no option 'patch'"),
        ("gpt2", {"config": {"n_laier": 4}}, "did you mean 'n_layer'"),
        ("gpt2", {"config": {"vocab_size": 500}}, "tokenizer has 7 tokens and gpt2 has vocab_size=500"),
        ("pretrained", {}, "pretrained.source"),
        ("pretrained", {"source": "./nowhere"}, "there is no model at './nowhere'"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        models.build(name, **{"shape": (12,), "classes": 7, **options})


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is here")
def test_flash_attention_that_is_not_here_is_refused_with_what_is() -> None:
    with pytest.raises(ValueError, match=r"attention=flash_attention_2 is not available .*; use attention=sdpa"):
        build("llama_9m", attention="flash_attention_2")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pretrained("gpt2", **SMALL, vocabulary=50, positions=16).save_pretrained(tmp_path)
    source = str(tmp_path)
    for classes, shape, words in (
        (51, (12,), "51 tokens and .* has vocab_size=50"),
        (50, (17,), "17 tokens exceed the 16"),
    ):
        with pytest.raises(ValueError, match=words):
            models.build("pretrained", source=source, shape=shape, classes=classes)
    for options, words in (({"layers": 3}, "no weights for 'transformer.h.2"), ({"hidden": 16}, "has shape")):
        with pytest.raises(ValueError, match=words):
            pretrained(source, **options)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no model_type"):
        pretrained(source)


def test_every_name_is_on_the_command_line() -> None:
    assert set(NAMES) | {"pretrained"} <= set(models.names())
