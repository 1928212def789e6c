"""What the ledger says of memory, FLOPs and simulated time is what can be counted by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from fixtures import batches, experiment
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lilliput
from lilliput import Profile
from lilliput.algorithms import FedAvg
from lilliput.core.ledger import Entry, Ledger
from lilliput.core.meter import Instrument
from lilliput.report import ablations
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


ENTRIES = st.lists(
    st.builds(
        Entry, call=st.integers(1, 4), client=st.integers(0, 3), handler=st.sampled_from(["forward", "backward"]),
        down=st.dictionaries(st.sampled_from("ab"), st.integers(0, 99)), down_overhead=st.integers(0, 9),
        up=st.dictionaries(st.sampled_from("bc"), st.integers(0, 99)), up_overhead=st.integers(0, 9),
        peak_memory_bytes=st.integers(0, 99), flops=st.integers(0, 999).map(float),
        error=st.sampled_from([None, None, "late"]), evaluation=st.sampled_from([False, False, True]),
    ),
    max_size=30, unique_by=lambda e: (e.call, e.client),
)  # fmt: skip
LINKS = st.builds(Profile, up_bps=st.floats(1, 1e6), down_bps=st.floats(1, 1e6), flops=st.floats(1, 1e6))


@given(ENTRIES, st.lists(LINKS, min_size=4, max_size=4), LINKS)
def test_what_is_summed_over_calls_tells_what_every_call_would(
    calls: list[Entry], own: list[Profile], other: Profile
) -> None:
    """The row's totals, the clock on the devices of the run and on others, and the largest message of a kind."""
    for e in calls:
        down, up = sum(e.down.values()) + e.down_overhead, sum(e.up.values()) + e.up_overhead
        e.simulated_seconds = own[e.client].seconds(down, e.flops, up)
        e.communication_seconds = own[e.client].seconds(down, 0, up)
    ledger, counted = Ledger(1), [e for e in calls if not e.evaluation]
    for e in copy.deepcopy(calls):
        ledger.add(e)
    totals = ledger.totals()
    members = [[e for e in counted if e.call == call] for call in {e.call for e in counted}]
    assert totals["down_bytes"] == sum(n for e in counted for n in e.down.values())
    assert totals["up_bytes"] == sum(n for e in counted for n in e.up.values())
    assert totals["overhead_bytes"] == sum(e.down_overhead + e.up_overhead for e in counted)
    assert totals["peak_memory_bytes"] == max((e.peak_memory_bytes for e in counted), default=0)
    assert totals["flops"] == sum(e.flops for e in counted)
    assert totals["dropped"] == len({e.client for e in counted if e.error})
    slowest = [max(some, key=lambda e: (e.simulated_seconds, e.communication_seconds)) for some in members]
    for kind in ("simulated_seconds", "communication_seconds"):
        assert totals[kind] == pytest.approx(sum(getattr(e, kind) for e in slowest))
    line = json.loads(ledger.line())
    waited = [max(other.seconds(e.load[0], e.flops, e.load[1]) for e in some) for some in members]
    assert sum(ablations.simulated(line, other)) == pytest.approx(sum(waited))
    for kind in "abc":
        assert line["largest"].get(kind, 0) == max(
            (e.down.get(kind, 0) + e.up.get(kind, 0) for e in counted), default=0
        )


def test_a_round_of_more_batches_has_no_longer_line(tmp_path: Path) -> None:
    lines = []
    for epochs in (1, 8):
        folder, settings = tmp_path / str(epochs), {"local_epochs": epochs, "cohort": None}
        experiment("splitfed_v1", rounds=1, folder=folder, settings=settings).run()
        lines.append(json.loads((folder / "ledger.jsonl").read_text()))
    assert [len(line["calls"]) for line in lines] == [3 * 6] * 2  # forward, backward, finish
    called = [{e["client"]: e["calls"] for e in line["calls"] if e["handler"] == "forward"} for line in lines]
    assert called == [{c: epochs * len(own) for c, own in batches().items()} for epochs in (1, 8)]
    assert len(lines[1]["slowest"]) <= len(lines[0]["slowest"]) + 2


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
