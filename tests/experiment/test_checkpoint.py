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
from torch import nn

import lilliput
from folders import opened_for_writing, snapshot
from lilliput.algorithms import FedAvg
from lilliput.core.fleet import Profile
from lilliput.data.batches import ArrayBatches
from lilliput.engines import Sequential
from lilliput.experiment import checkpoint
from lilliput.experiment.checkpoint import CheckpointError
from lilliput.experiment.identity import differences
from lilliput.tasks import Supervised
from lilliput.tasks.supervised import cross_entropy
from lilliput.wire import store
from lilliput.wire.store import Store


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
    key=st.sampled_from(
        ["format", "version", "run", "identity", "round", "attempt", "server", "states", "files", "planned"]
    ),
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
    manifest = {**manifest_of(sample), key: value}
    (folder / "manifest.json").write_bytes(checkpoint.sealed(manifest))
    try:
        saved = checkpoint.load(folder)
        assert saved is not None
        saved.read_server(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)


def manifest_of(folder: Path) -> dict[str, Any]:
    """What the manifest says, without its checksum."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]
    return manifest


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_manifest_with_any_other_character_is_refused_or_says_the_same(
    sample: Path, tmp_path_factory: Any, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("character")
    for path in sample.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    text = (sample / "manifest.json").read_text()
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from("0123456789.,e{}[]\"' abc"))
    (folder / "manifest.json").write_text(text[:at] + other + text[at + 1 :])
    try:
        assert checkpoint.load(folder) == checkpoint.load(sample)
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
    manifest = manifest_of(folder)
    manifest["server"]["name"] = "../../etc/passwd"
    (folder / "manifest.json").write_bytes(checkpoint.sealed(manifest))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "its seed is 0, not 5"),
        ({"settings": {"lr": 0.3}}, "its lr is 0.1, not 0.3;"),
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
    """Of 200 clients with control variates, a round of three writes one file of three states, and the server's."""
    data = {c: [(torch.randn(4, 6), torch.randint(3, (4,)))] for c in range(200)}
    options = {"data": data, "evaluate": "none", "test": None, "checkpoint_every": 1, "folder": tmp_path}
    experiment("scaffold", rounds=3, settings={"cohort": 200}, **options).run(Sequential())
    before = {p.name for p in (tmp_path / "checkpoint").iterdir()}
    identity = experiment("scaffold", rounds=3, settings={"cohort": 200}, **options).identity()
    kept = Store(tmp_path / "checkpoint")
    saved = checkpoint.load(tmp_path / "checkpoint")
    assert saved is not None and len(saved.states) == 200
    kept.restore(saved.states, saved.files)
    for c in range(3):
        kept.put(f"client/{c}", {"control": {"w": torch.ones(2)}})
    fields = {"run": "r", "identity": identity, "planned": 3, "round": 4, "attempt": 0}
    checkpoint.save(tmp_path / "checkpoint", fields, {}, kept)
    after = {p.name for p in (tmp_path / "checkpoint").iterdir()}
    assert len(after - before) == 2 and len(before - after) == 1
    (new,) = [name for name in after - before if name.endswith(".states")]
    again = checkpoint.load(tmp_path / "checkpoint")
    assert again is not None and sum(file.name == new for file in again.states.values()) == 3


@pytest.mark.parametrize("version", [2])
def test_every_version_from_the_second_on_still_loads(version: int, tmp_path: Path) -> None:
    """tests/experiment/checkpoints/vN was written by the release that introduced version N."""
    shutil.copytree(Path(__file__).with_name("checkpoints") / f"v{version}", tmp_path, dirs_exist_ok=True)
    saved = checkpoint.load(tmp_path / "checkpoint")
    assert saved is not None
    kept = Store(tmp_path / "checkpoint")
    kept.restore(saved.states, saved.files)
    straight = experiment("scaffold", rounds=2).run(Sequential())
    # Written on another machine: its arithmetic may round otherwise.
    for name, x in straight.state["params"].items():
        torch.testing.assert_close(saved.read_server(tmp_path / "checkpoint")["params"][name], x, atol=1e-6, rtol=0)
    assert sorted(kept) == [f"client/{c}" for c in (1, 2, 3, 5)] and all(kept.get(key)["control"] for key in kept)
    resumed = experiment("scaffold", rounds=3, folder=tmp_path).run(Sequential(), resume=True)
    for name, x in experiment("scaffold", rounds=3).run(Sequential()).state["params"].items():
        torch.testing.assert_close(resumed.state["params"][name], x, atol=1e-6, rtol=0)


def test_the_first_version_is_refused_in_words(tmp_path: Path) -> None:
    """Its manifest says neither what the model is made of nor how the data is cut."""
    (tmp_path / "checkpoint").mkdir()
    manifest = {"format": "lilliput-checkpoint", "version": 1, "round": 2}
    (tmp_path / "checkpoint" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="has version 1; this release reads version 2: finish the run with"):
        experiment("scaffold", rounds=3, folder=tmp_path).run(Sequential(), resume=True)


