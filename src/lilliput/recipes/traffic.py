"""The traffic of FedSub and FedAvg in closed form: numbers per round and client.

    FedSub:  sum_l m_l r_l + ordinary        up and down, and once the whole model down
    FedAvg:  sum_l m_l n_l + ordinary        up and down; data-parallel SGD the same in each step

P comes from a seed and costs nothing.  Both methods send buffers (statistics of BatchNorm) up and down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lilliput.subspace.replace import rank_of


class Layers(NamedTuple):
    """A number of equal layers in a subspace, with m rows and a width of n."""

    number: int
    rows: int
    width: int


@dataclass(frozen=True)
class Network:
    """The layers of a model in subspaces, and how many ordinary parameters and buffers it has besides."""

    layers: tuple[Layers, ...]
    ordinary: int
    buffers: int = 0

    @property
    def whole(self) -> int:
        """The number of parameters of the model."""
        return sum(number * m * n for number, m, n in self.layers) + self.ordinary

    def sent(self, rank: int | float) -> int:
        """The numbers that FedSub sends in a round in each direction."""
        b = sum(number * m * rank_of("a layer", rank, n) for number, m, n in self.layers)
        return b + self.ordinary + self.buffers

    def paid(self, rank: int | float, rounds: int, whole_models: int = 0) -> int:
        """Full-dimension rounds that the bytes of FedSub's rounds pay for, less `whole_models` sent down first."""
        bytes_ = 2 * rounds * self.sent(rank) + (1 - whole_models) * self.whole
        return bytes_ // (2 * (self.whole + self.buffers))


def llama(sizes: Mapping[str, int], vocabulary: int, key_rows: int | None = None, tables: int = 2) -> Network:
    """A LLaMA with these arguments of `LlamaConfig` and the seven projections of each layer in subspaces.

    key_rows: rows of keys and of values, if fewer than the hidden width
    tables:   1 if the head is tied to the embedding, else 2
    """
    h, f, depth = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    layers = (
        Layers(2 * depth, h, h),
        Layers(2 * depth, key_rows or h, h),
        Layers(2 * depth, f, h),
        Layers(depth, h, f),
    )
    return Network(layers, tables * vocabulary * h + (2 * depth + 1) * h)


def resnet(blocks: int, width: int, kernel: int, channels: int, classes: int) -> Network:
    """A CIFAR ResNet with the width of its kernels in subspaces."""
    pairs = [(channels, width, 1)]
    for before, own in ((width, width), (width, 2 * width), (2 * width, 4 * width)):
        pairs += [(before, own, 1), (own, own, 2 * blocks - 1)]
    normed = 2 * sum(own * count for _, own, count in pairs)
    layers = tuple(Layers(count, before * own * kernel, kernel) for before, own, count in pairs)
    counters = 2 * sum(count for _, _, count in pairs)  # BatchNorm's, of 8 bytes: two numbers each
    return Network(layers, normed + 4 * width * classes + classes, buffers=normed + counters)
