"""Modules whose forward moves buffers, saved or not, or plain attributes: a repeat and a resident change no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures import assert_same_state, batches
from moving_toys import LAYERS, moving_parts
from split_toys import run

from lilliput.algorithms import SPLIT, FedAvg, SplitFedV1
from lilliput.engines.device import Device

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.5, "local_epochs": 2}


@pytest.mark.parametrize("buffers", ["average", "local", "none"])
@pytest.mark.parametrize("kind", LAYERS)
def test_splitfed_v1_is_fedavg_whatever_a_forward_moves(kind: str, buffers: Any) -> None:
    settings = {**SETTINGS, "buffers": buffers}
    whole = run(FedAvg(**settings), moving_parts(kind), rounds=2)
    for chunk in (1, 2):
        local: dict[str, Any] = (
            {"local_steps": 1} if chunk == 2 else {}
        )  # a chunk's gradients are taken at the same weights
        a = run(SplitFedV1(**settings, **local, chunk=chunk, optimizer_state="reset"), moving_parts(kind), rounds=2)
        b = run(FedAvg(**settings, **local), moving_parts(kind), rounds=2) if local else whole
        assert_same_state(a.state, b.state)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", SPLIT)
def test_clients_leave_each_other_nothing_and_a_forgetful_device_goes_on_alike(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = SPLIT[name](**SETTINGS, buffers="none")
    straight = run(method, moving_parts(kind), rounds=2)
    handle = Device.handle

    def forgetful(self: Device, request: Any) -> Any:
        self.job.task.halves.clear()
        self.job.task.streams.clear()
        if request.client % 2:  # as if this client's worker had built its modules anew
            for part in (*self.job.task.on_device.values(), self.job.task.auxiliary_part):
                part._residents._residents.clear()
        return handle(self, request)

    monkeypatch.setattr(Device, "handle", forgetful)
    assert_same_state(run(method, moving_parts(kind), rounds=2).state, straight.state)


@pytest.mark.parametrize("buffers", ["average", "local", "none"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_client_of_a_whole_model_finds_what_it_would_find_alone(kind: str, buffers: Any) -> None:
    """Local training of three clients in turn, and of each by itself, moves the model alike."""
    data = batches()
    method = FedAvg(**SETTINGS, buffers=buffers)

    def changes(cohort: list[int]) -> list[Any]:
        seen: list[Any] = []

        class Watched(FedAvg):
            def round(self, state: Any, fleet: Any) -> Any:
                for reply in fleet.call(self.train, state, to=cohort):
                    seen.append(reply.body["delta"])
                return state

        run(Watched(**{n: getattr(method, n) for n in ("lr", "momentum", "local_epochs", "buffers")}),
            moving_parts(kind), data, rounds=1, quorum=0)  # fmt: skip
        return seen

    together = changes([0, 1, 2])
    for c in range(3):
        assert_same_state(together[c], changes([c])[0])


@pytest.mark.parametrize("kind", ["unsaved_counter", "plain_tensor", "old_spectral_norm"])
def test_workers_give_the_same_bits(kind: str) -> None:
    from lilliput.engines import Workers

    for method in (FedAvg(**SETTINGS, buffers="none"), SplitFedV1(**SETTINGS, buffers="none")):
        a, b = (run(method, moving_parts(kind), rounds=2, engine=engine) for engine in (None, Workers(2)))
        assert_same_state(a.state, b.state)


def test_a_model_that_has_run_before_is_trained_too() -> None:
    """Spectral norm's older form leaves a tensor in a graph behind, which nothing can copy."""
    on = moving_parts("old_spectral_norm")
    fresh = run(FedAvg(**SETTINGS, buffers="none"), moving_parts("old_spectral_norm")).state
    on.model.eval()(torch.randn(2, 6))
    assert_same_state(run(FedAvg(**SETTINGS, buffers="none"), on).state, fresh)
    run(SPLIT["fsl_sage"](**SETTINGS, buffers="none"), on)
