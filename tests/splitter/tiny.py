"""Tiny random models of `transformers`, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WORDS, LENGTH, HIDDEN, LAYERS = 61, 24, 16, 3
_TEXT = {
    "vocab_size": WORDS, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "intermediate_size": 20, "max_position_embeddings": LENGTH, "pad_token_id": 0,
}  # fmt: skip


def _text(name: str, kind: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**_TEXT, **options})
    return getattr(transformers, f"{name}{kind}")(config)


def gpt2(layers: int = LAYERS, **options: Any) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=HIDDEN, n_layer=layers, n_head=4, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _distilbert() -> nn.Module:
    import transformers

    config = transformers.DistilBertConfig(
        vocab_size=WORDS, max_position_embeddings=LENGTH, dim=HIDDEN, n_layers=LAYERS, n_heads=4, hidden_dim=20
    )
    return transformers.DistilBertForSequenceClassification(config)


def vit() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=20, image_size=8,
        patch_size=4,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(vocab_size=WORDS, d_model=HIDDEN, d_kv=4, d_ff=20, num_layers=LAYERS, num_heads=4)
    return transformers.T5EncoderModel(config)


def _opt() -> nn.Module:
    import transformers

    config = transformers.OPTConfig(
        vocab_size=WORDS, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, ffn_dim=20,
        max_position_embeddings=LENGTH, word_embed_proj_dim=HIDDEN,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": lambda: _text("Llama", "ForCausalLM", num_key_value_heads=2),
    "mistral": lambda: _text("Mistral", "ForCausalLM", num_key_value_heads=2, sliding_window=4),
    "qwen2": lambda: _text("Qwen2", "ForCausalLM", num_key_value_heads=2),
    "bert": lambda: _text("Bert", "ForSequenceClassification"),
    "roberta": lambda: _text("Roberta", "ForSequenceClassification"),
    "distilbert": _distilbert,
    "vit": vit,
    "t5": t5,
    "opt": _opt,
    "phi": lambda: _text("Phi", "ForCausalLM"),
    "gemma2": lambda: _text("Gemma2", "ForCausalLM", num_key_value_heads=2, head_dim=4),
}


def batch(name: str, examples: int = 4, length: int = 9) -> dict[str, Tensor]:
    """Texts of different length, padded to the right; or images."""
    if name == "vit":
        return {"pixel_values": torch.randn(examples, 3, 8, 8)}
    ids = torch.randint(1, WORDS, (examples, length))
    mask = (torch.arange(length)[None] < length - torch.arange(examples)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
