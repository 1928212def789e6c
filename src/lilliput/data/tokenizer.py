"""Tokenizers by folder, file or name, offline where that is possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lilliput.core.sources import from_hub, is_place, line, place, transformers


def tokenizer(source: str) -> Any:
    """The tokenizer of a folder, a tokenizer.json or a name on the Hugging Face hub; the network is asked last.

    `bytes` needs no file: the 256 bytes of UTF-8 after three special tokens (ByT5).

    It is a `transformers` tokenizer: `t(text).input_ids`, `t.decode(ids)`, `len(t)`, `t.eos_token_id`.
    Raises ValueError, naming the source and what to do, for one that cannot be had or read.
    """
    library = transformers()
    if source == "bytes":
        return library.ByT5Tokenizer(extra_ids=0)
    if source.endswith(".json"):
        return _of_file(library, place(source, "tokenizer"))
    if is_place(source):
        folder = str(place(source, "tokenizer"))
        return _read(source, lambda: library.AutoTokenizer.from_pretrained(folder, local_files_only=True))
    return _read(source, lambda: from_hub(library.AutoTokenizer.from_pretrained, source))


def definition(tokenizer: Any) -> str:
    """What decides the tokens of a tokenizer, as text: equal ones give equal tokens."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.to_str()
    return json.dumps(tokenizer.get_vocab(), sort_keys=True)


def _of_file(library: Any, path: Path) -> Any:
    """A bare tokenizer.json says nothing of special tokens beyond their names; the usual ones are looked up in it."""
    made = _read(str(path), lambda: library.PreTrainedTokenizerFast(tokenizer_file=str(path)))
    usual = {"eos_token": ("<|endoftext|>", "</s>", "[SEP]"), "pad_token": ("<pad>", "[PAD]")}
    known = made.get_vocab()
    made.add_special_tokens(
        {role: found for role, names in usual.items() if (found := next((n for n in names if n in known), None))}
    )
    return made


def _read(source: str, load: Any) -> Any:
    try:
        return load()
    except Exception as error:  # the library raises whatever a damaged file or the network makes it
        words = line(error)
        if "sentencepiece" in words.lower() or "tiktoken" in words.lower():
            raise ValueError(f"tokenizer {source!r} is of sentencepiece; pip install sentencepiece") from error
        remedy = "name a folder with tokenizer.json or vocab.json and merges.txt, or go online"
        raise ValueError(f"tokenizer {source!r} cannot be loaded ({words}); {remedy}") from error
