"""Layers of width 8 whose forward moves something besides gradients, and depends on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import lilliput.tasks


class Counting(nn.Module):
    """x times a factor that grows with the forwards in training so far, counted in place, anew or as a plain number."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.n = kind, 0
        if kind != "plain":
            del self.n
            self.register_buffer("n", torch.tensor(0), persistent=kind == "buffer")

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if self.kind == "unsaved":
                self.n = self.n + 1
            else:
                self.n += 1
        return x * (1 + 0.1 * self.n)


class Remembering(nn.Module):
    """A plain tensor, changed in place behind the version counter's back."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        out = x - self.mean
        self.mean.data.lerp_(x.detach().mean(0), 0.5)
        return out


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "counter": lambda: Counting("buffer"),
    "unsaved_counter": lambda: Counting("unsaved"),
    "plain_counter": lambda: Counting("plain"),
    "plain_tensor": Remembering,
    "cumulative_batchnorm": lambda: nn.BatchNorm1d(8, momentum=None),
    "instancenorm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, affine=True, track_running_stats=True), nn.Flatten()
    ),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "old_spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
}


def moving_parts(kind: str) -> lilliput.splitter.Split:
    """The layer in each part."""
    torch.manual_seed(3)
    client = nn.Sequential(nn.Linear(6, 8), LAYERS[kind](), nn.Tanh())
    server = nn.Sequential(nn.Linear(8, 8), LAYERS[kind](), nn.Tanh(), nn.Linear(8, 3))
    return lilliput.splitter.Split(client, server, nn.Sequential(LAYERS[kind](), nn.Linear(8, 3)))
