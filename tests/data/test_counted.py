"""A client weighs what its labels that count are, however its data is held."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lilliput.core.labels import counted, counted_in, labels
from lilliput.data.batches import ArrayBatches, ListBatches, Pooled
from lilliput.data.token_batches import TokenBatches

torch.manual_seed(0)
Y = torch.randint(4, (23,)).masked_fill(torch.rand(23) < 0.4, -100)
SPANS = torch.stack([torch.randint(0, 6, (23,)), torch.randint(2, 12, (23,))], 1)
DATA = {
    "arrays": ArrayBatches((torch.randn(23, 2), Y), 5),
    "index": ArrayBatches((torch.randn(23, 2), Y), 5, index=torch.arange(3, 17)),
    "sequences": ArrayBatches((torch.randn(23, 2), Y[:, None].expand(-1, 3)), 5),
    "real": ArrayBatches((torch.randn(23, 2), torch.randn(23, 3)), 5),
    "list": ListBatches([(torch.randn(23, 2), Y), (torch.randn(2, 2), torch.tensor([-100, 1]))]),
    "dicts": ListBatches([{"x": torch.randn(23, 2), "labels": Y}]),
    "tokens": TokenBatches((torch.randint(9, (23, 12)), SPANS), 5),
    "some tokens": TokenBatches((torch.randint(9, (23, 12)), SPANS), 5, index=torch.tensor([3, 1, 8])),
}
DATA["pooled"] = Pooled([DATA["list"], DATA["tokens"]])


@pytest.mark.parametrize("name", DATA)
def test_they_are_those_of_an_epoch(name):
    data = DATA[name]
    assert counted_in(data) == sum(counted(labels(batch)) for batch in data.epoch(None)) > 0


def test_data_of_a_class_of_ones_own_is_not_drawn_to_be_counted():
    @dataclass
    class Own:
        examples: int = 7

        def epoch(self, generator):
            raise AssertionError("an epoch was drawn")

    assert counted_in(Own()) == 7
