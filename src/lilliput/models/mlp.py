"""The multilayer perceptron "2NN" (McMahan et al., AISTATS 2017), for examples of any shape.

https://arxiv.org/abs/1602.05629  Two hidden layers of 200 and ReLU: 199,210 parameters for 784 inputs and 10 classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """A multilayer perceptron for examples of any shape: by default two hidden layers of 200 with ReLU (2NN).

    hidden: widths of the hidden layers
    Initialisation is torch's for nn.Linear: weights and biases uniform within 1 / sqrt(inputs).
    """

    def __init__(self, *, shape: Sequence[int], classes: int, hidden: Sequence[int] = (200, 200)) -> None:
        super().__init__()
        widths = [math.prod(shape), *hidden]
        self.hidden = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths))
        self.out = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Examples (N, ...) to logits (N, classes)."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = layer(x).relu()
        return self.out(x)
