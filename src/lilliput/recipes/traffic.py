"""What FedSub and FedAvg send, in closed form: numbers per round and client.

    FedSub:  sum_l m_l r_l + ordinary        up and down, and once the whole model down
    FedAvg:  sum_l m_l n_l + ordinary        up and down; data-parallel SGD the same in each step

P comes from a seed and costs nothing.  Buffers (statistics of BatchNorm) travel up and down in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lilliput.subspace.replace import rank_of


class Layers(NamedTuple):
    """So many layers in a subspace, of m rows and a width of n."""

    number: int
    rows: int
    width: int


@dataclass(frozen=True)
class Network:
    """What of a model goes into subspaces, and how many numbers there are beside that."""

    layers: tuple[Layers, ...]
    ordinary: int
    buffers: int = 0

    @property
    def whole(self) -> int:
        """Parameters of the model."""
        return sum(number * m * n for number, m, n in self.layers) + self.ordinary

    def sent(self, rank: int | float) -> int:
        """Numbers that FedSub sends in a round, up as well as down."""
        b = sum(number * m * rank_of("a layer", rank, n) for number, m, n in self.layers)
        return b + self.ordinary + self.buffers

    def paid(self, rank: int | float, rounds: int, whole_models: int = 0) -> int:
        """Rounds in full dimension that the bytes of FedSub's rounds pay for, after so many whole models down."""
        bytes_ = 2 * rounds * self.sent(rank) + (1 - whole_models) * self.whole
        return bytes_ // (2 * (self.whole + self.buffers))


def llama(sizes: Mapping[str, int], vocabulary: int, key_rows: int | None = None, tables: int = 2) -> Network:
    """A LLaMA of these arguments of `LlamaConfig`, its seven projections of each layer in subspaces.

    key_rows: rows of keys and of values, if they are fewer than the hidden width
    tables:   1 where the head is the table of embeddings
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
    """A CIFAR ResNet, the width of its kernels in subspaces."""
    pairs = [(channels, width, 1)]
    for before, own in ((width, width), (width, 2 * width), (2 * width, 4 * width)):
        pairs += [(before, own, 1), (own, own, 2 * blocks - 1)]
    normed = 2 * sum(own * count for _, own, count in pairs)
    layers = tuple(Layers(count, before * own * kernel, kernel) for before, own, count in pairs)
    counters = 2 * sum(count for _, _, count in pairs)  # BatchNorm's, of 8 bytes: two numbers each
    return Network(layers, normed + 4 * width * classes + classes, buffers=normed + counters)