def test_a_setting_newer_than_the_checkpoint_must_be_off() -> None:
    before = experiment("scaffold", rounds=3).identity()
    del before["settings"]["warmup"]
    now = experiment("scaffold", rounds=3)
    assert not list(differences(before, now.identity()))
    now.algorithm = replace(now.algorithm, warmup=1)
    assert list(differences(before, now.identity())) == [("settings.warmup", None, 1)]


def network(activation: nn.Module, dropout: bool = False) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), activation, nn.Dropout() if dropout else nn.Identity(), nn.Linear(8, 3))


class Own(nn.Module):
    """Its activation stands in the code of forward, where no module tells of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).relu()


class Other(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).tanh()


Other.__qualname__ = Own.__qualname__ = "Net"


def smooth(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)


def data(batch_size: int = 4, transform: Any = None) -> dict[int, ArrayBatches]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 6, generator=generator), torch.randint(3, (60,), generator=generator)
    rows = torch.arange(60).chunk(3)
    return {c: ArrayBatches((x, y), batch_size, index=rows[c], transform=transform) for c in range(3)}


def plain(**options: Any) -> lilliput.Experiment:
    model, loss = options.pop("model", network(nn.Tanh())), options.pop("loss", cross_entropy)
    settings = {"cohort": 2, "schedule": options.pop("schedule", "constant")}
    given = {"data": data(), "rounds": 2, "test": data()[0], **options}
    return lilliput.Experiment(FedAvg(**settings), Supervised(model, loss), **given)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": network(nn.ReLU())}, "its structure.model.1 is 'Tanh()', not 'ReLU()'"),
        ({"model": network(nn.Tanh(), dropout=True)}, "its structure.model.2 is 'Identity()', not 'Dropout(p=0.5"),
        ({"loss": smooth}, "its loss is 'cross_entropy', not 'smooth"),
        ({"data": data(5)}, "its data.batches is '[4, false, null]', not '[5, false, null]'"),
        ({"data": data(transform=lambda x, g: x + 1)}, "its data.batches"),
        ({"data": {c: batches for c, batches in data().items() if c < 2}}, "its data.clients is 3, not 2"),
        ({"profiles": Profile(availability=0.5)}, "its profiles"),
        ({"codec": lilliput.wire.codecs.build("bf16")}, "its codec"),
    ],
)
@pytest.mark.parametrize("reading", [False, True], ids=["resume", "evaluate"])
def test_what_decides_the_bits_cannot_change(tmp_path: Path, change: dict[str, Any], told: str, reading: bool) -> None:
    plain(folder=tmp_path).run(Sequential())
    before = snapshot(tmp_path)
    later = plain(folder=tmp_path, **{"rounds": 3, **change})
    with pytest.raises(CheckpointError) as error:
        later.trained(Sequential()) if reading else later.run(Sequential(), resume=True)
    assert told in str(error.value)
    assert snapshot(tmp_path) == before


def test_another_forward_of_a_users_own_module_is_another_structure(tmp_path: Path) -> None:
    plain(model=Own(), folder=tmp_path).run(Sequential())
    with pytest.raises(CheckpointError, match="its structure"):
        plain(model=Other(), folder=tmp_path, rounds=3).run(Sequential(), resume=True)
    assert plain(model=Own(), folder=tmp_path, rounds=3).run(Sequential(), resume=True).rows[-1]["round"] == 3


@pytest.mark.parametrize("schedule", ["constant", "exponential:0.5", "multistep:1,3:0.1"])
def test_more_rounds_under_a_schedule_that_does_not_look_ahead(tmp_path: Path, schedule: str) -> None:
    plain(schedule=schedule, folder=tmp_path).run(Sequential())
    longer = plain(schedule=schedule, folder=tmp_path, rounds=4).run(Sequential(), resume=True)
    assert_same_history(longer, plain(schedule=schedule, rounds=4).run(Sequential()))


@pytest.mark.parametrize(
    ("schedule", "rounds", "told"),
    [
        ("cosine", 4, "in round 2 it would have been 1.71 times what it was; go on with rounds=2, or train on"),
        ("linear", 4, "in round 2 it would have been 1.5 times"),  # 3/4 for 1/2
        ("constant", 1, "has done 2 rounds, more than rounds=1"),
    ],
)
def test_a_learning_rate_that_would_jump_is_refused(tmp_path: Path, schedule: str, rounds: int, told: str) -> None:
    plain(schedule=schedule, folder=tmp_path).run(Sequential())
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=told):
        plain(schedule=schedule, folder=tmp_path, rounds=rounds).run(Sequential(), resume=True)
    assert snapshot(tmp_path) == before


def test_reading_the_models_of_a_run_opens_nothing_for_writing(tmp_path: Path) -> None:
    """Rounds behind the checkpoint are not cut either: a resumed run does that."""
    straight = plain(folder=tmp_path, checkpoint_every=2).run(Sequential())
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"round": 3}\n{"rou')
    before = snapshot(tmp_path)
    with opened_for_writing() as opened:
        models = plain(folder=tmp_path, rounds=9).trained(Sequential())
    assert snapshot(tmp_path) == before and not [path for path in opened if str(tmp_path) in path]
    assert_same_state(models["global"].params, straight.models["global"].params)
