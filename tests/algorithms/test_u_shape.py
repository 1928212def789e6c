"""A tail on the device: the same numbers, and no label leaves it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fixtures import assert_same_state, batches
from split_toys import run, three_parts
from torch import nn

from lilliput.algorithms import CseFsl, FedAvg, FslSage, SplitFedV1, SplitFedV2
from lilliput.core import tree
from lilliput.engines.device import Device
from lilliput.splitter import Split

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01, "local_epochs": 2}
ONE = {0: [batch for c in (0, 1, 2) for batch in batches()[c]]}


@pytest.mark.parametrize("cohort", [None, 3])
def test_splitfed_v1_with_a_tail_is_fedavg_to_the_last_bit(cohort: int | None) -> None:
    settings = {**SETTINGS, "cohort": cohort, "optimizer_state": "keep"}
    a, b = run(SplitFedV1(**settings), three_parts()), run(FedAvg(**settings), three_parts())
    assert_same_state(a.state, b.state)
    assert [r["train_loss"] for r in a.rows] == pytest.approx([r["train_loss"] for r in b.rows], abs=1e-6)


@pytest.mark.parametrize("order", ["sequential", "interleaved"])
def test_one_client_makes_both_versions_of_splitfed_the_same(order: Any) -> None:
    a = run(SplitFedV1(**SETTINGS), three_parts(), ONE, rounds=1).models["global"].params
    b = run(SplitFedV2(**SETTINGS, order=order), three_parts(), ONE, rounds=1).models["global"].params
    for name, x in a.items():
        torch.testing.assert_close(b[name], x, atol=1e-7, rtol=0)


def test_a_chunk_is_taken_at_the_weights_its_activations_were_made_with() -> None:
    """Two batches, one exchange: the tail steps on each as it comes, server and device afterwards by old weights."""
    on = Split(nn.Linear(6, 8), nn.Linear(8, 5), tail=nn.Linear(5, 3))
    first = {n: p.clone() for n, p in on.init()["params"].items()}
    history = run(SplitFedV1(lr=0.1, local_steps=2, chunk=2), on, {0: ONE[0][:2]}, rounds=1)
    client, server, tail = (copy.deepcopy(p.model) for p in (on.client_part, on.server_part, on.tail_part))  # type: ignore[union-attr]
    ends: list[Any] = [[], [], []]
    for x, y in ONE[0][:2]:
        cut = client(x)
        middle = server(cut)
        seen = middle.detach().requires_grad_()
        *own, slope = torch.autograd.grad(nn.functional.cross_entropy(tail(seen), y), [*tail.parameters(), seen])
        ends[0].append(torch.autograd.grad(middle, list(client.parameters()), slope, retain_graph=True))
        ends[1].append(torch.autograd.grad(middle, list(server.parameters()), slope))
        ends[2].append(own)
        stepped(tail, own)
    for module, grads in zip((client, server), ends[:2], strict=True):
        for g in grads:
            stepped(module, g)
    after = {n: p for module in (client, server, tail) for n, p in module.named_parameters()}
    for name, x in history.state["params"].items():
        torch.testing.assert_close(x, after[name].detach(), atol=1e-6, rtol=0)
        assert not torch.equal(x, first[name])


@torch.no_grad()
def stepped(module: nn.Module, grads: Any) -> None:
    for p, g in zip(module.parameters(), grads, strict=True):
        p.sub_(g, alpha=0.1)


@pytest.mark.parametrize("method", [SplitFedV1, SplitFedV2])
def test_no_label_is_on_the_wire(method: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are the only integers of this run: nothing that is sent, up or down, has any."""
    sent: list[Any] = []
    handle = Device.handle

    def up(self: Device, request: Any) -> Any:
        response = handle(self, request)
        sent.extend((request.common, request.own, response.body))
        return response

    monkeypatch.setattr(Device, "handle", up)
    run(method(**SETTINGS), three_parts(norm=False))
    everything = [x for body in sent for x in tree.tensors(body or {})]
    assert len(everything) > 100 and all(x.is_floating_point() for x in everything)
    assert not any("labels" in (body or {}) for body in sent)
    kinds = {kind for body in sent for kind in body or {}}
    assert {"cut", "middle", "middle_gradient", "gradient"} <= kinds


def test_a_client_that_sends_what_does_not_fit_is_out_and_the_rest_go_on() -> None:
    data = batches()
    data[1] = [(x, y + 7) for x, y in data[1]]
    for method in (SplitFedV1, SplitFedV2):
        history = run(method(**SETTINGS), three_parts(), data, rounds=2)
        assert [row["dropped"] for row in history.rows] == [1, 1]
        assert all(x.isfinite().all() for x in tree.tensors(history.state))


@pytest.mark.parametrize("method", [CseFsl, FslSage])
def test_methods_whose_server_needs_labels_refuse_a_tail(method: type) -> None:
    on = Split(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), tail=nn.Linear(8, 3))
    with pytest.raises(ValueError, match="keeps them there"):
        run(method(), on)


def test_a_tail_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit the tail"):
        run(SplitFedV1(), Split(nn.Linear(6, 8), nn.Linear(8, 8), tail=nn.Linear(7, 3)))
