"""Language models as tasks: means over the tokens that count, whatever batch they stand in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lilliput.core.fleet import Client, Profile
from lilliput.data.batches import ListBatches
from lilliput.data.token_batches import TokenBatches
from lilliput.tasks import Supervised, accuracy, perplexity
from lilliput.training.fit import fit
from lilliput.training.settings import Training

WORDS, LONGEST = 11, 9


class Bigram(nn.Module):
    """Logits of the next token from the last one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WORDS)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.table(input_ids)}


def columns(n: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, LONGEST + 1, (n,), generator=draw)
    tokens = torch.randint(WORDS, (n, LONGEST), generator=draw).masked_fill(
        torch.arange(LONGEST) >= lengths[:, None], 0
    )
    return tokens.int(), torch.stack([lengths - 2, lengths], dim=1).int()


@pytest.fixture
def task() -> Supervised:
    torch.manual_seed(0)
    return Supervised(Bigram(), metrics={"accuracy": accuracy, "perplexity": perplexity})


@pytest.mark.parametrize("size", [1, 3, 10])
def test_a_test_set_scores_the_same_however_it_is_cut(task: Supervised, size: int) -> None:
    tokens, spans = columns()
    found = task.evaluate(task.init()["params"], None, TokenBatches((tokens, spans), size))
    losses, hits = [], []
    for row, (first, length) in zip(tokens.long(), spans.tolist(), strict=True):
        logits = task.model.table.weight[row[first - 1 : length - 1]]
        losses += F.cross_entropy(logits, row[first:length], reduction="none").tolist()
        hits += (logits.argmax(-1) == row[first:length]).tolist()
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)


def test_padding_and_prompts_change_no_loss(task: Supervised) -> None:
    batch = next(iter(TokenBatches(columns(), 4).epoch(None)))
    wider = {name: F.pad(x, (0, 5), value=-100 if name == "labels" else 0) for name, x in batch.items()}
    torch.testing.assert_close(task.loss(task.model, wider)[0], task.loss(task.model, batch)[0])


def test_accumulation_weighs_micro_batches_by_their_tokens(task: Supervised) -> None:
    tokens, spans = columns(4)
    spans[:, 0] = torch.tensor([1, 2, 2, 1])  # so that halves of the batch have different numbers of tokens
    batch = next(iter(TokenBatches((tokens, spans), 4).epoch(None)))

    def after(**options: Any) -> torch.Tensor:
        client = Client(0, task, ListBatches([batch]), Profile(), 1, 1, 0)
        params, _, _ = fit(client, task.init()["params"], config=Training(lr=1.0, **options))
        return params["table.weight"]

    once = after()
    torch.testing.assert_close(after(accumulate=2), once, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after(accumulate=4, per_layer=True), once, rtol=1e-5, atol=1e-6)


def test_a_hopeless_model_has_a_perplexity_too() -> None:
    assert perplexity.of(1e6) == math.exp(700)
