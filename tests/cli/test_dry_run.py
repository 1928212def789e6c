"""`lilliput run --dry`: the cost of a run, and no run."""

from __future__ import annotations

import pytest
from saying import FAST, Cli, Runs


def test_it_prints_what_the_run_then_moves_and_leaves_no_folder(lilliput: Cli, runs: Runs) -> None:
    said = lilliput("run", "--dry", "clients=3", *FAST)
    assert said.status == 0 and "nothing was trained" in said.out and not runs()
    counted = {line.rsplit(maxsplit=2)[0]: line.split()[-1] for line in said.out.splitlines() if " " in line}
    assert lilliput("run", "clients=3", *FAST).status == 0
    from lilliput.report.runs import read

    rows = read(runs()[0]).rows
    assert counted["up delta"] == f"{sum(row['up_bytes'] for row in rows) / 1e6:,.3f}"
    moved = sum(row[f"{k}_bytes"] for row in rows for k in ("up", "down", "overhead"))
    assert counted["total"] == f"{moved / 1e6:,.3f}"


def test_the_engine_by_name_does_the_same(lilliput: Cli, runs: Runs) -> None:
    assert lilliput("run", "engine=dry", *FAST).out == lilliput("run", "--dry", *FAST).out
    assert not runs()


def test_counting_as_published_leaves_out_labels_and_headers(lilliput: Cli) -> None:
    words = ("run", "--dry", "algorithm=splitfed_v1", "clients=2", "model=mlp", "cut.at=1", *FAST)
    said, published = lilliput(*words), lilliput(*words, "--count", "published")
    assert said.status == published.status == 0, said.err
    assert "up labels" in said.out and "up headers" in said.out and "up cut" in published.out
    assert "labels" not in published.out and "headers" not in published.out


def test_devices_that_are_too_small_are_named_and_the_status_tells(lilliput: Cli) -> None:
    said = lilliput("run", "--dry", "clients=3", "device_profile.memory_bytes=1000", *FAST)
    assert said.status == 1
    assert "3 of 3 clients cannot hold it" in said.out and "the run would stop" in said.out


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (("--dry", "--count", "halves"), "--count halves is not one of all, published"),
        (("--dry", "-m", "seed=0,1"), "leave -m out"),
        (("-m", "engine=dry,sequential"), "engine=dry trains nothing"),
        (("--count",), "--count needs all or published"),
    ],
)
def test_what_it_is_not_for_is_refused(lilliput: Cli, words: tuple[str, ...], rule: str) -> None:
    said = lilliput("run", *words, *FAST[1:]) if "--count" not in words[-1:] else lilliput("run", *words)
    assert said.status == 2 or rule in said.out + said.err
    assert rule in said.out + said.err
