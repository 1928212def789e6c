"""Noise on the cut: what leaves the device, and nothing else, has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import assert_same_history, assert_same_state, batches
from split_toys import language, run, texts, two_parts
from torch import Tensor, nn

import lilliput
from lilliput.algorithms import SPLIT, FslSage, SplitFedV1
from lilliput.core import random
from lilliput.engines import Sequential, Workers
from lilliput.engines.device import Device

SETTINGS: dict[str, Any] = {"lr": 0.1, "local_epochs": 2, "cut_noise": 0.5}


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, Any]]:
    """(client, batch number, activations) of everything that is uploaded, in order."""
    seen: list[tuple[int, str, Any]] = []
    handle = Device.handle

    def noted(self: Device, request: Any) -> Any:
        response = handle(self, request)
        seen.extend((request.client, n, x) for n, x in (response.body or {}).get("cut", {}).items())
        return response

    monkeypatch.setattr(Device, "handle", noted)
    return seen


def test_it_is_gaussian_of_that_deviation_and_another_for_every_batch(uploads: list) -> None:
    wide = {c: [(torch.randn(500, 6), torch.randint(3, (500,))) for _ in range(2)] for c in range(2)}
    run(SplitFedV1(lr=1e-30), two_parts(norm=False), wide, rounds=1)
    plain = [x for *_, x in uploads]
    uploads.clear()
    run(SplitFedV1(lr=1e-30, cut_noise=0.5), two_parts(norm=False), wide, rounds=1)
    noise = torch.stack([x - y for (*_, x), y in zip(uploads, plain, strict=True)])
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 0.5) < 0.01  # 16,000 draws: 5 and 3.6 deviations
    correlation = torch.corrcoef(noise.flatten(1))
    assert (correlation - torch.eye(len(noise))).abs().max() < 0.08


def test_none_is_no_change(uploads: list) -> None:
    assert_same_state(
        run(SplitFedV1(lr=0.1, cut_noise=0.0), two_parts()).state, run(SplitFedV1(lr=0.1), two_parts()).state
    )


@pytest.mark.parametrize("name", SPLIT)
def test_engines_and_resumed_runs_draw_the_same(name: str, tmp_path: Path) -> None:
    method = SPLIT[name](**SETTINGS, cohort=3)
    straight = run(method, two_parts(), rounds=4)
    for engine in (Sequential(wire=True), Workers(2)):
        assert_same_history(run(method, two_parts(), rounds=4, engine=engine), straight)
    run(method, two_parts(), rounds=2, folder=tmp_path)

    resumed = lilliput.Experiment(method, two_parts(), batches(), rounds=4, folder=tmp_path).run(
        "sequential", resume=True
    )
    assert_same_state(resumed.state, straight.state)


def test_the_device_goes_by_the_gradient_at_what_it_sent() -> None:
    """One step of one batch by hand: the loss at the noisy activations, through the weights that made them."""
    on = two_parts(norm=False)
    (x, y), model = batches()[0][0], on.model
    client, server = model.client, model.server  # type: ignore[union-attr]
    generator = random.generator(0, 1, 0, "batch", 0, "noise")
    loss = nn.functional.cross_entropy(server(client(x) + 0.5 * torch.randn(4, 8, generator=generator)), y)
    params = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(params.values()))
    after = run(SplitFedV1(lr=0.1, cut_noise=0.5), on, {0: [(x, y)]}, rounds=1).state["params"]
    for (name, p), g in zip(params.items(), grads, strict=True):
        torch.testing.assert_close(after[name], p.detach() - 0.1 * g, atol=1e-7, rtol=0)


def test_masks_and_labels_have_none(uploads: list) -> None:
    run(FslSage(lr=0.1, cut_noise=0.5, align_epochs=1), language(), texts(), rounds=1)
    masks: list[Tensor] = [x["attention_mask"] for *_, x in uploads]
    assert all(mask.dtype is torch.int64 and set(mask.unique().tolist()) <= {0, 1} for mask in masks)


@pytest.mark.parametrize("deviation", [-1.0, float("inf"), float("nan")])
def test_what_is_no_deviation_is_refused(deviation: float) -> None:
    with pytest.raises(ValueError, match=r"cut_noise is .*0 or more"):
        SplitFedV1(cut_noise=deviation)
