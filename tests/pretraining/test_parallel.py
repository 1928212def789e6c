"""Two processes train as one does, side by side and in shards, and go on from a checkpoint to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pretraining_processes import CASES, settings
from small import without_clock

import lilliput
from lilliput.experiment.checkpoint import CheckpointError

pytest.importorskip("transformers")
SCRIPT = Path(__file__).with_name("pretraining_processes.py")
pytestmark = pytest.mark.slow  # several starts of two processes each


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    folder = tmp_path_factory.mktemp("two")
    settings(folder, "side by side")  # writes the text
    ended = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_pretraining_processes_have_the_losses_of_one(found, case: str) -> None:
    folder, (rows, other) = found
    # One process whose pass is as large as both together.
    one = lilliput.pretrain(settings(folder, case, parallel="ddp"))
    for key in ("train_loss", "loss", "tokens"):
        expected = [row[key] for row in one.rows if key in row]
        assert [row[key] for row in rows[case] if key in row] == pytest.approx(expected, rel=2e-4), key
    assert without_clock(other[case])[-1]["loss"] == rows[case][-1]["loss"]


@pytest.mark.parametrize("case", CASES)
def test_pretraining_processes_go_on_to_the_bit(found, case: str) -> None:
    rows = found[1][0]
    assert rows[f"{case} again"] == rows[case]


def test_one_process_goes_on_where_two_stopped_but_not_with_packed_text(found, tmp_path: Path) -> None:
    folder, _ = found
    c = settings(folder, "side by side", steps=14, continue_from=str(folder / "side by side"))
    assert lilliput.pretrain(c).rows[-1]["round"] == 14
    from lilliput.pretraining import saved
    from lilliput.pretraining.saved import Position

    before = saved.load(folder / "side by side" / "checkpoint")
    assert before is not None and len(before.positions) == 2
    with pytest.raises(
        CheckpointError, match="made by 2 processes, each with packed text of its own; go on with as many"
    ):
        before.position(0, 1, packing=True)
    assert before.position(0, 1, packing=False) == Position(**vars(max(before.positions, key=lambda p: p.kept)))


def test_a_batch_must_divide_among_processes() -> None:
    from lilliput.pretraining import Pretrain

    with pytest.raises(ValueError, match="batch_size=8 does not divide among 3 processes of accumulate=1"):
        Pretrain(batch_size=8, steps=100).share(3)


def test_what_the_first_process_refuses_ends_all_of_them(tmp_path: Path) -> None:
    script = SCRIPT.with_name("refusing_processes.py")
    ended = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    for rank in range(2):
        assert "CheckpointError" in (refusal := (tmp_path / f"ended{rank}").read_text())
        assert "line 2 is damaged" in refusal
