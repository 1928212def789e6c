"""Cuts by budget: the latest that fits, by figures that a real step confirms."""

from __future__ import annotations

import pytest
import torch
from exact import IMAGES, convolutional

import lilliput
from lilliput.core.meter import Instrument
from lilliput.fake import Fake, like
from lilliput.splitter import bytes_per_round, memory, middle
from lilliput.splitter.budget import _update, parsed
from lilliput.splitter.names import mapped_tensors
from lilliput.splitter.parts import on_meta
from lilliput.training.settings import Training

PLACES = ["layer1.0", "layer2.0", "layer3.0", "layer4.0", "fc"]


def real_peak(client: torch.nn.Module, batch: torch.Tensor, training: Training) -> int:
    """Bytes of one training step, counted while it runs on the CPU."""
    params = list(client.parameters())
    with Instrument() as instrument:
        update = _update(training, params)
        h = client.train()(batch)
        grads = torch.autograd.grad(h, params, torch.zeros_like(h))
        with torch.no_grad():
            update.apply(range(len(params)), list(grads))
    return sum(x.nbytes for x in (*params, *client.buffers())) + instrument.peak_bytes


@pytest.mark.parametrize("training", [Training(), Training(momentum=0.9), Training(optimizer="adam")], ids="smA")
def test_memory_is_that_of_a_step(training: Training) -> None:
    model = convolutional()
    for at in PLACES[1:4:2]:
        client, _ = lilliput.split(model, at, example=IMAGES)
        budget = memory(0, 8, training)
        with Fake(value=0):
            predicted = budget.cost(on_meta(client), mapped_tensors({"x": IMAGES}, like))
        assert predicted == pytest.approx(real_peak(client, torch.randn(8, 3, 8, 8), training), rel=0.05)


def test_the_latest_cut_that_fits_is_taken() -> None:
    model = convolutional()
    costs = []
    for at in PLACES:
        client, _ = lilliput.split(model, at, example=IMAGES)
        with Fake(value=0):
            costs.append(memory(0, 16).cost(on_meta(client), mapped_tensors({"x": IMAGES}, like)))
    assert costs == sorted(costs)
    for at, cost in list(zip(PLACES, costs, strict=True))[::3]:
        assert lilliput.split(model, memory(cost, 16), example=IMAGES)[0].at == at
    with pytest.raises(ValueError, match=rf"cheapest, at 'layer1.0', costs {costs[0]:,}"):
        lilliput.split(model, memory(costs[0] - 1, 16), example=IMAGES)


@pytest.mark.parametrize("every, gradients", [(1, True), (5, False)])
def test_bytes_of_a_round(every: int, gradients: bool) -> None:
    model = convolutional()
    client, _ = lilliput.split(model, "layer2.0", example=IMAGES)
    params = sum(p.nbytes for p in client.parameters()) + sum(b.nbytes for b in client.buffers())
    activations = 4 * 4 * 2 * 2 * 50 // every  # float32, 4 channels of 2 x 2, 50 examples
    expected = 2 * params + activations * (2 if gradients else 1)
    budget = bytes_per_round(0, 50, every, gradients)
    with Fake(value=0):
        assert budget.cost(on_meta(client), mapped_tensors({"x": IMAGES}, like)) == expected
    assert lilliput.split(model, bytes_per_round("1GB", 50), example=IMAGES)[0].at == "fc"


def test_adapters_alone_count_as_the_model() -> None:
    peft = pytest.importorskip("peft")
    from tiny import HIDDEN, batch, gpt2

    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    client, _ = lilliput.split(peft.get_peft_model(gpt2(), config), 2)
    given = batch("gpt2", 2, 8)
    mask, hidden = 8 * 8, 4 * 8 * HIDDEN  # bytes per example: int64, float32
    with Fake(value=0):
        cost = bytes_per_round(0, 10).cost(on_meta(client), mapped_tensors(given, like))
    assert cost == 2 * (2 * 2 * 4 * HIDDEN * 4) + 10 * (mask + 2 * hidden)


@pytest.mark.parametrize(
    "size, expected", [("200MB", 200e6), ("1.5GiB", 1.5 * 2**30), (7, 7), ("12 kB", 12e3), ("5b", 5)]
)
def test_sizes(size: str | int, expected: float) -> None:
    assert parsed(size) == expected


@pytest.mark.parametrize("size", ["200 apples", "MB", "-3"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        memory(size)


def test_the_middle() -> None:
    assert middle(convolutional(), IMAGES) == "layer3.0"
