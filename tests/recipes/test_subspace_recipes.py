"""FedSub's recipes: their closed forms are those of the models and of the ledger, and one small run of everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lilliput
from lilliput import models
from lilliput.cli import main
from lilliput.config import expanded
from lilliput.config.build import build
from lilliput.engines.dry import predict
from lilliput.recipes import RECIPES
from lilliput.recipes.subspace import BYTES, SUBSPACE, T5, TARGETS, TINY
from lilliput.recipes.traffic import Network, llama, resnet

pytest.importorskip("transformers")
NAMES = [recipe.name for recipe in SUBSPACE]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))


def check(network: Network, model: torch.nn.Module, rank: int | float, targets: list[str], along: str) -> None:
    assert network.whole == sum(p.numel() for p in model.parameters())
    made = lilliput.replace_with_subspace(model, targets, rank=rank, along=along, dual="none")  # type: ignore[arg-type]
    assert network.sent(rank) - network.buffers == made.parameters


def test_the_numbers_of_a_llama_are_its_models() -> None:
    for size, rank in (("60m", 64), ("350m", 0.5)):
        with torch.device("meta"):
            model = models.build(f"llama_{size}", shape=(64,), classes=T5)
        check(llama(models.LLAMA[size], T5), model, rank, TARGETS, "filter")


def test_the_numbers_of_llama_32_are_its_configurations() -> None:
    """Its configuration as its makers publish it."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128_256, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    check(llama(sizes, 128_256, key_rows=512, tables=1), model, 0.7, TARGETS, "filter")


def test_the_numbers_of_a_resnet_are_its_models() -> None:
    with torch.device("meta"):
        model = models.build("resnet110", shape=(3, 32, 32), classes=100, kernel=7)
    network = resnet(18, 16, 7, 3, 100)
    assert network.buffers == sum(x.numel() * x.element_size() for x in model.buffers()) // 4
    check(network, model, 3, ["conv1", "conv2"], "width")


def test_the_rounds_at_equal_bytes_are_those_of_the_closed_form() -> None:
    """LLaMA-60M at rank 64 sends 8 (5 x 512 + 2 x 1376) 64 numbers of b, and 32.9 million of all others."""
    network = llama(models.LLAMA["60m"], T5)
    b, others = 8 * (5 * 512 + 2 * 1376) * 64, 2 * T5 * 512 + 17 * 512
    assert network.sent(64) == b + others == 35_598_848
    whole = others + 8 * (4 * 512 * 512 + 3 * 512 * 1376)
    assert network.paid(64, 2000) == (2 * 2000 * (b + others) + whole) // (2 * whole) == 1224
    rounds = {case.name: case.settings["rounds"] for case in RECIPES["fedsub/llama_60m"].versions["full"].cases}
    assert rounds["FedAvg at the bytes of rank 64"] == 1224 and rounds["P = I at the bytes of rank 64"] == 1223
    assert rounds["FedAvg"] == 2000 and rounds["Data-parallel SGD"] == 20_000  # the same steps


def test_the_resnets_published_epochs_are_its_equal_bytes() -> None:
    """47 epochs of 3 / 7 of the convolutions, and of all the rest, are 20 of the whole."""
    rounds = {
        case.name: case.settings["rounds"] for case in RECIPES["fedsub/resnet110_cifar100"].versions["full"].cases
    }
    assert rounds["FedSub, rotated dual"] == 1838 and rounds["FedAvg at its bytes"] * 10 / 391 == pytest.approx(
        20, 0.02
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "network", "rank", "case", "at"),
    [
        ("fedsub/llama_60m", llama(TINY, BYTES), 4, "rank 4", " at the bytes of rank 4"),
        ("fedsub/resnet110_cifar100", resnet(3, 4, 7, 1, 10), 3, "rotated dual", " at its bytes"),
    ],
)
def test_equal_bytes_are_equal_by_the_ledger(name: str, network: Network, rank: int, case: str, at: str) -> None:
    """Of dry runs at small scale: a baseline sends no more than FedSub, and with a round more it would."""

    def payload(case: str) -> tuple[int, int, int]:
        """Bytes of all rounds, of one, and how many clients have a part in them."""
        (s,) = expanded({"recipe": name, "scale": "small", "case": case, "engine": "dry"})
        cost = predict(build(s).experiment)
        return sum(r.count() for r in cost.rounds), cost.rounds[-1].count(), cost.clients

    sent, _, clients = payload(f"FedSub, {case}")
    assert sent == 4 * clients * (2 * 4 * network.sent(rank) + network.whole)
    for baseline in (f"FedAvg{at}", f"P = I{at}"):
        total, more, _ = payload(baseline)
        assert total <= sent < total + more


def test_a_model_of_more_than_a_gibibyte_may_come_back_whole() -> None:
    from lilliput.config.build import reply_limit

    class Task:
        model = torch.nn.Linear(16_384, 32_768, bias=False, device="meta")

    assert reply_limit(Task) == 2 * 4 * 16_384 * 32_768 > reply_limit(type("Small", (), {"model": torch.nn.ReLU()}))


def test_where_a_model_and_its_tokenizer_are_is_no_other_experiment() -> None:
    from lilliput.cli.recipe import _unchanged

    here = {"pretrained.source": "here", "wikitext2.tokenizer": "here", "wikitext2.folder": "data"}
    _unchanged(expanded({"recipe": "fedsub/llama_wikitext2", **here}))
    with pytest.raises(ValueError, match=r"wikitext2.length=256 is not the recipe's 512"):
        _unchanged(expanded({"recipe": "fedsub/llama_wikitext2", **here, "wikitext2.length": 256}))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_case_runs_at_small_scale(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", f"recipe={name}", "scale=small", "--check", "--plain", "tensorboard=false", "plots=false"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{name} (small): nothing to compare with"
    files = list(tmp_path.rglob("metrics.jsonl"))
    # Some baselines at the bytes of one rank are those of another.
    assert len(files) == len({s.fingerprint() for s in expanded({"recipe": name, "scale": "small"})}) >= 6
    for file in files:
        row = json.loads(file.read_text().splitlines()[-1])
        assert {"loss", "accuracy", *(["perplexity"] if "llama" in name else [])} <= row.keys()
