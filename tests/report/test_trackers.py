import sys
from types import SimpleNamespace

import pytest
from reported import experiment, rows

from lilliput.report.board import TensorBoard, WandB, scalars


def read_back(folder):
    """{tag: [(step, value)]} as TensorBoard itself reads it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def write(folder, made, before=()):
    board = TensorBoard(folder)
    board.start(experiment(), list(before))
    for row in made:
        board.progress(row["round"], 1, 1)
        board.row(row)
    board.end([*before, *made])


def test_tensorboard_reads_back_what_the_rows_say(tmp_path):
    write(tmp_path / "tb", rows([0.25, None, 0.5], **{"clients/accuracy": 0.75, "compat": None}))
    read = read_back(tmp_path / "tb")
    assert read["server/accuracy"] == [(1, 0.25), (3, 0.5)]
    assert read["clients/accuracy"] == [(1, 0.75), (2, 0.75), (3, 0.75)]
    assert read["round/up_bytes"] == [(n, 2_000_000.0) for n in (1, 2, 3)]
    assert set(read) == {
        "server/accuracy",
        "clients/accuracy",
        "round/up_bytes",
        "round/down_bytes",
        "round/simulated_seconds",
    }


def test_a_resumed_run_hides_the_events_after_its_checkpoint(tmp_path):
    first = rows([0.1, 0.2, 0.3])
    write(tmp_path, first)
    again = rows([0.0, 0.0, 0.5, 0.6])[2:]
    write(tmp_path, again, before=first[:2])
    accuracy = [(step, pytest.approx(value)) for step, value in read_back(tmp_path)["server/accuracy"]]
    assert accuracy == [(1, 0.1), (2, 0.2), (3, 0.5), (4, 0.6)]


def test_events_of_a_killed_run_are_on_disk(tmp_path):
    board = TensorBoard(tmp_path)
    board.start(experiment(), [])
    board.row(rows([0.25])[0])  # and never an end
    assert read_back(tmp_path)["server/accuracy"] == [(1, 0.25)]


def test_only_numbers_are_scalars():
    assert dict(scalars({"round": 1, "loss": 1, "note": "x", "none": None, "flag": True})) == {"server/loss": 1.0}


def test_wandb_is_told_each_row_and_finds_a_resumed_run_again(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: calls.append(given) or run))
    for _ in range(2):
        tracker = WandB(tmp_path / "fedavg" / "cnn", config={"lr": 0.1})
        tracker.start(experiment(), [])
        tracker.row({"round": 7, "accuracy": 0.5})
        tracker.end([])
    first, logged, finished, second = calls[:4]
    assert first["project"] == "lilliput" and first["config"] == {"lr": 0.1} and first["resume"] == "allow"
    assert logged == (7, {"server/accuracy": 0.5}) and finished == "finish"
    assert first["id"] == second["id"] and not set(first["id"]) & set("/\\#?%:")


@pytest.mark.parametrize(("tracker", "package"), [(TensorBoard, "tensorboard"), (WandB, "wandb")])
def test_a_missing_extra_names_its_pip_line(tmp_path, monkeypatch, tracker, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"pip install 'lilliput\["):
        tracker(tmp_path).start(experiment(), [])


def test_importing_the_package_imports_nothing_heavy():
    import subprocess

    heavy = ("matplotlib", "tensorboard", "wandb", "yaml")
    code = f"import sys, lilliput.report; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
