"""Cutting a model: parts do what the whole does and hold their own parameters only; an impossible cut is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lilliput
from lilliput import models


def small() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.mark.parametrize("at", ["1", "2", "3", "4"])
def test_parts_of_a_plain_module_are_the_module(at: str) -> None:
    if at == "1":
        with pytest.raises(ValueError, match="itself would travel"):
            lilliput.split(small(), at)
        return
    model = small()
    client, server = lilliput.split(model, at)
    names = [list(part.state_dict()) for part in (client, server)]
    assert sorted(names[0] + names[1]) == sorted(model.state_dict())
    x = torch.randn(5, 12)
    outputs = []
    for forward in (model, lambda x: server(client(x))):
        torch.manual_seed(0)
        outputs.append(forward(x))
    assert torch.equal(*outputs)
    client, server = pickle.loads(pickle.dumps(copy.deepcopy((client, server))))
    torch.manual_seed(0)
    assert torch.equal(server(client(x)), outputs[0])


def test_a_cut_inside_a_residual_branch_is_refused() -> None:
    model = models.build("resnet10", shape=(3, 8, 8), classes=4, width=4, stem="cifar")
    with pytest.raises(ValueError, match=r"depends on the output of layer1, which"):
        lilliput.split(model, "layer2.0.conv2")
