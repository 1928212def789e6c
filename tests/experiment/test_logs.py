"""Lines of a run: what lies behind the checkpoint is cut; damage before it is told, and nothing is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folders import snapshot
from lilliput.experiment.checkpoint import CheckpointError
from lilliput.experiment.logs import Log


def written(folder: Path, *lines: str | int) -> Path:
    path = folder / "run" / "metrics.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"round": x}) + "\n" if isinstance(x, int) else x for x in lines))
    return path


@pytest.mark.parametrize("behind", [(), (3,), (3, 4), (3, '{"rou'), ("\0\0\0\n",), ("{}\n", 3), ("nothing\n", 2)])
def test_what_lies_behind_the_checkpoint_is_cut(tmp_path: Path, behind: tuple[str | int, ...]) -> None:
    path = written(tmp_path, 1, 2, *behind)
    log = Log.of(path, 2)
    before = snapshot(tmp_path)
    assert [row["round"] for row in log.rows] == [1, 2] and snapshot(tmp_path) == before
    log.begin()
    log.write('{"round": 3}')
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ((1, "damaged\n", 3, 4), "line 2 is damaged"),
        ((1, 3, 4), "line 2 is of round 3, after round 1"),
        ((1, 2, 2, 3, 4), "line 3 is of round 2, after round 2"),
        ((2, 1, 3, 4), "line 1 is of round 2, after round 0"),
        ((1, 2, 3, '{"round": 4}'), "line 4 is damaged"),  # a checkpoint is written after its line, newline and all
        ((1, 2, 3), "it ends with round 3"),
        ((1, 2, 3, '{"round": 4.0}\n'), "line 4 is damaged"),
        ((), "it ends with round 0"),
    ],
)
def test_damage_before_the_checkpoint_is_told_and_nothing_is_touched(
    tmp_path: Path, lines: tuple[str | int, ...], told: str
) -> None:
    path = written(tmp_path, *lines)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError) as error:
        Log.of(path, 4)
    assert told in str(error.value) and f"init={path.parent}" in str(error.value) and snapshot(tmp_path) == before


def test_a_log_of_some_rounds_must_only_rise(tmp_path: Path) -> None:
    assert [row["round"] for row in Log.of(written(tmp_path, 10, 20, "half", 30), 25, every=False).rows] == [10, 20]
    assert not Log.of(tmp_path / "none.jsonl", 7, every=False).rows
    for lines in ((10, "damaged\n", 20), (20, 10)):
        with pytest.raises(CheckpointError):
            Log.of(written(tmp_path, *lines), 25, every=False)


@given(rounds=st.integers(0, 6), done=st.integers(0, 6), cut=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_a_log_cut_anywhere_keeps_every_round_that_counts_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, rounds: int, done: int, cut: int
) -> None:
    path = written(tmp_path_factory.mktemp("log"), *range(1, rounds + 1))
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    there = path.read_bytes().count(b"\n")
    if there < done:
        with pytest.raises(CheckpointError):
            Log.of(path, done)
    else:
        assert len(Log.of(path, done).rows) == done
