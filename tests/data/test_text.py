"""Texts from files are their characters, and a client's last part is its test."""

import json

import pytest
import torch

from lilliput.data import federate, load
from lilliput.data.text import UNKNOWN, decode


def test_a_folder_of_texts_has_a_client_per_file(tmp_path):
    (tmp_path / "b.txt").write_text("b" * 90 + "!" * 10)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("ä" * 200, encoding="utf-8")
    d = load("text", tmp_path, length=8)
    assert d.owner_names == ("b.txt", "sub/a.txt") and d.owners.bincount().tolist() == [11, 22]
    assert d.vocabulary == "bä" + UNKNOWN and d.classes == 3
    assert decode(d.test[0][d.test_owners == 0], d.vocabulary) == UNKNOWN * 8  # ! occurs in no training text
    one = load("text", tmp_path / "b.txt", length=8)
    assert one.owners is None and one.train[0].shape == (11, 8)


def test_clients_of_json_lines_keep_their_own_test_text(tmp_path):
    rows = [{"client_id": name, "train": name * 50, "test": name * 20} for name in "xyz"]
    rows.append({"client_id": "short", "train": "s" * 10, "test": "s" * 10})
    (tmp_path / "roles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    d = load("shakespeare_roles", tmp_path, length=9, min_chars=50)
    assert d.owner_names == ("x", "y", "z")
    f = federate(d, "auto")
    for client, name in enumerate("xyz"):
        assert {decode(x, d.vocabulary) for x in next(f.client_test[client].epoch(None))[0]} == {name * 9}


@pytest.mark.parametrize(
    "line",
    [b'{"client_id": "x", "train": "abc"}', b'{"client_id": "x", "train": 3, "test": "a"}', b"\xff\xfe", b"3", b"{"],
)
def test_a_line_that_is_no_client_is_named(line, tmp_path):
    (tmp_path / "roles.jsonl").write_bytes(b'{"client_id": "w", "train": "abcd", "test": ""}\n' + line)
    with pytest.raises(ValueError, match=r"roles\.jsonl:2 is not a line of client_id, train and test"):
        load("shakespeare_roles", tmp_path)


def test_shared_texts_count_as_published(shared):
    d = load("tinyshakespeare", shared / "data" / "tinyshakespeare", length=100)
    assert d.classes == 65 + 1
    whole = (shared / "data" / "tinyshakespeare" / "input.txt").read_text()
    assert decode(d.train[0], d.vocabulary) == whole[: d.train[0].numel()]
    assert torch.equal(d.train[0].flatten()[1:], d.train[1].flatten()[:-1])
    roles = load("shakespeare-roles", shared / "data" / "shakespeare-roles")
    assert len(roles.owner_names) == 607


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("text", {}, "text needs dataset.folder"),
        ("text", {"folder": "nowhere"}, "there is no data folder 'nowhere'"),
        ("text", {"folder": "."}, "there is no .txt file"),
        ("tinyshakespeare", {"folder": "."}, "there is no input.txt"),
        ("shakespeare_roles", {"folder": "."}, "there is no .jsonl file"),
    ],
)
def test_what_is_missing_is_said_with_the_remedy(name, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        load(name, **options)
