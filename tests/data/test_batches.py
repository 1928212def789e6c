"""Data stays what it is, whatever a model does to the batches it is given."""

import copy

import pytest
import torch
from torch import nn

import lilliput
from lilliput.algorithms import FedAvg
from lilliput.data.batches import ArrayBatches
from lilliput.tasks import Supervised


class Shift(nn.Module):
    """x - 1, where x lies or elsewhere."""

    def __init__(self, inplace):
        super().__init__()
        self.where = inplace

    def forward(self, x):
        return x.sub_(1) if self.where else x - 1


def model(inplace):
    torch.manual_seed(0)
    return nn.Sequential(Shift(inplace), nn.Linear(6, 3))


def columns(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def as_list(x, y):
    return list(zip(x.split(4), y.split(4), strict=True))


def as_dicts(x, y):
    return [{"input": a, "labels": b} for a, b in as_list(x, y)]


def as_array(x, y):
    return ArrayBatches((x, y), batch_size=4)


@pytest.mark.parametrize("make", [as_list, as_dicts, as_array])
def test_a_model_that_works_in_place_changes_no_data(make):
    def run(inplace):
        given = [columns(seed) for seed in range(3)]
        before = copy.deepcopy(given)
        one, two, test = (make(*own) for own in given)
        task = Named(model(inplace)) if make is as_dicts else Supervised(model(inplace))
        history = lilliput.Experiment(FedAvg(lr=0.1, local_epochs=2), task, {0: one, 1: two}, rounds=3, test=test).run()
        for own, was in zip(given, before, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(own, was, strict=True))
        return history

    straight, inplace = run(False), run(True)
    assert all(torch.equal(x, inplace.state["params"][n]) for n, x in straight.state["params"].items())
    assert [row["loss"] for row in straight.rows] == [row["loss"] for row in inplace.rows]


class Named(Supervised):
    def forward(self, model, batch):
        return model(batch["input"])
