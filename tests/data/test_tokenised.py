"""Any text as a data set of token sequences: every token once, the owners that a source has, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lilliput import data
from lilliput.data.corpus import count
from lilliput.data.tokenised import Texts

pytest.importorskip("transformers")

OFFSET = 3  # the special tokens of the tokenizer `bytes`, whose end of text is 1
END = 1


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve documents of 10 to 21 letters by two authors, and two that are held out."""
    lines = [{"text": chr(97 + i) * (10 + i), "author": "ann" if i % 3 else "bob"} for i in range(12)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = [{"text": letter * 15, "author": "eve"} for letter in "yz"]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held))
    return tmp_path


def bytes_of(text: str) -> list[int]:
    return [OFFSET + b for b in text.encode()]


def test_packed_sequences_hold_every_token_once(folder: Path) -> None:
    d = data.load("corpus", str(folder), length=8)
    stream = [t for i in range(12) for t in [*bytes_of(chr(97 + i) * (10 + i)), END]]
    (tokens, spans), n = d.train, (len(stream) - 1) // 8
    assert d.kind == "tokens" and d.shape == (8,) and tokens.dtype == torch.int32 and tokens.shape == (n, 9)
    assert tokens[:, :8].flatten().tolist() == stream[: 8 * n] and tokens[:, 8].tolist() == stream[8 : 8 * n + 1 : 8]
    assert spans.tolist() == [[1, 9]] * n and d.tokens_per_example == 8
    assert d.test[0][0].tolist() == bytes_of("y" * 9) and d.owners is None and d.test_owners is None


def test_a_document_alone_is_cut_or_padded(folder: Path) -> None:
    d = data.load("corpus", str(folder), length=12, packing=False)
    tokens, spans = d.train
    assert spans[:, 1].tolist() == [11] + [12] * 11 and (spans[:, 0] == 1).all()
    assert tokens[0].tolist() == [*bytes_of("a" * 10), END, 0, 0]
    assert tokens[11].tolist() == [*bytes_of("l" * 11), END, 0]


def test_a_budget_takes_the_first_of_every_owner(folder: Path) -> None:
    whole = data.load("corpus", str(folder), length=8)
    few = data.load("corpus", str(folder), length=8, tokens=40, validation_tokens="0.01K")
    assert torch.equal(few.train[0], whole.train[0][:5]) and len(few.test[0]) == 2
    each = data.load("corpus", str(folder), length=8, tokens=40, owner="author")
    assert np.bincount(each.owners).tolist() == [3, 3]


def test_an_author_is_a_client(folder: Path) -> None:
    d = data.load("corpus", str(folder), length=8, owner="author")
    assert d.owner_names == ("ann", "bob") and d.test_owners is None  # eve's text was named for validation
    federated = data.federate(d, "auto", batch_size=4)
    assert sorted(federated.train) == [0, 1]
    letters = {int(t) for batch in federated.train[1].epoch(None) for t in batch["input_ids"].flatten()} - {END}
    assert letters == {*bytes_of("adgj")}


def test_a_file_is_a_client_and_tests_on_what_it_holds_out(tmp_path: Path) -> None:
    for name, times in (("b", 1), ("a", 40), ("c", 40)):
        lines = (json.dumps({"text": f"{name}{i} " * (9 if times > 1 else 1)}) for i in range(times))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    d = data.load("corpus", str(tmp_path), length=16, held_out=0.5)
    assert d.owner_names == ("a.jsonl", "c.jsonl", "b.jsonl")  # whose text makes no sequence comes last
    assert d.owners is not None and d.test_owners is not None
    for (tokens, _), owners in ((d.train, d.owners), (d.test, d.test_owners)):
        assert sorted(set(owners.tolist())) == [0, 1]
        for row, owner in zip(tokens.tolist(), owners.tolist(), strict=True):
            assert {t for t in row if t in bytes_of("abc")} == {*bytes_of("ac"[owner])}


def test_the_standard_librarys_packages_are_clients() -> None:
    d = data.load("corpus", source="stdlib", length=32, tokens="10K", validation_tokens="2K")
    assert d.owner_names[:2] == ("asyncio", "collections") and d.classes == 259
    assert np.bincount(d.owners)[:19].min() >= 500 // 33


def test_what_is_kept_is_read_from_disk_as_it_was_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = data.load("corpus", str(folder), length=8, owner="author")
    monkeypatch.setenv("LILLIPUT_CACHE", str(folder / "cache"))
    made, kept = (data.load("corpus", str(folder / "a.jsonl"), validation=str(folder / "validation.jsonl"), length=8,
                            owner="author") for _ in range(2))  # fmt: skip
    assert fresh.fingerprint() == made.fingerprint() == kept.fingerprint()
    assert len(list((folder / "cache").iterdir())) == 1
    monkeypatch.setattr("lilliput.data.sequences.Sequences.batch", None)  # nothing is cut again
    assert data.federate(
        data.load("corpus", str(folder / "a.jsonl"), validation=str(folder / "validation.jsonl"), length=8,
                  owner="author"), "natural").fingerprint == data.federate(made, "natural").fingerprint  # fmt: skip


def test_prompts_are_first_halves_of_what_is_held_out(folder: Path) -> None:
    prompts = data.load("corpus", str(folder), length=8, validation_tokens=12).prompts
    assert prompts == ((tuple(bytes_of("yyyy")), ("yyyyy", "yyyz")),)


def test_c4_gives_as_many_tokens_as_are_asked_for_and_tests_on_its_own_split(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"train": ["a" * 20] * 10**5, "validation": ["b" * 20] * 10**5}  # more than is read
    monkeypatch.setattr("lilliput.data.corpus._c4", lambda split: Texts(tuple(texts[split])))
    d = data.load("corpus", source="c4", tokens="200", validation_tokens=50, length=16, packing=False)
    assert d.train[0].tolist() == [[*bytes_of("a" * 15), END, 0]] * 13 and len(d.test[0]) == 4 and d.owners is None
    assert int(d.test[0][0][0]) == bytes_of("b")[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs one of dataset.source .* and dataset.folder"),
        ({"source": "c4"}, "dataset.tokens=100M"),
        ({"source": "stdlib", "tokens": "many"}, "tokens=many is not a number of tokens"),
        ({"source": "stdlib", "length": 1}, "length is 1"),
        ({"source": "stdlib", "owner": "author"}, "owner=author is a field of"),
        ({"source": "nowhere"}, "there is no text at 'nowhere'"),
    ],
)
def test_what_cannot_be_had_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        data.load("corpus", **options)


def test_text_too_short_for_a_sequence_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no train sequence of length=500; choose a shorter length"):
        data.load("corpus", str(folder), length=500)
    with pytest.raises(ValueError, match=r"no test sequence of length=40; .* or name validation text"):
        data.load("corpus", str(folder), length=40)


def test_a_missing_field_is_named(folder: Path) -> None:
    for options in ({"key": "body"}, {"owner": "writer"}):
        with pytest.raises(ValueError, match=r"there is text, author; set text_key \(dataset.key"):
            data.load("corpus", str(folder), **options)


def test_numbers_of_tokens_are_written_short() -> None:
    assert [count(x, "tokens") for x in (5000, "1e3", "2.5K", "100M", "1.1B")] == [
        5000, 1000, 2500, 10**8, 1_100_000_000,
    ]  # fmt: skip
