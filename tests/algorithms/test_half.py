"""Parts in training between the calls of a round: they stay, and it makes no difference to a number that they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import assert_same_state, batches
from split_toys import run, three_parts, two_parts

import lilliput
from lilliput.algorithms import SPLIT, SplitFedV1
from lilliput.algorithms.splitting.server import check_finite
from lilliput.engines.device import Device
from lilliput.tasks.resident import Resident, Residents

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.5, "local_epochs": 2}


def task(name: str) -> Any:
    return three_parts() if "tail" in name else two_parts()


def method_of(name: str) -> Any:
    clipped = {"clip": 0.1} if "clipped" in name else {}
    return SPLIT.get(name, SplitFedV1)(**SETTINGS, **clipped)


NAMES = (*SPLIT, "tail", "clipped tail")


@pytest.mark.parametrize("name", NAMES)
def test_a_device_that_has_forgotten_everything_but_its_state_goes_on_alike(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = method_of(name)
    straight = run(method, task(name))
    handle = Device.handle

    def forgetful(self: Device, request: Any) -> Any:
        self.job.task.halves.clear()
        self.job.task.streams.clear()
        return handle(self, request)

    monkeypatch.setattr(Device, "handle", forgetful)
    forgotten = run(method, task(name))
    assert_same_state(forgotten.state, straight.state)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_interrupted_within_a_round_goes_on_from_the_round_before(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = method_of(name)
    straight = run(method, task(name), rounds=3)
    experiment = lilliput.Experiment(method, task(name), batches(), rounds=3, folder=tmp_path, checkpoint_every=1)
    handle, calls = Device.handle, []

    def interrupted(self: Device, request: Any) -> Any:
        calls.append(request.tag.round)
        if calls.count(3) == 5:
            raise KeyboardInterrupt
        return handle(self, request)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Device, "handle", interrupted)
        experiment.run("sequential")
    resumed = experiment.run("sequential", resume=True)
    assert_same_state(resumed.state, straight.state)
    assert [r["train_loss"] for r in resumed.rows] == [r["train_loss"] for r in straight.rows]


def test_server_copies_of_any_number_share_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    build = Residents._build

    def counted(self: Residents, params: Any, device: torch.device) -> Any:
        built.append(tuple(params))
        return build(self, params, device)

    monkeypatch.setattr(Residents, "_build", counted)
    data = {c: batches()[c % 3] for c in range(12)}
    run(SplitFedV1(**SETTINGS), two_parts(), data, rounds=2)
    assert len(built) == 2  # the device's and the server's


def test_a_lent_module_runs_on_the_holders_tensors_and_is_loaded_for_nobody() -> None:
    module = torch.nn.BatchNorm1d(2)
    resident = Resident(module)
    params, rest = resident.copied({"weight": torch.full((2,), 3.0)}, {"running_mean": torch.ones(2)})
    resident.lend("a", params, rest)
    module.train()(torch.randn(4, 2))
    held = rest.buffers["running_mean"]
    assert module.weight.data_ptr() == params["weight"].data_ptr() and not torch.equal(held, torch.ones(2))
    before = held.clone()
    resident.lend("b", *resident.copied(params, rest.buffers))
    module(torch.randn(4, 2))
    assert torch.equal(held, before)
    with pytest.raises(RuntimeError, match="another's own"):
        resident.load({}, None)


def test_a_finite_gradient_of_float16_whose_norm_overflows_is_accepted() -> None:
    check_finite([torch.full((64,), 60000.0, dtype=torch.float16), torch.full((2,), 1e150, dtype=torch.float64), None])
    for broken in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="not finite"):
            check_finite([torch.ones(3), torch.tensor([1.0, broken], dtype=torch.float16)])
