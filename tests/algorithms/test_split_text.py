"""Split language models: activations that are a dict, batches of different length, labels that do not count."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures import assert_same_state
from split_toys import Embed, language, run, text, texts, wider
from torch import Tensor, nn

from lilliput.algorithms import SPLIT, CseFsl, FedAvg, FslSage, SplitFedV1, SplitFedV2
from lilliput.algorithms.fsl_sage import Aligner
from lilliput.algorithms.splitting.memory import remembered
from lilliput.core import tree
from lilliput.core.fleet import Reply
from lilliput.engines import Sequential
from lilliput.splitter import Split

SETTINGS: dict[str, Any] = {"lr": 0.5, "local_epochs": 2}


def test_splitfed_v1_is_fedavg_to_the_last_bit() -> None:
    a, b = (run(method(**SETTINGS), language(), texts()) for method in (SplitFedV1, FedAvg))
    assert_same_state(a.state, b.state)
    assert [r["train_loss"] for r in a.rows] == pytest.approx([r["train_loss"] for r in b.rows], abs=1e-6)


@pytest.mark.parametrize("name", SPLIT)
def test_the_wire_changes_no_bit(name: str) -> None:
    a, b = (run(SPLIT[name](**SETTINGS), language(), texts(), engine=Sequential(wire=wire)) for wire in (False, True))
    assert_same_state(a.state, b.state)


@pytest.mark.parametrize("name", SPLIT)
def test_padding_changes_nothing(name: str) -> None:
    """Losses, steps, targets and alignment are those of batches that are padded further, up to rounding."""
    padded = {c: [wider(batch, 3) for batch in own] for c, own in texts().items()}
    options = {"align_epochs": 5, "auxiliary_optimizer": "sgd"} if name == "fsl_sage" else {}
    a, b = (run(SPLIT[name](**SETTINGS, **options), language(), data) for data in (texts(), padded))
    for n, x in a.state["params"].items():
        torch.testing.assert_close(b.state["params"][n], x, atol=1e-6, rtol=0)
    assert [r["train_loss"] for r in a.rows] == pytest.approx([r["train_loss"] for r in b.rows], abs=1e-6)


def test_only_what_has_a_gradient_gets_one(tmp_path: Path) -> None:
    """2 and 3 sentences of 3 and 4 words: the mask (8 bytes a word) goes up with activations of 4 floats a word, and
    gradients come back for these alone."""
    data = {0: [text(2, 3), text(3, 4)]}
    run(SplitFedV1(lr=0.1), language(), data, rounds=1, folder=tmp_path)
    calls = json.loads((tmp_path / "ledger.jsonl").read_text())["calls"]
    sums = {kind: sum(c[way].get(kind, 0) for c in calls for way in ("up", "down")) for kind in ("cut", "gradient")}
    words = 2 * 3 + 3 * 4
    assert sums == {"cut": words * (4 * 4 + 8), "gradient": words * 4 * 4}


class Constant(Embed):
    """Floats that depend on no parameter travel too."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {**super().forward(input_ids, attention_mask), "scale": torch.ones(len(input_ids), 5)}


def test_floats_that_depend_on_no_parameter_get_no_gradient(tmp_path: Path) -> None:
    on = language()
    on = Split(Constant(), on.server_part.model.server)  # type: ignore[arg-type]
    run(SplitFedV1(lr=0.1), on, {0: [text(2, 3)]}, rounds=1, folder=tmp_path)
    calls = json.loads((tmp_path / "ledger.jsonl").read_text())["calls"]
    assert on.differentiable == {"hidden"}
    assert sum(c["down"].get("gradient", 0) for c in calls) == 2 * 3 * 4 * 4


@pytest.mark.parametrize("method", [SplitFedV1, SplitFedV2])
def test_a_device_that_has_nothing_to_train_only_runs_forwards(method: type, tmp_path: Path) -> None:
    on = language()
    for module in (on.client_part.model, on.model.client):
        module.requires_grad_(False)
    history = run(method(**SETTINGS), on, texts(), folder=tmp_path)
    assert set(history.state["params"]) == {"server.out.weight", "server.out.bias"}
    calls = [c for line in (tmp_path / "ledger.jsonl").read_text().splitlines() for c in json.loads(line)["calls"]]
    assert sum(n for c in calls for kind, n in c["down"].items() if kind != "loss") == 0
    assert history.rows[-1]["train_loss"] < history.rows[0]["train_loss"]


