"""Tokenizers come from folders, files and names, and say what is wrong in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lilliput.core.sources import from_hub
from lilliput.data.tokenizer import tokenizer


@pytest.mark.parametrize(
    "name, size, last", [("gpt2", 50257, 50256), ("gpt2-tiny-5k", 5000, 4999), ("bert-base-uncased", 30522, None)]
)
def test_a_folder_of_vocabulary_files(shared: Path, name: str, size: int, last: int | None) -> None:
    t = tokenizer(str(shared / "tokenizers" / name))
    assert (len(t), t.eos_token_id) == (size, last)


def test_gpt2_gives_text_back(shared: Path) -> None:
    t = tokenizer(str(shared / "tokenizers" / "gpt2"))
    assert t("hello world").input_ids == [31373, 995]  # its published vocabulary
    assert t.decode(t("Café £ 30 ||").input_ids) == "Café £ 30 ||"


def test_a_bare_file_knows_its_end_of_text(shared: Path) -> None:
    t = tokenizer(str(shared / "tokenizers" / "gpt2" / "tokenizer.json"))
    assert (len(t), t.eos_token_id, t("hello world").input_ids) == (50257, 50256, [31373, 995])


def test_sentencepiece_or_how_to_have_it(shared: Path) -> None:
    source = str(shared / "tokenizers" / "t5")
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install sentencepiece"):
            tokenizer(source)
    else:
        assert (len(tokenizer(source)), tokenizer(source).eos_token_id) == (32100, 1)


def test_what_is_not_there_or_damaged_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer at './nowhere'"):
        tokenizer("./nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ValueError, match="cannot be loaded") as caught:
            tokenizer(str(source))
        assert "\n" not in str(caught.value)


def test_the_hub_is_asked_only_for_what_is_not_kept() -> None:
    asked = []

    def load(name: str, local_files_only: bool = False) -> str:
        asked.append(local_files_only)
        if local_files_only and name == "new":
            raise OSError("not kept")
        return name

    assert (from_hub(load, "kept"), asked) == ("kept", [True])
    asked.clear()
    assert (from_hub(load, "new"), asked) == ("new", [True, False])
