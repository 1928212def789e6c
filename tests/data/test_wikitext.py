"""WikiText-2 from the files of its releases: articles are documents, and the splits are found by their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lilliput import data
from lilliput.data.corpus import Files
from lilliput.data.wikitext import Articles

pytest.importorskip("transformers")

LINES = [
    " \n",
    " = One = \n",
    " \n",
    " Text of @-@ one . \n",
    " = = Part = = \n",
    " More . \n",
    " = Two = \n",
    " End . \n",
]
ARTICLES = [" \n", "".join(LINES[1:6]), "".join(LINES[6:])]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", "")


def written(folder: Path, release: str, splits: dict[str, str]) -> None:
    for name, ending in splits.items():
        if release == "parquet":
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            hub = {"valid": "validation"}.get(name, name)
            pq.write_table(pa.table({"text": [*LINES, ending]}), folder / f"{hub}-00000-of-00001.parquet")
        else:
            (folder / release.format(name)).write_text("".join([*LINES, ending]))


@pytest.mark.parametrize("release", ["wiki.{}.tokens", "wiki.{}.raw", "{}.txt", "parquet"])
def test_every_release_gives_the_same_sequences(tmp_path: Path, release: str) -> None:
    written(tmp_path, release, {"train": " t" * 20, "valid": " v" * 20, "test": " e" * 20})
    d = data.load("wikitext2", str(tmp_path), tokenizer="bytes", length=16)
    stream = [t for text in (*ARTICLES[1:2], ARTICLES[2] + " t" * 20) for t in [*(3 + b for b in text.encode()), 1]]
    tokens = d.train[0]
    assert tokens[:, :16].flatten().tolist() == stream[: 16 * len(tokens)]
    assert d.kind == "tokens" and d.owners is None and d.fingerprint() == of(tmp_path, "train", "test")
    assert of(tmp_path, "valid", "test") != of(tmp_path, "train", "test")


def of(folder: Path, train: str, test: str) -> str:
    return data.load("wikitext2", str(folder), tokenizer="bytes", length=16, train=train, test=test).fingerprint()


def test_articles_begin_at_titles_and_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(LINES))
    found = list(Articles(Files((tmp_path / "a.txt",))).documents())
    assert found == ARTICLES and list(Articles(Files((tmp_path / "a.txt",))).documents(2)) == ARTICLES[2:]


def test_a_split_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    written(tmp_path, "{}.txt", {"valid": "", "test": ""})
    with pytest.raises(ValueError, match=r"split train, and has test.txt, valid.txt; .* wikitext2.train=valid"):
        of(tmp_path, "train", "test")
    (tmp_path / "test.txt").unlink()
    with pytest.raises(ValueError, match=r"split test, and has valid.txt; .* wikitext2.test=valid"):
        data.load("wikitext2", str(tmp_path), tokenizer="bytes", train="valid")
    with pytest.raises(ValueError, match="train and test are both valid"):
        of(tmp_path, "valid", "valid")
    with pytest.raises(ValueError, match="no data folder"):
        of(tmp_path / "nowhere", "valid", "test")


def test_the_real_valid_split_has_sixty_articles(shared: Path) -> None:
    folder = shared / "data" / "wikitext-2"
    texts = [t for t in Articles(Files((folder / "valid.txt",))).documents() if t.strip()]
    assert len(texts) == 60
    d = data.load(
        "wikitext2", str(folder), tokenizer=str(shared / "tokenizers" / "gpt2"), train="valid", test="test", length=512
    )
    assert d.classes == 50257 and d.train[0].shape == (505, 513) and d.test[0].shape[0] == 578
    assert torch.equal(d.train[1], torch.tensor([[1, 513]], dtype=torch.int32).expand(505, 2))
