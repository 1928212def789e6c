"""The data that come along."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lilliput.data import embedded, load
from lilliput.data.text import ASCII, UNKNOWN, decode, encode, from_texts, windows


def test_digits_are_scikit_learns_each_once():
    d = load("digits")
    from sklearn.datasets import load_digits

    assert d.train[0].dtype == torch.float32 and d.shape == (1, 8, 8) and (d.kind, d.classes) == ("image", 10)
    assert len(d.test[0]) == 1797 // 5 and d.train[0].min() == 0 and d.train[0].max() == 1
    ours = torch.cat([torch.cat([x.flatten(1) * 16, y[:, None].float()], 1) for x, y in (d.train, d.test)])
    bunch = load_digits()
    theirs = torch.cat([torch.tensor(bunch.data).float(), torch.tensor(bunch.target)[:, None].float()], 1)
    assert sorted(ours.tolist()) == sorted(theirs.tolist())
    assert load("digits").fingerprint() == d.fingerprint()


def test_stdlib_is_source_text_of_its_owners():
    d = load("stdlib", length=100)
    assert d.owner_names == tuple(p for p in embedded.PACKAGES if importlib.util.find_spec(p))
    assert d.tokens_per_example == 100 and d.classes == len(d.vocabulary) == 97 and d.kind == "text"
    json = d.owner_names.index("json")
    text = decode(d.train[0][d.owners == json])
    assert embedded.source("json").startswith(text[:5000]) and "def dumps" in text
    assert (d.owners.bincount() > 0).all() and len(d.test_owners.unique()) == len(d.owner_names)
    assert "class TestCase" in decode(d.train[0][d.owners == d.owner_names.index("unittest")])


def test_source_leaves_tests_out(tmp_path, monkeypatch):
    package = tmp_path / "package_with_tests"
    for file in ("__init__.py", "b.py", "a/c.py", "test/t.py", "a/tests/t.py"):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(f"# {file}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert embedded.source("package_with_tests") == "# __init__.py\n# a/c.py\n# b.py\n"


def test_a_package_that_is_missing_is_left_out(monkeypatch):
    monkeypatch.setattr(embedded, "PACKAGES", ("json", "no_such_package_here", "html"))
    assert load("stdlib").owner_names == ("json", "html")


def test_windows_follow_one_another_and_labels_are_the_next_character():
    ids = encode("abcdefgh")
    x, y = windows(ids, 3)
    assert [decode(row) for row in x] == ["abc", "def"] and [decode(row) for row in y] == ["bcd", "efg"]
    assert len(windows(ids[:3], 3)[0]) == 0  # the last character would have no successor
    assert len(windows(ids[:4], 3)[0]) == 1


def test_encoding_is_a_lookup_with_one_place_for_all_others():
    text = "a\tZ~\u00e9\U0001f600\n"
    assert decode(encode(text)) == f"a{UNKNOWN}Z~{UNKNOWN}{UNKNOWN}\n"
    assert encode(ASCII).tolist() == list(range(97))


def test_owners_without_a_window_are_left_out():
    d = from_texts("t", {"a": ("x" * 11, "y" * 6), "b": ("x", "y" * 20), "c": ("z" * 6, "")}, length=5)
    assert d.owner_names == ("a", "c") and d.owners.tolist() == [0, 0, 1] and d.test_owners.tolist() == [0]
    assert decode(d.test[0], d.vocabulary) == UNKNOWN * 5  # y occurs in no training text that counts
    with pytest.raises(ValueError, match="choose a shorter length"):
        from_texts("t", {"a": ("short", "")}, length=80)


@pytest.mark.parametrize("options", [{"length": 0}, {"test_share": 1.5}])
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        load("stdlib", **options)


def test_digits_without_scikit_learn_name_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"digits needs scikit-learn; pip install 'lilliput\[run\]'"):
        load("digits")


def test_digits_are_the_same_where_their_file_lies_elsewhere(monkeypatch):
    expected = load("digits").fingerprint()
    monkeypatch.setattr(embedded, "Path", lambda *parts: Path(*parts[:-1], "moved.gz"))
    assert load("digits").fingerprint() == expected
