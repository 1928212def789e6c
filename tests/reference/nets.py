"""A small network that has every trait which training has been wrong about."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH, CLASSES = 6, 4


class Transposed(nn.Module):
    """A layer whose weight's gradient lies transposed (einsum) or is expanded (a sum over the weight)."""

    def __init__(self, layout: str):
        super().__init__()
        self.layout = layout
        self.weight = nn.Parameter(torch.randn((5, WIDTH) if layout == "transposed" else (WIDTH, 5)) / 3)
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "einsum":
            return torch.einsum("...i,oi->...o", x, self.weight) + self.bias
        if self.layout == "transposed":
            return x @ self.weight + self.bias
        if self.layout == "expanded":
            return nn.functional.linear(x, self.weight) + self.bias + self.weight.sum() * x.mean()
        return nn.functional.linear(x, self.weight, self.bias)


class Counter(nn.Module):
    """Counts its forwards, and lets the output depend on them."""

    def __init__(self, persistent: bool):
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return x * (1 + 0.05 * self.seen)


class Flat(nn.Module):
    """BatchNorm over all but the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.reshape(-1, WIDTH)).view(x.shape)


def normed(kind: str) -> nn.Module:
    if kind == "batch":
        return Flat()
    if kind == "spectral":
        return torch.nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
    return nn.Identity() if kind == "none" else Counter(persistent=kind == "counter")


class Net(nn.Module):
    """Two blocks, a branch, and a head that may be tied; `s` names the traits.  The seed decides the weights."""

    def __init__(self, s: dict[str, Any]):
        super().__init__()
        torch.manual_seed(s["seed"])
        self.first = Transposed(s["layout"])
        shared = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.Sequential(
            # Before BatchNorm the gradient of a bias is rounding alone, which adaptive optimizers blow up.
            nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=s["norm"] != "batch"), normed(s["norm"]), nn.Tanh()),
            shared,
            nn.Tanh(),
            shared if s["twice"] else nn.Linear(WIDTH, WIDTH),
        )
        self.branch = nn.Linear(WIDTH, WIDTH) if s["branch"] != "none" else None
        self.sometimes = s["branch"] == "sometimes"
        self.middle = nn.Linear(WIDTH, WIDTH)
        if s["tied"]:
            self.middle.weight = self.blocks[0][0].weight
        self.head = nn.Linear(WIDTH, CLASSES)
        if s["frozen"]:
            self.blocks[1].requires_grad_(False)
        if s["whole"]:
            self.offset = nn.Parameter(torch.tensor(2), requires_grad=False)
        self.to(getattr(torch, s["dtype"]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.tanh(self.first(x)))
        if self.branch is not None and self.sometimes and x.sum() > 0:
            x = x + self.branch(x)
        return self.head(torch.relu(self.middle(x)) + getattr(self, "offset", 0))
