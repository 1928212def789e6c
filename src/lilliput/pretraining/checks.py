"""What can be told to be wrong before the first step: tokenizer, positions, text."""

from __future__ import annotations

from typing import Any

from torch import nn

from lilliput.core.registry import is_path
from lilliput.data.corpus import Corpus
from lilliput.pretraining.config import Pretrain
from lilliput.pretraining.parallel import World


def check_model(c: Pretrain, model: nn.Module, tokenizer: Any) -> None:
    """Raise ValueError if the model has no number for a token, or no place for a sequence."""
    embedding = _embedding(model)
    largest = largest_id(tokenizer)
    if embedding is not None and largest >= embedding.num_embeddings:
        raise ValueError(
            f"tokenizer {c.tokenizer} numbers tokens up to {largest}, but {c.model} has a vocabulary of "
            f"{embedding.num_embeddings}; set model.vocab_size={-(-(largest + 1) // 128) * 128}, or another tokenizer"
        )
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is not None and c.max_length > positions:
        raise ValueError(
            f"max_length={c.max_length} exceeds the {positions} positions of {c.model}; "
            f"set model.max_position_embeddings={c.max_length}, or max_length={positions}"
        )


def _embedding(model: nn.Module) -> Any:
    get: Any = getattr(model, "get_input_embeddings", None)
    return get() if get is not None else next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)


def largest_id(tokenizer: Any) -> int:
    """The largest number that text can give.  Sentinels, such as T5's extra ids, stand in no text."""
    ends = {getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos", "pad", "unk")}
    sentinels = set(getattr(tokenizer, "all_special_ids", ())) - ends
    return max(set(tokenizer.get_vocab().values()) - sentinels)


def check_memory(c: Pretrain, world: World) -> None:
    """Raise ValueError, saying how much is missing and what would make it fit, if a step needs more than there is.

    A model of a user's own is not known before it is there, and a shard's need is not estimated.
    """
    from lilliput import footprint

    if is_path(c.model) or (c.parallel == "fsdp" and world.size > 1):
        return
    same = ("model_options", "optimizer", "optimizer_options", "accumulate", "max_length", "dtype", "precision",
            "per_layer", "checkpointing", "lean", "lora")  # fmt: skip
    settings = {name: getattr(c, name) for name in same}
    footprint.check(
        c.model, c.memory, batch_size=c.batch_size // world.size, device=world.device.type, **settings
    )  # fmt: skip


def check_text(c: Pretrain, train: Corpus, validation: Corpus) -> None:
    """Raise ValueError if either side has no document with text."""
    for side, remedy in ((train, "name another with data="), (validation, "raise held_out=, or name validation=FILE")):
        if not any(side.has(text) for text in side.source.documents()):
            what = "training" if side is train else "validation"
            raise ValueError(f"{c.data} holds no usable text for {what}; {remedy}")
