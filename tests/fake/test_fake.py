"""Tensors without values: they take no memory, keep what shapes say, and leave real tensors real."""

from __future__ import annotations

import copy
import pickle
from typing import Any, Literal

import pytest
import torch
from torch import nn

from lilliput.core.meter import Instrument
from lilliput.fake import Copies, Fake, Placeholder, copied, is_fake, like


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_copy_keeps_ties_shapes_and_what_is_trained(kind: str) -> None:
    model, mode = tied(), Fake()
    model[1].requires_grad_(False)
    bare = copied(model, like if kind == "meta" else mode.like)
    assert bare[0].weight is bare[2].weight and isinstance(bare[0].weight, nn.Parameter)
    for (name, x), (other, y) in zip(model.state_dict().items(), bare.state_dict().items(), strict=True):
        assert (name, x.shape, x.dtype) == (other, y.shape, y.dtype)
        assert y.is_meta if kind == "meta" else is_fake(y) and y.device == torch.device("cpu")
    assert [p.requires_grad for p in bare.parameters()] == [True, False, False]
    assert not any(is_fake(x) or x.is_meta for x in model.state_dict().values())


def test_only_what_is_computed_from_fake_tensors_is_fake() -> None:
    mode = Fake()
    with mode, Copies(mode.like):
        x, real = mode.like(torch.ones(2, 3)), torch.ones(3)
        assert is_fake(x * real) and not is_fake(real * 2) and float((real * 2).sum()) == 6
        assert not mode.drew and not is_fake(torch.rand(2)) and mode.drew
        assert is_fake(copy.deepcopy(x)) and not is_fake(copy.deepcopy(real))
        with mode.making():
            assert is_fake(torch.rand(2))
        assert not is_fake(torch.rand(2))
    with Fake(everything=True):
        assert is_fake(torch.ones(2))


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_code_that_reads_a_number_is_told_one_or_zero(value: Literal[0, 1], kind: str) -> None:
    mode = Fake(value=value)
    with mode:
        x = mode.like(torch.ones(2)) if kind == "fake" else torch.ones(2, device="meta")
        assert (x.sum().item(), bool((x > 0).all()), int(x.long().sum())) == (value, bool(value), value)
        assert torch.equal(x, x) is bool(value)


def test_a_tensor_that_leaves_the_meta_device_is_fake() -> None:
    x = torch.ones(2, 3, device="meta")
    with Fake():
        there = x.to("cpu", torch.float64)
        assert is_fake(there) and (there.device.type, there.dtype, there.shape) == ("cpu", torch.float64, (2, 3))
        assert x.double().is_meta and not is_fake(x.double())


def test_a_step_counts_as_much_as_a_real_one() -> None:
    def counted(model: nn.Module, x: torch.Tensor) -> tuple[float, int]:
        with Instrument() as seen:
            model(x).sum().backward()
        return seen.flops, seen.peak_bytes

    model, x, mode = tied(), torch.ones(5, 4), Fake()
    with mode:
        assert counted(copied(model, mode.like), mode.like(x)) == counted(model, x)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_placeholder_says_what_it_depends_on(again: Any) -> None:
    x = again(Placeholder.of((2, 3), torch.float32, torch.device("cpu"), "the input a"))
    y = x @ Placeholder.of((3, 4), torch.float32, torch.device("cpu"), "the parameter w") + torch.ones(4)
    assert isinstance(y, Placeholder) and y.shape == (2, 4) and y.device.type == "cpu"
    assert y.sources == {"the input a", "the parameter w"} and y.untyped_storage().nbytes() == 0
    with pytest.raises(ValueError, match="depends on the input a, which the client has"):
        torch.ones(2, 3).add_(x)
