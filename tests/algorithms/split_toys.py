"""Tasks to split: the laws' network in two or three parts, and a language model whose activations are a dict."""

from __future__ import annotations

from typing import Any

import torch
from fixtures import batches, network
from torch import Tensor, nn

import lilliput
from lilliput.engines import Sequential
from lilliput.splitter import Split

WORDS, WIDTH = 7, 4


def run(algorithm: Any, on: Any, data: Any = None, rounds: int = 3, engine: Any = None, **options: Any) -> Any:
    data = batches() if data is None else data
    experiment = lilliput.Experiment(algorithm=algorithm, task=on, data=data, rounds=rounds, **options)
    return experiment.run(engine or Sequential())


def two_parts(auxiliary: nn.Module | None = None, norm: bool = True) -> Split:
    model = network(norm)
    return Split(model[:2], model[2:], auxiliary or nn.Linear(8, 3))


def three_parts(norm: bool = True) -> Split:
    """The same network; its last layer stays on the device."""
    model = network(norm)
    return Split(model[0], model[1:3], tail=model[3])


class Embed(nn.Module):
    """Words [N, L] and their mask to a dict of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"hidden": torch.tanh(self.mix(self.words(input_ids))), "attention_mask": attention_mask}


class Read(nn.Module):
    """The dict of `Embed` to logits [N, L, words]; every position sees the mean of all that are not masked."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WORDS)

    def forward(self, cut: dict[str, Tensor]) -> Tensor:
        hidden, mask = cut["hidden"], cut["attention_mask"][..., None]
        return self.out(torch.tanh(hidden + (hidden * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)))


def language(auxiliary: nn.Module | None = None, **options: Any) -> Split:
    torch.manual_seed(5)
    return Split(Embed(), Read(), auxiliary or Read(), **options)


def text(n: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch of n sentences; the first word counts for nothing, and every second sentence is one word shorter."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (n, length + 1), generator=rng)
    mask = torch.ones(n, length, dtype=torch.int64)
    mask[1::2, -1] = 0
    y = ids[:, 1:].masked_fill(mask == 0, -100)
    y[:, 0] = -100
    return {"input_ids": ids[:, :-1] * mask, "attention_mask": mask, "labels": y}


def texts(clients: int = 3) -> dict[int, list[dict[str, Tensor]]]:
    """Batches of different length and size."""
    return {c: [text(2 + i, 3 + (2 * c + i) % 4, seed=10 * c + i) for i in range(1 + c % 3)] for c in range(clients)}


def wider(batch: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """The batch padded by so many words more on the right."""
    filled = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {n: nn.functional.pad(x, (0, by), value=filled[n]) for n, x in batch.items()}
