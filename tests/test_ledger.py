"""What the ledger says of memory, FLOPs and simulated time is what can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lilliput
from lilliput import Profile
from lilliput.algorithms import FedAvg
from lilliput.ledger import Instrument
from lilliput.tasks import Supervised


def one_layer_run(profile: Profile = Profile(), batch: int = 10, batches: int = 3) -> dict:
    """Linear(100, 50) without bias on one client."""
    data = {0: [(torch.randn(batch, 100), torch.randint(50, (batch,))) for _ in range(batches)]}
    task = Supervised(nn.Linear(100, 50, bias=False))
    return lilliput.Experiment(FedAvg(), task, data, rounds=1, profiles=profile).run("sequential").rows[0]


def test_flops_are_two_per_multiply_add_forward_and_for_the_weight_gradient() -> None:
    """The input needs no gradient, so a step is two products of 10 x 100 x 50."""
    assert one_layer_run()["flops"] == 3 * 2 * (2 * 10 * 100 * 50)


def test_peak_memory_holds_message_model_and_gradient() -> None:
    """Message, model and gradient of 20,000 bytes each, and the activations of ten examples of 50 classes."""
    weights, logits = 4 * 100 * 50, 4 * 10 * 50
    peak = one_layer_run()["peak_memory_bytes"]
    assert 3 * weights + logits <= peak <= 3 * weights + 8 * logits


def test_the_simulated_clock_is_bytes_over_bandwidth_and_flops_over_speed() -> None:
    row = one_layer_run(Profile(up_bps=1e6, down_bps=4e6, flops=1e6))
    overhead = row["overhead_bytes"]  # shared by both directions; its split is the header's affair
    low = 8 * row["down_bytes"] / 4e6 + 8 * row["up_bytes"] / 1e6 + row["flops"] / 1e6
    assert low < row["simulated_seconds"] <= low + 8 * overhead / 1e6
    assert row["simulated_seconds"] - row["communication_seconds"] == pytest.approx(row["flops"] / 1e6)
    assert row["process_memory_bytes"] > 1e6  # of this very process


def test_a_round_lasts_as_long_as_its_slowest_client() -> None:
    data = {c: [(torch.randn(4, 6), torch.randint(3, (4,)))] for c in range(3)}
    task = Supervised(nn.Linear(6, 3))
    slow = {c: Profile(up_bps=1e3 if c == 1 else 1e9) for c in range(3)}
    alone = lilliput.Experiment(FedAvg(), task, {0: data[1]}, rounds=1, profiles={0: slow[1]}).run("sequential").rows[0]
    together = lilliput.Experiment(FedAvg(), task, data, rounds=1, profiles=slow).run("sequential").rows[0]
    assert together["simulated_seconds"] == pytest.approx(alone["simulated_seconds"])


def test_the_instrument_sees_what_lives_and_not_what_was_there() -> None:
    x = torch.zeros(1000)
    with Instrument() as probe:
        y = x + 1  # 4,000 bytes
        z = y * 2  # 8,000 at the peak
        del y
        w = z.view(10, 100)  # a view costs nothing
        x.add_(1)  # nor does writing in place to what was there
        v = w + w  # 8,000 again
    assert probe.peak_bytes == 8000 and probe.bytes == 8000
    del v, w, z
    assert probe.bytes == 0
