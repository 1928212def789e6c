"""A small GPT-2 on E2E over a fleet: it learns, adapters alone travel, every configured block runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lilliput import Experiment
from lilliput.algorithms import FedAvg, FslSage, SplitFedV1
from lilliput.data import Dataset, Federated, federate, load
from lilliput.fake import Placeholder
from lilliput.models import build, lora
from lilliput.splitter import Split
from lilliput.tasks import Supervised, accuracy, perplexity
from lilliput.tasks.generation import answers
from lilliput.tasks.scores import scores

for library in ("transformers", "peft", "sacrebleu"):
    pytest.importorskip(library)
CLIENTS, LAYERS, HIDDEN, RANK = 2, 3, 32, 4
METRICS = {"accuracy": accuracy, "perplexity": perplexity}


@pytest.fixture(scope="module")
def e2e(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """16 lines to train on and 8 to test on."""
    folder = tmp_path_factory.mktemp("e2e")
    for side, lines in (("train", 16), ("test", 8)):
        whole = (shared / "data" / "e2e" / f"{side}.txt").read_text(encoding="utf-8").splitlines()
        (folder / f"{side}.txt").write_text("\n".join(whole[:: len(whole) // lines][:lines]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LILLIPUT_CACHE", "")
        return load("e2e", str(folder), tokenizer=str(shared / "tokenizers" / "gpt2-tiny-5k"))


@pytest.fixture(scope="module")
def held(e2e: Dataset) -> Federated:
    return federate(e2e, clients=CLIENTS, batch_size=4)


def gpt2(e2e: Dataset, rank: int = 0) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"layers": LAYERS, "hidden": HIDDEN, "heads": 2, "dropout": 0.0}
    model = build("gpt2", shape=e2e.shape, classes=e2e.classes, **sizes)
    return lora(model, rank=rank, alpha=32) if rank else model


def example(held: Federated) -> dict[str, torch.Tensor]:
    return {name: x for name, x in next(iter(held.train[0].epoch(None))).items() if name != "labels"}


def run(algorithm: Any, task: Supervised, held: Federated, rounds: int = 2) -> Any:
    return Experiment(algorithm, task, held.train, rounds=rounds, test=held.test).run("sequential")


def test_it_learns_and_what_it_writes_is_scored(e2e: Dataset, held: Federated) -> None:
    task = Supervised(gpt2(e2e), metrics=METRICS)
    start = task.evaluate(task.init()["params"], None, held.test)["loss"]
    history = run(FedAvg(lr=0.02, optimizer="adamw"), task, held, rounds=3)
    last = history.rows[-1]
    assert start == pytest.approx(math.log(e2e.classes), abs=0.2)  # it knows nothing
    assert last["loss"] < start - 1.0
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
    said, references = answers(task, history.models["global"].params, e2e, first=4, new_tokens=12)
    assert len(said) == 4
    assert all(math.isfinite(x) for x in scores(said, references).values())


def test_adapters_alone_travel(e2e: Dataset, held: Federated) -> None:
    task = Supervised(gpt2(e2e, RANK), metrics=METRICS)
    frozen = {n: p.detach().clone() for n, p in task.model.named_parameters() if not p.requires_grad}
    start = task.evaluate(task.init()["params"], None, held.test)["loss"]
    rows = run(FedAvg(lr=0.01, optimizer="adamw"), task, held).rows
    adapters = 4 * LAYERS * RANK * (HIDDEN + 3 * HIDDEN)  # bytes: A and B of c_attn in each block
    for row in rows:
        assert row["up_bytes"] == row["down_bytes"] == CLIENTS * adapters
    assert rows[-1]["loss"] < start
    assert all(torch.equal(x, dict(task.model.named_parameters())[name]) for name, x in frozen.items())


@pytest.mark.filterwarnings("ignore:.*are one tensor")
@pytest.mark.parametrize("rank", [0, RANK])
def test_splitfed_v1_equals_fedavg(e2e: Dataset, held: Federated, rank: int) -> None:
    task = Split.of(gpt2(e2e, rank), 1, example=example(held), tied="frozen" if rank else "untie", metrics=METRICS)
    whole, cut = (run(method(lr=0.05), task, held).rows for method in (FedAvg, SplitFedV1))
    assert [row["loss"] for row in cut] == [row["loss"] for row in whole]
    assert cut[-1]["loss"] < cut[0]["loss"]
    on_device = task.client_part.init()["params"]
    assert all(name.startswith(("transformer.h.0.", "transformer.w")) for name in on_device)
    assert all("lora_" in name for name in on_device) == bool(rank)


def test_fsl_sage_aligns_a_head_and_learns(e2e: Dataset, held: Federated) -> None:
    task = Split.of(gpt2(e2e, RANK), 1, auxiliary=1, example=example(held), tied="frozen", metrics=METRICS)
    start = task.evaluate(task.init()["params"], None, held.test)["loss"]
    method = FslSage(lr=0.01, optimizer="adamw", align_interval=1, align_epochs=2, server_update_interval=1)
    history = run(method, task, held)
    assert history.rows[-1]["loss"] < start
    assert all("lora_" in name for name in history.state["params"])


@pytest.mark.parametrize("cut", [1, 2])
def test_every_configured_block_runs_once(e2e: Dataset, held: Federated, cut: int) -> None:
    """The published program skips blocks where the cut is not in the middle."""
    task = Split.of(gpt2(e2e, RANK), cut, example=example(held), tied="frozen")
    ran: list[str] = []

    def note(name: str, out: Any) -> None:
        if not isinstance(out, Placeholder):  # a part goes through the other side's blocks too, without computing them
            ran.append(name)

    for part in (task.client_part.model, task.server_part.model):
        for name, module in part.named_modules():
            if name.endswith(".mlp"):
                module.register_forward_hook(lambda module, args, out, name=name: note(name, out))
    payload = task.client_part.forward(task.client_part.model, example(held))
    task.server_part.forward(task.server_part.model, (payload, None))
    assert ran == [f"transformer.h.{i}.mlp" for i in range(LAYERS)]
