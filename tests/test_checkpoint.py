"""Checkpoints: what is damaged or foreign is refused by name, whatever its bytes; every version stays readable."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import assert_same_history, assert_same_state, experiment
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lilliput import checkpoint, store
from lilliput.checkpoint import CheckpointError
from lilliput.engines import Sequential
from lilliput.store import Store


def saved_run(folder: Path) -> Path:
    experiment("scaffold", rounds=2, folder=folder).run(Sequential())
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("run"))


def test_a_checkpoint_gives_back_the_state(sample: Path) -> None:
    saved = checkpoint.load(sample)
    straight = experiment("scaffold", rounds=2).run(Sequential())
    assert saved is not None and saved.round == 2
    assert_same_state(saved.read_server(sample), straight.state)


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_arbitrary_manifests_are_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    key=st.sampled_from(["format", "version", "run", "identity", "round", "attempt", "server", "states"]),
    value=json_values,
)
@example(key="round", value=float("inf"))
@settings(max_examples=200, deadline=None)
def test_a_manifest_with_anything_in_a_field_loads_or_is_refused(
    sample: Path, tmp_path_factory: Any, key: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("field")
    for path in sample.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((sample / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, key: value}))
    try:
        saved = checkpoint.load(folder)
        assert saved is not None
        saved.read_server(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(max_examples=50, deadline=None)
def test_a_flipped_bit_in_the_server_state_is_noticed(
    sample: Path, tmp_path_factory: Any, position: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("bit")
    for path in sample.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    saved = checkpoint.load(folder)
    assert saved is not None
    path = folder / saved.server.name
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=saved.server.name):
        saved.read_server(folder)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved_run(tmp_path)
    saved = checkpoint.load(folder)
    assert saved is not None
    name = next(iter(saved.states.values())).name
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        experiment("scaffold", rounds=3, folder=tmp_path).run(Sequential(), resume=True)


def test_a_file_outside_the_folder_is_never_read(tmp_path: Path) -> None:
    folder = saved_run(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["server"]["name"] = "../../etc/passwd"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "its seed is 0, not 5"),
        ({"settings": {"lr": 0.3}}, "its settings is"),
        ({"name": "fedprox"}, "its algorithm is 'Scaffold'"),
    ],
)
def test_another_experiments_checkpoint_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    saved_run(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        experiment(change.pop("name", "scaffold"), folder=tmp_path, **change).run(Sequential(), resume=True)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    saved_run(tmp_path)
    with pytest.raises(CheckpointError, match="resume it, or choose another folder"):
        experiment("scaffold", folder=tmp_path).run(Sequential())


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_run(tmp_path)
    written: list[str] = []

    def full(path: Path, data: Any) -> None:
        written.append(path.name)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(store, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        experiment("scaffold", rounds=3, folder=tmp_path).run(Sequential(), resume=True)
    monkeypatch.undo()
    assert written and checkpoint.load(folder).round == 2  # type: ignore[union-attr]
    assert_same_history(
        experiment("scaffold", rounds=3, folder=tmp_path).run(Sequential(), resume=True),
        experiment("scaffold", rounds=3).run(Sequential()),
    )


def test_a_round_writes_only_the_states_it_changed(tmp_path: Path) -> None:
    """Of 200 clients with control variates, a round of three writes three states and the server's."""
    data = {c: [(torch.randn(4, 6), torch.randint(3, (4,)))] for c in range(200)}
    options = {"data": data, "evaluate": "none", "test": None, "checkpoint_every": 1, "folder": tmp_path}
    experiment("scaffold", rounds=3, settings={"cohort": 200}, **options).run(Sequential())
    before = {p.name for p in (tmp_path / "checkpoint").iterdir()}
    identity = experiment("scaffold", rounds=3, settings={"cohort": 200}, **options).identity()
    kept = Store(tmp_path / "checkpoint")
    saved = checkpoint.load(tmp_path / "checkpoint")
    assert saved is not None and len(saved.states) == 200
    kept.restore(saved.states)
    for c in range(3):
        kept.put(f"client/{c}", {"control": {"w": torch.ones(2)}})
    checkpoint.save(tmp_path / "checkpoint", {"run": "r", "identity": identity, "round": 4, "attempt": 0}, {}, kept)
    after = {p.name for p in (tmp_path / "checkpoint").iterdir()}
    assert len(after - before) == 4 and len(before - after) == 4


@pytest.mark.parametrize("version", [1])
def test_every_version_ever_released_still_loads(version: int, tmp_path: Path) -> None:
    """tests/checkpoints/vN was written by the release that introduced version N."""
    source = Path(__file__).with_name("checkpoints") / f"v{version}"
    for path in source.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(source)).write_bytes(path.read_bytes())
    resumed = experiment("scaffold", rounds=3, folder=tmp_path).run(Sequential(), resume=True)
    straight = experiment("scaffold", rounds=3).run(Sequential())
    # Written on another machine: its arithmetic may round otherwise.
    for name, x in straight.state["params"].items():
        torch.testing.assert_close(resumed.state["params"][name], x, atol=1e-6, rtol=0)


def test_a_setting_newer_than_the_checkpoint_must_be_off(tmp_path: Path) -> None:
    """`warmup` came after version 1 was written."""
    source = Path(__file__).with_name("checkpoints") / "v1"
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    later = experiment("scaffold", rounds=3, folder=tmp_path)
    later.algorithm = replace(later.algorithm, warmup=1)
    with pytest.raises(CheckpointError, match="belongs to another experiment: its settings"):
        later.run(Sequential(), resume=True)
