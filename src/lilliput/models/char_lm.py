"""A small causal transformer over characters: GPT-2's pre-norm blocks (Radford et al., 2019), small enough for devices.

Differences from GPT-2: the output layer is not tied to the embedding, and there is no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); shapes (N, L, hidden) throughout."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.project = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)

    def attend(self, x: Tensor) -> Tensor:
        """Causal attention: at each position, a weighted mean of the values up to it."""
        n, length, hidden = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (N, heads, L, hidden / heads)
        return self.project(out.transpose(1, 2).reshape(n, length, hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class CharLM(nn.Module):
    """A small GPT-2-style transformer that predicts the next character; 0.8M parameters by default.

    Takes texts of at most `shape[0]` characters from an alphabet of `classes`.  Initialisation is GPT-2's: weights
    normal with std 0.02, divided by sqrt(2 * layers) if they write into the residual stream, biases 0, norms 1 and 0.
    """

    def __init__(
        self, *, shape: Sequence[int], classes: int, hidden: int = 128, layers: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        if len(shape) != 1:
            raise ValueError(f"char_lm takes texts (length,), not shape {tuple(shape)}; try cnn or mlp")
        if hidden % heads:
            raise ValueError(f"hidden={hidden} does not divide into heads={heads}; choose a divisor of {hidden}")
        self.embedding = nn.Embedding(classes, hidden)
        self.position = nn.Embedding(shape[0], hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, classes, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                residual = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Characters (N, L) int64 to logits (N, L, classes)."""
        length, most = x.shape[1], self.position.num_embeddings
        if length > most:
            raise ValueError(f"a text of {length} characters exceeds the {most} positions of this model; cut it")
        h = self.embedding(x) + self.position(torch.arange(length, device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.out(self.norm(h))
