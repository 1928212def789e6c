"""E2E and WebNLG in their published formats: what counts, who owns what, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lilliput.data import federate, load
from lilliput.data.nlg import Pair, from_pairs
from lilliput.data.tokenizer import tokenizer

LINES = {
    "train": [
        "name : The Vaults | Type : pub||The Vaults is a pub . ",
        "name : The Vaults | Type : pub||A pub , The Vaults . ",
        "name : Blue Spice | food : English||Blue Spice is English . ",
    ],
    "test": ["name : Cotto | food : French||Cotto . ", "name : Cotto | food : French||French Cotto . "],
}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", "")


@pytest.fixture
def tiny(shared: Path) -> str:
    return str(shared / "tokenizers" / "gpt2-tiny-5k")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for side, lines in LINES.items():
        (tmp_path / f"{side}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_sequence_is_prompt_end_completion_end(folder: Path, tiny: str) -> None:
    data, library = load("e2e", str(folder), tokenizer=tiny), tokenizer(tiny)
    (tokens, spans), end = data.train, library.eos_token_id
    first, length = spans[0].tolist()
    row = tokens[0, :length].tolist()
    assert library.decode(row[: first - 1]) == "name : The Vaults | Type : pub"
    assert library.decode(row[first:-1]) == " The Vaults is a pub ."
    assert (row[first - 1], row[-1]) == (end, end)
    assert not tokens[0, length:].any()
    assert (data.kind, data.classes, data.shape) == ("tokens", 5000, (int(max(spans[:, 1].max(), 1)) - 1,))
    assert data.tokens_per_example == round(spans[:, 1].float().mean().item() - 1)


def test_only_completions_count_unless_all_do(folder: Path, tiny: str) -> None:
    part, whole = (load("e2e", str(folder), tokenizer=tiny, loss=what) for what in ("completion", "all"))
    for data, counted in ((part, lambda s: s[:, 1] - s[:, 0]), (whole, lambda s: s[:, 1] - 1)):
        batch = next(iter(federate(data, {0: [0, 1, 2]}, batch_size=3).train[0].epoch(None)))
        assert (batch["labels"] != -100).sum(1).tolist() == counted(data.train[1]).tolist()
    assert torch.equal(part.train[0], whole.train[0])


def test_each_distinct_prompt_of_the_test_has_all_its_references(folder: Path, tiny: str) -> None:
    data = load("e2e", str(folder), tokenizer=tiny)
    ((prompt, said),) = data.prompts
    assert said == ("Cotto .", "French Cotto .")
    assert tokenizer(tiny).decode(prompt[:-1]) == "name : Cotto | food : French"


def test_a_client_per_restaurant(folder: Path, tiny: str) -> None:
    data = load("e2e", str(folder), tokenizer=tiny)
    assert data.owner_names == ("Blue Spice", "The Vaults", "Cotto")  # the last has nothing to train on
    parts = federate(data, "natural").partition
    assert {c: index.tolist() for c, index in parts.items()} == {0: [2], 1: [0, 1]}


def test_the_challenge_s_own_csv(tmp_path: Path, tiny: str) -> None:
    for name in ("trainset.csv", "testset_w_refs.csv"):
        (tmp_path / name).write_text('mr,ref\n"name[Cotto], area[riverside]","Cotto, by the river."\n')
    data = load("e2e", str(tmp_path), tokenizer=tiny)
    assert data.owner_names == ("Cotto",)
    assert data.prompts[0][1] == ("Cotto, by the river.",)


def test_the_shared_files_are_the_published_ones(shared: Path, tiny: str) -> None:
    """Counts of the E2E challenge: 4,693 test pairs of 630 meanings; 42,061 lines to train on."""
    from lilliput.data.nlg import _lines

    train, test = (list(_lines(shared / "data" / "e2e" / f"{side}.txt")) for side in ("train", "test"))
    assert (len(train), len({p.prompt for p in train})) == (42061, 4862)
    assert (len(test), len({p.prompt for p in test})) == (4693, 630)
    assert all(pair.owner for pair in train + test)
    assert len({pair.owner for pair in train}) == 34


TRIPLES = [("Aarhus_Airport", "cityServed", "Aarhus, Denmark"), ("Aarhus_Airport", "elevation", "25.0")]
SAID = ["Aarhus airport serves Aarhus , Denmark .", "Aarhus is served by an airport ."]


def webnlg_json(folder: Path) -> None:
    triples = [dict(zip(("subject", "property", "object"), t, strict=True)) for t in TRIPLES]
    entry = {
        "category": "Airport", "size": "2", "modifiedtripleset": triples,
        "lexicalisations": [{"comment": "good", "lex": text, "xml_id": f"Id{i}"} for i, text in enumerate(SAID)],
    }  # fmt: skip
    for side in ("train", "test"):
        (folder / f"{side}.json").write_text(json.dumps({"entries": [{"1": entry}]}))


def webnlg_xml(folder: Path) -> None:
    triples = "".join(f"<mtriple>{' | '.join(t)}</mtriple>" for t in TRIPLES)
    said = "".join(f'<lex comment="good" lid="Id{i}" lang="en">{text}</lex>' for i, text in enumerate(SAID))
    entry = (
        f'<entry category="Airport" eid="1" size="2"><originaltripleset><otriple>x</otriple></originaltripleset>'
        f'<modifiedtripleset>{triples}</modifiedtripleset>{said}<lex lang="da">Lufthavn</lex></entry>'
    )
    for side in ("train", "test"):
        (folder / side / "2triples").mkdir(parents=True)
        (folder / side / "2triples" / "Airport.xml").write_text(
            f"<benchmark><entries>{entry}</entries></benchmark>", encoding="utf-8"
        )


@pytest.mark.parametrize("write", [webnlg_json, webnlg_xml])
def test_webnlg_in_both_its_formats(write: Any, tmp_path: Path, tiny: str) -> None:
    write(tmp_path)
    data = load("webnlg", str(tmp_path), tokenizer=tiny)
    ((prompt, said),) = data.prompts
    expected = "Aarhus_Airport : cityServed : Aarhus, Denmark | Aarhus_Airport : elevation : 25.0"
    assert tokenizer(tiny).decode(prompt[:-1]) == expected
    assert (said, data.owner_names, len(data.train[0])) == (tuple(SAID), ("Airport",), 2)


def test_long_sequences_lose_their_end_and_long_prompts_are_refused(tiny: str) -> None:
    pair = [Pair("a b c", "d e f", "")]
    assert from_pairs("mine", pair, pair, tokenizer=tiny, length=6).train[1].tolist() == [[4, 6]]
    with pytest.raises(ValueError, match="prompts of 4 tokens; set a length of more"):
        from_pairs("mine", pair, pair, tokenizer=tiny, length=4)


def test_kept_tokens_are_the_same(folder: Path, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load("e2e", str(folder), tokenizer=tiny).fingerprint()
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    assert [load("e2e", str(folder), tokenizer=tiny).fingerprint() for _ in range(2)] == [made, made]
    longer = load("e2e", str(folder), tokenizer=tiny, loss="all")
    assert longer.fingerprint() != made


def test_files_and_tokenizers_that_will_not_do_are_refused(folder: Path, tiny: str, shared: Path) -> None:
    with pytest.raises(ValueError, match="has no end of text"):
        load("e2e", str(folder), tokenizer=str(shared / "tokenizers" / "bert-base-uncased"))
    (folder / "test.txt").write_text("name : Cotto\n")
    with pytest.raises(ValueError, match=r"test.txt:1 is not a line"):
        load("e2e", str(folder), tokenizer=tiny)
    for name, words in (("e2e", "there is no trainset.csv"), ("webnlg", "there are no .xml files")):
        with pytest.raises(ValueError, match=words):
            load(name, str(shared / "data" / "glue"), tokenizer=tiny)
        with pytest.raises(ValueError, match=r"needs dataset.folder"):
            load(name, tokenizer=tiny)
