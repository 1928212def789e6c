"""The worker engine's own affairs: spawning, devices, segments."""

from __future__ import annotations

import pytest
import torch
from fixtures import assert_same_history, experiment

from lilliput.engines import Sequential, Workers
from lilliput.engines.shared import Segment
from lilliput.engines.tuning import tuned
from lilliput.engines.workers import devices


def test_spawned_workers_give_the_same_bits() -> None:
    """Spawned is what workers on a GPU are; here they serve the CPU."""
    engine = Workers(1)
    engine._method = "spawn"
    assert_same_history(experiment("scaffold").run(engine), experiment("scaffold").run(Sequential()))


def test_slots_are_spread_over_the_gpus_that_are_named() -> None:
    assert devices("cuda:0,2", 2, 4) == ["cuda:0", "cuda:0", "cuda:2", "cuda:2"]
    assert devices("cpu", 1, 3) == ["cpu"] * 3
    with pytest.raises(ValueError, match="not one of cpu, mps, cuda"):
        devices("tpu", 1, 1)


def test_a_segment_grows_and_says_so() -> None:
    segment = Segment()
    segment.write({"x": torch.zeros(10)})
    first = segment.number
    segment.write({"x": torch.zeros(20)})
    assert segment.number == first  # it fits a page
    segment.write({"x": torch.zeros(100_000)})
    assert segment.number == first + 1
    segment.close()


def test_tuning_is_undone() -> None:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()

    class Large:
        def init(self) -> dict:
            return {"params": {"w": torch.empty(1000, 1000)}}

    with tuned(Large(), threads=1) as report:
        assert report["float32_matmul"] == torch.get_float32_matmul_precision()
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (threads, precision)


def test_tuning_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_TUNING", "0")
    with tuned(None) as report:
        assert report == {"threads": 1, "float32_matmul": torch.get_float32_matmul_precision()}
