"""The stacked character LSTM of McMahan et al. (AISTATS 2017, https://arxiv.org/abs/1602.05629).

An embedding of 8, two layers of 256 and a linear output.  The paper predicts the character after 80 others; here every
position predicts the next one.  torch's LSTM has two bias vectors per gate, the paper's has one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class CharLSTM(nn.Module):
    """McMahan's stacked LSTM that predicts the next character (AISTATS 2017); 0.8M parameters by default.

    `classes` is the size of the alphabet.  Initialisation is torch's: embedding standard normal, LSTM uniform within
    1 / sqrt(hidden), linear within 1 / sqrt(inputs).
    """

    def __init__(
        self, *, shape: Sequence[int], classes: int, embedding: int = 8, hidden: int = 256, layers: int = 2
    ) -> None:
        super().__init__()
        if len(shape) != 1:
            raise ValueError(f"char_lstm takes texts (length,), not shape {tuple(shape)}; try cnn or mlp")
        self.embedding = nn.Embedding(classes, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.out = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Characters (N, L) int64 to logits (N, L, classes)."""
        return self.out(self.lstm(self.embedding(x))[0])
