"""Small causal models of transformers, a batch, and how to compare what two of them give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

VOCABULARY, HIDDEN, MLP, LAYERS, HEADS = 97, 32, 80, 2, 4
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 32, "head_dim": 8,
    "attn_implementation": "sdpa",
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "tied": ("Llama", {**SIZES, "tie_word_embeddings": True}),
    "mistral": ("Mistral", SIZES),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES),
    "gpt2": ("GPT2", GPT2),
}


def make(family: str = "llama", **options: Any) -> Any:
    """A model in training mode, its weights always the same."""
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
    torch.manual_seed(0)
    return getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).train()


def example(rows: int = 3, tokens: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (rows, tokens + 1), generator=generator)
    labels = ids[:, 1:].contiguous()
    labels[0, :5] = -100
    return {
        "input_ids": ids[:, :-1].contiguous(),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.long),
        "labels": labels,
    }


def stock_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())


def results(model: nn.Module, batch: dict[str, Tensor], loss: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
    value = loss(model, batch)
    return value.detach(), list(torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad]))


def furthest(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of a gradient."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)) for a, b in pairs)
