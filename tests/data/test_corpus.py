"""Any text is a stream of documents, split once and for all, and comes back to the token where it was left."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from lilliput.data.ahead import Ahead
from lilliput.data.corpus import PIECE, Corpus, Files, Hub, corpora
from lilliput.data.sequences import IGNORED, Position, Sequences

TEXTS = [f"document {i} " + "word " * (i % 7) for i in range(40)]


class Characters:
    """A tokenizer of characters, in the shape of transformers' own."""

    eos_token_id = 0

    def __call__(self, texts, truncation=False, max_length=None, **_):
        return {"input_ids": [[ord(c) for c in text][: max_length if truncation else None] for text in texts]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "train.jsonl").write_text(lines)
    return tmp_path


def everything(source) -> list[str]:
    return list(source.documents())


@pytest.mark.parametrize("kind", ["jsonl", "json.gz", "parquet"])
def test_every_format_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    if kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"text": TEXTS}), file)
    else:
        file.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    source = corpora(str(file))[0].source
    assert everything(source) == TEXTS
    assert list(source.documents(skip=13)) == TEXTS[13:]


def test_a_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" + "\n" * (i % 5 == 0) for i in range(5000))
    (tmp_path / "a.txt").write_text(text)
    pieces = everything(Files((tmp_path / "a.txt",)))
    assert "".join(pieces) == text and len(pieces) > 3
    assert all(PIECE <= len(p) <= 2 * PIECE + 20 and p.endswith("\n\n") for p in pieces[:-1])


def test_c4_streams_from_a_stand_in_of_the_hub(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "en").mkdir()
    for split in ("train", "validation"):
        rows = "".join(json.dumps({"text": f"{split} {t}", "url": "u"}) + "\n" for t in TEXTS).encode()
        (tmp_path / "en" / f"c4-{split}.00000-of-00001.json.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/c4-train.*.json.gz\n"
        "  - split: validation\n    path: en/c4-validation.*.json.gz\n---\n"
    )
    source = Hub(str(tmp_path), "en", "validation")
    assert everything(source) == [f"validation {t}" for t in TEXTS]
    assert list(source.documents(skip=30)) == [f"validation {t}" for t in TEXTS[30:]]


def test_the_hub_out_of_reach_says_what_to_do() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"go online, or name local files"):
        next(Hub("nobody/nothing", None, "train").documents())


def test_files_named_so_are_the_validation(folder: Path) -> None:
    (folder / "validation.jsonl").write_text(json.dumps({"text": "held"}) + "\n")
    train, validation, words = corpora(str(folder))
    assert everything(train.source) == TEXTS and everything(validation.source) == ["held"]
    assert "validation.jsonl" in words


def test_a_held_out_share_parts_the_documents(folder: Path) -> None:
    train, validation, words = corpora(str(folder), held_out=0.3)
    sides = [[text for text in everything(c.source) if c.has(text)] for c in (train, validation)]
    assert sorted(sides[0] + sides[1]) == sorted(TEXTS) and 4 <= len(sides[1]) <= 20
    assert "30 %" in words


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": 3}\n', "no text 'text'; there is text"),
        (b'{"content": "x"}\n', "there is content; set text_key"),
        (b"{oops\n", r"a.jsonl:1 is not JSON"),
        (b"[1]\n", "no text 'text'"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line)
    with pytest.raises(ValueError, match=words):
        everything(Files((tmp_path / "a.jsonl",)))


def test_a_cut_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 9999)[:-20])
    with pytest.raises(ValueError, match=r"a\.json\.gz is damaged"):
        everything(Files((tmp_path / "a.json.gz",)))


