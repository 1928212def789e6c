"""The lean step in federated training: the same weights after the same rounds, and less memory in the ledger."""

from __future__ import annotations

import copy

import torch
from causal import example, make

from lilliput import Experiment, lean, tasks
from lilliput.algorithms import FedAvg
from lilliput.models.transformers import for_data


def trained(model: torch.nn.Module) -> tuple[dict, float]:
    data = {client: [example(2, 12 + client)] for client in range(2)}
    algorithm = FedAvg(cohort=2, lr=0.1, local_epochs=2)
    history = Experiment(algorithm, tasks.Supervised(model), data, rounds=2).run(engine="sequential")
    return history.state["params"], max(row["peak_memory_bytes"] for row in history.rows)


def test_weights_are_the_same_and_memory_is_less() -> None:
    stock = make()
    params, peak = trained(copy.deepcopy(stock))
    found, least = trained(lean.patch(stock))
    for name, x in params.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-6)
    assert least < peak


def test_a_model_is_lean_by_an_option() -> None:
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "mlp": 32}
    assert lean.patched(for_data("llama_9m", shape=[12], classes=50, lean=True, **sizes))
    assert not lean.patched(for_data("llama_9m", shape=[12], classes=50, **sizes))
