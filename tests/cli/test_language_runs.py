"""Language models from the command line: a run on E2E, what it writes, and what is refused before it trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from saying import FAST, Cli

pytest.importorskip("transformers")
LINES = ["name : {0} | Type : pub||{0} is a pub . ", "name : {0} | area : riverside||{0} is by the river . "]
MODEL = ("model=gpt2", "gpt2.layers=2", "gpt2.hidden=32", "gpt2.heads=2", "batch_size=4", "lr=0.5")


@pytest.fixture
def data(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Words that name a small E2E folder and its tokenizer."""
    monkeypatch.setenv("LILLIPUT_CACHE", "")
    (tmp_path / "e2e").mkdir()
    for side, names in (("train", ["Cotto", "Aromi", "Clowns", "Cocum"]), ("test", ["Zizzi", "Strada"])):
        text = "\n".join(line.format(name) for name in names for line in LINES)
        (tmp_path / "e2e" / f"{side}.txt").write_text(text)
    return ("dataset=e2e", "e2e.folder=e2e", f"e2e.tokenizer={shared / 'tokenizers' / 'gpt2-tiny-5k'}", "clients=2")


def test_adapters_are_a_node_of_every_model(lilliput: Cli, data: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapters = ("lora.rank=2", "lora.alpha=8", "lora.targets=[c_attn, c_fc]")
    assert lilliput("run", *FAST, *MODEL, *data, *adapters, "rounds=1", "name=a").status == 0
    (row,) = [json.loads(line) for line in (tmp_path / "runs" / "a" / "metrics.jsonl").read_text().splitlines()]
    layers, hidden, clients, rank = 2, 32, 2, 2
    c_attn, c_fc = rank * (hidden + 3 * hidden), rank * (hidden + 4 * hidden)
    assert row["up_bytes"] == row["down_bytes"] == clients * 4 * layers * (c_attn + c_fc)
    config = (tmp_path / "runs" / "a" / "config.yaml").read_text()
    assert "lora:" in config
    assert lilliput("evaluate", "runs/a", "--generate", "--new-tokens=3", "--first=1").status == 0


def test_the_page_on_language_models_runs(
    lilliput: Cli, data: tuple[str, ...], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Python and its first command, at a smaller size and on fewer lines."""
    for library in ("peft", "sacrebleu"):
        pytest.importorskip(library)
    page = (Path(__file__).parents[2] / "docs" / "language.md").read_text(encoding="utf-8")
    tokenizer = str(shared / "tokenizers" / "gpt2-tiny-5k")
    smaller = {"data/e2e": "e2e", '"gpt2")': f"{tokenizer!r})", "layers=4": "layers=2", "hidden=128": "hidden=16"}
    smaller |= {"rounds=3": "rounds=1", "first=100": "first=1, new_tokens=3", "clients=4": "clients=2"}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for old, new in smaller.items():
            block = block.replace(old, new)
        exec(compile(block, "language.md", "exec"), {})
    command = re.findall(r"^(lilliput run .*?)\n\n", page, re.MULTILINE | re.DOTALL)[0].replace("\\\n", " ")
    words = command.replace("data/e2e", "e2e").split()[2:]
    assert lilliput("run", *words, *FAST, *MODEL, *data, "local_steps=1").status == 0


def test_a_run_is_scored_by_what_it_writes(lilliput: Cli, data: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    assert lilliput("run", *FAST, *MODEL, *data, "name=a").status == 0
    rows = [json.loads(line) for line in (tmp_path / "runs" / "a" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["perplexity"] < rows[0]["perplexity"]
    assert rows[-1]["tokens_per_second"] > rows[-1]["examples_per_second"]
    said = lilliput("evaluate", "runs/a", "--generate", "--new-tokens=6", "--beams=2", "--first=3", "--out=said.jsonl")
    assert said.status == 0, said.err
    assert all(name in said.out for name in ("bleu ", "nist ", "meteor", "rouge_l "))
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [line["references"] for line in lines] == [
        ["Zizzi is a pub ."], ["Zizzi is by the river ."], ["Strada is a pub ."]
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words, why",
    [
        (("model=mlp",), "model=mlp does not give logits at every token; choose a causal model, such as gpt2"),
        (("model=bert", "bert.layers=1", "bert.hidden=12", "bert.mlp=12"), "bert does not give logits at every token"),
        (("gpt2.positions=8",), "exceed the 8 positions of gpt2; cut the data's length to 8, or set positions="),
        (("gpt2.heads=5",), "hidden=32 does not divide into heads=5"),
        (("e2e.tokenizer=./nowhere",), "no tokenizer at './nowhere'"),
        (("gpt2.config.vocab_size=50257",), "the tokenizer has 5000 tokens and gpt2 has vocab_size=50257"),
        (("partition=dirichlet",), "choose iid or natural"),
        (("lora.rank=0",), "lora.rank is 0; it must be at least 1"),
        (("lora.targets=[c_atn]",), "no linear layer 'c_atn' to adapt; did you mean 'c_attn'?"),
        (("lora.rnk=4",), "lora has no setting 'rnk'; did you mean 'rank'?"),
    ],
)
def test_what_does_not_go_together_is_refused(
    lilliput: Cli, data: tuple[str, ...], tmp_path: Path, words: tuple[str, ...], why: str
) -> None:
    said = lilliput("run", *FAST, *MODEL, *data, *words)
    assert said.status == 2
    assert why in said.err.splitlines()[-1]
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--beems=4", "no flag '--beems'; did you mean '--beams'"),
        ("--beams=four", "--beams=four must be a whole number"),
        ("--beams", "--beams needs a whole number"),
    ],
)
def test_evaluate_knows_its_flags(lilliput: Cli, flag: str, why: str) -> None:
    said = lilliput("evaluate", "runs/a", "--generate", flag)
    assert said.status == 2
    assert why in said.err