def test_what_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no text at"):
        corpora(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no text"):
        corpora(str(tmp_path))
    with pytest.raises(ValueError, match="held_out is 1"):
        corpora("stdlib", held_out=1)


def stream(folder: Path, **options) -> Sequences:
    return Sequences(Corpus(Files((folder / "train.jsonl",))), Characters(), 16, **{"packing": True, **options})


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [0, 7, 1000])
def test_a_stream_goes_on_from_its_position(folder: Path, packing: bool, shuffle: int) -> None:
    whole = stream(folder, packing=packing, shuffle=shuffle)
    for _ in range(17):  # beyond the first epoch
        whole.batch(5)
    rest = stream(folder, packing=packing, shuffle=shuffle, position=whole.position)
    for _ in range(9):
        a, b = whole.batch(3), rest.batch(3)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_packed_sequences_hold_every_token_once(folder: Path) -> None:
    s, tokens = stream(folder, shuffle=0, repeat=False), [ord(c) for t in TEXTS for c in (*t, "\0")]
    batches = []
    while batch := s.batch(4):
        batches.append(batch)
    seen = torch.cat([b["input_ids"] for b in batches]).flatten().tolist()
    labels = torch.cat([b["labels"] for b in batches]).flatten().tolist()
    assert seen == tokens[: len(seen)] and labels == tokens[1 : len(labels) + 1]
    assert len(tokens) - 16 <= len(seen) + 1 <= len(tokens)


def test_padded_sequences_are_documents_and_padding_does_not_count(folder: Path) -> None:
    batch = stream(folder, packing=False, shuffle=0).batch(8)
    for text, ids, labels in zip(TEXTS, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=False):
        kept = [ord(c) for c in text][:16]
        assert ids == (kept + [0] * 16)[:16]
        assert labels == (kept[1:] + [IGNORED] * 16)[:16]


def test_processes_share_the_documents_out(folder: Path) -> None:
    whole = stream(folder, packing=False, shuffle=9)
    parts = [stream(folder, packing=False, shuffle=9, rank=rank, world=2) for rank in range(2)]
    for _ in range(12):
        together = whole.batch(6)["input_ids"]
        for rank, part in enumerate(parts):
            assert torch.equal(part.batch(3)["input_ids"], together[rank::2])


def test_an_epoch_is_in_another_order(folder: Path) -> None:
    s = stream(folder, packing=False)
    first, second = (s.batch(len(TEXTS))["input_ids"] for _ in range(2))
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist())


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": " "}\n{"text": null}\n')
    with pytest.raises(ValueError, match="no document with text"):
        stream(tmp_path).batch(1)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_batches_made_ahead_are_the_same_and_so_are_their_positions(folder: Path, depth: int) -> None:
    plain, ahead = stream(folder), Ahead(stream(folder), 4, depth)
    for _ in range(9):
        a, b = plain.batch(4), ahead.batch()
        assert all(torch.equal(a[name], b[name]) for name in a) and ahead.position == plain.position
    ahead.close()


def test_what_goes_wrong_ahead_is_raised_where_the_batch_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": ""}\n')
    ahead = Ahead(stream(tmp_path), 4, 2)
    with pytest.raises(ValueError, match="no document with text"):
        ahead.batch()
    ahead.close()
    end = Ahead(stream(tmp_path, repeat=False), 4, 2)
    assert end.batch() is None
    end.close()


def test_positions_are_values(folder: Path) -> None:
    s = stream(folder, shuffle=0, packing=False)
    s.batch(2)
    assert s.position == Position(epoch=0, document=2, kept=2)


@pytest.mark.parametrize(
    ("data", "tokenizer", "documents"),
    [
        ("openwebtext-sample", "t5", (800, 100)),
        ("commoncrawl-sample", "gpt2", (19, 1)),
        ("wikitext-2/valid.txt", "gpt2-tiny-5k", None),
        ("tinyshakespeare", "gpt2-tiny-5k", None),
        ("stdlib", "gpt2-tiny-5k", None),
    ],
)
def test_real_text_is_parted_and_tokenised(shared: Path, data: str, tokenizer: str, documents) -> None:
    from lilliput.data.tokenizer import tokenizer as load

    pytest.importorskip("transformers")
    if tokenizer == "t5":
        pytest.importorskip("sentencepiece")
    where = data if data == "stdlib" else str(shared / "data" / data)
    sides = corpora(where, held_out=0.1)[:2]
    found = tuple(sum(map(side.has, side.source.documents())) for side in sides)
    assert found == documents if documents else min(found) > 5
    words = load(str(shared / "tokenizers" / tokenizer))
    batch = Sequences(sides[0], words, 128, packing=False, shuffle=50).batch(4)
    first = batch["input_ids"][0][: int((batch["labels"][0] != IGNORED).sum()) + 1]
    text = words.decode(first, skip_special_tokens=True).strip()
    assert any(text[:40] in " ".join(d.split()) or text[:40] in d for d in sides[0].source.documents())
