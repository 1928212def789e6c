"""Tokenizers by folder, file or name, offline if possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lilliput.core.sources import from_hub, is_place, line, place, transformers


def tokenizer(source: str) -> Any:
    """Load the tokenizer of a folder, a tokenizer.json or a name on the Hugging Face hub; uses the network last.

    `bytes` needs no file: it has the 256 bytes of UTF-8 after three special tokens (ByT5).

    Returns a `transformers` tokenizer: `t(text).input_ids`, `t.decode(ids)`, `len(t)`, `t.eos_token_id`.
    Raises ValueError, with the source and a remedy, if it cannot be loaded.
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
    """The definition of a tokenizer as text: equal definitions give equal tokens."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.to_str()
    return json.dumps(tokenizer.get_vocab(), sort_keys=True)


def _of_file(library: Any, path: Path) -> Any:
    """Load a bare tokenizer.json.  It does not say which special token has which role, so look for the usual names."""
    made = _read(str(path), lambda: library.PreTrainedTokenizerFast(tokenizer_file=str(path)))
    usual = {"eos_token": ("<|endoftext|>", "</s>", "[SEP]"), "pad_token": ("<pad>", "[PAD]")}
    vocabulary = made.get_vocab()
    made.add_special_tokens(
        {role: token for role, names in usual.items() if (token := next((n for n in names if n in vocabulary), None))}
    )
    return made


def _read(source: str, load: Any) -> Any:
    try:
        return load()
    except Exception as error:  # a damaged file and the network raise errors of many types
        words = line(error)
        if "sentencepiece" in words.lower() or "tiktoken" in words.lower():
            raise ValueError(f"tokenizer {source!r} needs sentencepiece; pip install sentencepiece") from error
        remedy = "name a folder with tokenizer.json or vocab.json and merges.txt, or go online"
        raise ValueError(f"tokenizer {source!r} cannot be loaded ({words}); {remedy}") from error