def test_a_batch_weighs_as_many_labels_as_it_has_that_count() -> None:
    """Training that does not move: the mean over a client's labels, and over all test labels, is one over tokens."""
    data, on = {0: [text(2, 3), text(5, 6, seed=1)]}, language()
    model = on.resident(on.init()["params"])
    labels = torch.cat([batch["labels"].flatten() for batch in data[0]])
    logits = torch.cat([on.outputs(model, batch)["logits"].flatten(0, 1) for batch in data[0]])
    mean = nn.functional.cross_entropy(logits, labels).item()
    for method in (SplitFedV1, SplitFedV2, FedAvg):
        row = run(method(lr=1e-20), on, data, rounds=1, test=data[0]).rows[0]
        assert (row["train_loss"], row["loss"]) == (pytest.approx(mean, abs=1e-6), pytest.approx(mean, abs=1e-6))


def test_the_memory_pads_on_the_right() -> None:
    batches = [text(2, 3), text(1, 5, seed=1), text(2, 4, seed=2)]
    embed = Embed()
    cuts = [embed(b["input_ids"], b["attention_mask"]) for b in batches]
    held: Any = {}
    for cut, batch in zip(cuts, batches, strict=True):
        held = remembered(held, [cut], [batch["labels"]], 4)
    first = wider(batches[0], 2)
    assert held["cut"]["hidden"].shape == (4, 5, 4) and held["labels"].shape == (4, 5)
    assert torch.equal(held["labels"][0], first["labels"][1])
    assert torch.equal(held["cut"]["attention_mask"][0], first["attention_mask"][1])
    assert torch.equal(held["cut"]["hidden"][0, :3], cuts[0]["hidden"][1])
    assert not held["cut"]["hidden"][0, 3:].any() and torch.equal(held["cut"]["hidden"][1], cuts[1]["hidden"][0])


def aligner(on: Split, **settings: Any) -> tuple[Aligner, Any]:
    """An aligner by itself, and the activations and labels of 4 sentences."""
    method = FslSage(**settings)
    fleet: Any = SimpleNamespace(memory={}, round=1, rounds=1, seed=0, task=on, examples={0: 4})
    found = Aligner(method, fleet, method.server(fleet, on.server_part.init()), method.init(on))
    batch = text(4, 4)
    with torch.no_grad():
        cut = on.client_part.forward(on.client_part.model, batch)
    found.remember(Reply(0, {"cut": {"0": cut}, "labels": {"0": batch["labels"]}}, 4, {}))
    return found, (cut, batch["labels"])


def test_an_examples_target_depends_on_no_other_and_not_on_padding() -> None:
    """The gradient of the sum over its labels; a position that nobody sees and whose label does not count has none."""
    on = language()
    one, (cut, y) = aligner(on)
    together = one._slope(one.server, cut, y, (0,), again=True)["hidden"]
    for i in range(4):
        alone = one._slope(one.server, tree.mapped(cut, lambda x, i=i: x[i : i + 1]), y[i : i + 1], (0,), again=True)
        torch.testing.assert_close(alone["hidden"][0], together[i], atol=1e-6, rtol=0)
    h = cut["hidden"].clone().requires_grad_()
    total = nn.functional.cross_entropy(
        on.server_part.model({**cut, "hidden": h}).flatten(0, 1), y.flatten(), reduction="sum"
    )
    torch.testing.assert_close(together, torch.autograd.grad(total, h)[0], atol=1e-6, rtol=0)
    longer = {n: nn.functional.pad(x, (0, 0, 0, 2) if x.dim() == 3 else (0, 2)) for n, x in cut.items()}
    padded = one._slope(one.server, longer, nn.functional.pad(y, (0, 2), value=-100), (0,), again=True)["hidden"]
    torch.testing.assert_close(padded[:, :4], together, atol=1e-6, rtol=0)
    assert not padded[:, 4:].any()


def test_alignment_sees_the_labels_that_training_sees() -> None:
    """A head learns otherwise as soon as the labels that do not count in training are made to count in the memory."""
    heads = []
    for counts in (False, True):
        one, _ = aligner(language(), align_epochs=3)
        held = one.fleet.memory[0]
        held["labels"] = held["labels"].masked_fill(held["labels"] == -100, 3) if counts else held["labels"]
        heads.append(one.align(0))
    assert all(not torch.equal(heads[0][n], x) for n, x in heads[1].items())


def test_methods_with_heads_learn_from_dicts() -> None:
    for method in (CseFsl(**SETTINGS), FslSage(**SETTINGS, align_epochs=5)):
        rows = run(method, language(), texts(), rounds=4, test=texts()[0]).rows
        assert rows[-1]["train_loss"] < rows[0]["train_loss"]
