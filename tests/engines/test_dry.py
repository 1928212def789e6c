"""The dry engine says beforehand what the ledger will say: byte for byte, kind for kind, call for call."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lilliput
from lilliput import models
from lilliput.algorithms import CseFsl, FedAvg, FslSage, SplitFedV1
from lilliput.core.fleet import Profile
from lilliput.data.batches import ArrayBatches
from lilliput.engines import Dry, Sequential, Workers
from lilliput.engines.dry import ledgers, predict
from lilliput.splitter import Split
from lilliput.tasks import Supervised
from lilliput.training.updates import OPTIMIZERS
from lilliput.wire import codecs

sys.path.insert(0, str(Path(__file__).parents[1] / "laws"))
from fixtures import METHODS, batches, experiment

COUNTED = (
    "call", "calls", "client", "handler", "down", "down_overhead", "up", "up_overhead", "peak_memory_bytes", "flops",
    "communication_seconds", "simulated_seconds",
)  # fmt: skip


def real_calls(e: lilliput.Experiment, folder: Path) -> list[list[dict[str, Any]]]:
    """What the ledger of a run in which everything is encoded says of each round's calls."""
    e.folder = folder
    e.run(Sequential(wire=True))
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    calls = [[call for call in json.loads(line)["calls"] if not call["evaluation"]] for line in lines]
    return [[{k: call[k] for k in COUNTED} for call in some] for some in calls]


def predicted_calls(e: lilliput.Experiment) -> list[list[dict[str, Any]]]:
    return [[{k: vars(entry)[k] for k in COUNTED} for entry in ledger.entries] for ledger, _ in ledgers(e, Dry())]


@pytest.mark.parametrize("codec", [None, "bf16", "int8:activations+bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_it_equals_the_ledger_for_every_method(name: str, codec: str | None, tmp_path: Path) -> None:
    """Three of six clients a round, whose batches are one to three; FSL-SAGE aligns every second round."""
    options = {"evaluate": "none", "codec": codecs.build(codec) if codec else None}
    expected = real_calls(experiment(name, **options), tmp_path)
    assert predicted_calls(experiment(name, **options)) == expected


def arrays(sizes: Mapping[int, int], batch_size: int = 4) -> dict[int, ArrayBatches]:
    draw = torch.Generator().manual_seed(1)

    def own(n: int) -> ArrayBatches:
        columns = [torch.randn(n, 6, generator=draw), torch.randint(3, (n,), generator=draw)]
        return ArrayBatches(columns, batch_size, transform=lambda x, generator: x * 2)

    return {c: own(n) for c, n in sizes.items()}


@pytest.mark.parametrize("name", ["scaffold", "splitfed_v1", "fsl_sage"])
def test_uneven_last_batches_and_clients_that_are_not_always_up(name: str, tmp_path: Path) -> None:
    made = [
        experiment(name, evaluate="none", profiles=Profile(availability=0.7), quorum=0.0, settings={"cohort": 2})
        for _ in range(2)
    ]
    for e in made:
        e.data = arrays({0: 10, 1: 7, 2: 5, 3: 10})
    assert predicted_calls(made[0]) == real_calls(made[1], tmp_path)


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"chunk": 2}, {"buffers": "none"}])
def test_settings_that_change_what_travels(settings: dict[str, Any], tmp_path: Path) -> None:
    made = [experiment("splitfed_v1", evaluate="none", settings=settings) for _ in range(2)]
    assert sizes(predicted_calls(made[0])) == sizes(real_calls(made[1], tmp_path))


def sizes(rounds: list[list[dict[str, Any]]]) -> list[list[Any]]:
    """The bytes alone: a kernel may take memory of its own, or none where a model's code sees that a mask is full."""
    return [[[call[k] for k in ("down", "down_overhead", "up", "up_overhead")] for call in calls] for calls in rounds]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_under_every_optimizer(name: str) -> None:
    """Those that look at values (is the gradient zero, is it finite, is a basis due?) find ghosts in order."""
    learnt = "galore" in name or "subspace" in name
    options = {"rank": 2} if learnt or name in ("fira", "apollo") else {}
    average = "average" if learnt else "keep"
    method = FedAvg(lr=0.01, optimizer=name, optimizer_options=options, optimizer_state=average)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    e = lilliput.Experiment(method, Supervised(model), batches(), rounds=2, evaluate="none")
    kinds = ("up_bytes", "down_bytes", "overhead_bytes", "flops")
    found = [[row[k] for k in kinds] for row in predict(e).rows]
    for engine in (Sequential(), Workers(2), Changing()):
        assert found == [[row[k] for k in kinds] for row in e.run(engine).rows]


class Changing(Sequential):
    """A sequential engine that knows nothing more in each round."""

    def grow(self, seconds: float) -> Changing:
        self.open(self._device.job)
        return self


def test_a_run_on_it_is_a_history_without_metrics() -> None:
    e = experiment("fedavg", rounds=2)
    history = e.run("dry")
    real = e.run(Sequential()).rows
    assert history.state == {} and history.models == {}
    assert [row["round"] for row in history.rows] == [1, 2]
    for row, other in zip(history.rows, real, strict=True):
        assert row == {key: other[key] for key in row}
        assert not {"train_loss", "loss", "accuracy", "seconds"} & row.keys()


def test_it_changes_nothing_and_needs_no_memory_for_the_model() -> None:
    """A layer of 160 GB, and clients whose 40 GB of data are as little there."""
    with torch.device("meta"):
        giant = Supervised(nn.Linear(200_000, 200_000, bias=False))
        data = {
            c: ArrayBatches([torch.empty(50_000, 200_000), torch.empty(50_000, dtype=torch.int64)], 1000)
            for c in (0, 1)
        }
    predicted = predict(lilliput.Experiment(FedAvg(lr=0.1), giant, data, rounds=3, reply_limit=1 << 40))
    assert [row["up_bytes"] for row in predicted.rows] == [2 * 4 * 200_000**2] * 3
    assert giant.model.weight.is_meta
    flops = 2 * 2 * 200_000**2 * 50_000  # of the product and of the weight's gradient; the input has none
    assert predicted.rounds[0].clients[0].flops == flops
    assert predicted.short == {}


def test_clients_that_cannot_hold_the_method_are_named_with_what_they_lack() -> None:
    needs = predict(experiment("fedavg", rounds=1, settings={"cohort": None})).rounds[0].clients
    profiles = {1: Profile(memory_bytes=needs[1].peak_memory_bytes - 100), 2: Profile(memory_bytes=1000)}
    made = experiment("fedavg", rounds=1, settings={"cohort": None}, profiles=profiles, evaluate="none")
    predicted = predict(made)
    assert predicted.short == {1: 100, 2: needs[2].peak_memory_bytes - 1000}
    assert predicted.rows[0] == {key: made.run(Sequential(wire=True)).rows[0][key] for key in predicted.rows[0]}
    assert "2 of 6 clients cannot hold it" in str(predicted) and "client 2 lacks most" in str(predicted)


def test_a_run_for_which_too_few_can_hold_the_method_is_said_to_stop() -> None:
    predicted = predict(experiment("fedavg", profiles=Profile(memory_bytes=1000)))
    assert predicted.rounds == () and len(predicted.short) == 3
    assert "fewer than the quorum" in predicted.stopped and "the run would stop" in str(predicted)


def test_what_is_wrong_with_a_method_is_raised_as_it_is() -> None:
    wrong = lilliput.Experiment(FedAvg(lr=0.1), Supervised(nn.Linear(5, 3)), batches(), rounds=1)
    with pytest.raises(RuntimeError, match="RuntimeError"):
        predict(wrong)


def resnet18(classes: int) -> Split:
    """The published ResNet-18 without weights, cut behind its second stage, and the published head."""
    with torch.device("meta"):
        whole: Any = models.build("resnet18", shape=(3, 32, 32), classes=classes, stem="imagenet")
        first = nn.Sequential(whole.conv1, whole.bn1, nn.ReLU(), whole.maxpool, whole.layer1, whole.layer2)
        last = nn.Sequential(whole.layer3, whole.layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten(), whole.fc)
        head = nn.Sequential(
            copy.deepcopy(whole.layer3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, classes)
        )
    return Split(first, last, head)


def published(method: Any, clients: int, batch: int, rounds: int, classes: int = 10, codec: Any = None) -> list[float]:
    """MiB of each round of a CIFAR of 50,000 images, as the paper counts them."""
    n = 50_000 // clients
    with torch.device("meta"):
        data = {
            c: ArrayBatches([torch.empty(n, 3, 32, 32), torch.empty(n, dtype=torch.int64)], batch)
            for c in range(clients)
        }
    predicted = predict(lilliput.Experiment(method, resnet18(classes), data, rounds=200, codec=codec), rounds)
    return [round(cost.count("published") / 2**20, 2) for cost in predicted.rounds]


SAME = {"lr": 1e-3, "optimizer": "adam", "local_epochs": 1}


@pytest.mark.parametrize(
    ("method", "mebibytes"),
    [
        (FedAvg(**SAME), [853.83]),
        (SplitFedV1(**SAME), [833.51]),
        (CseFsl(**SAME), [292.85]),
        (FslSage(**SAME), [212.56, 132.26]),
    ],
)  # fmt: skip
def test_the_published_mebibytes_of_a_round_of_resnet18(method: Any, mebibytes: list[float]) -> None:
    """CIFAR-10 on 10 clients, batches of 256, q = 5; FSL-SAGE aligns in the first of every ten rounds."""
    assert published(method, 10, 256, len(mebibytes)) == mebibytes


@pytest.mark.slow
def test_a_table_of_the_paper_at_other_sizes() -> None:
    assert published(FedAvg(**SAME), 10, 256, 1, classes=100) == [857.35]
    assert published(CseFsl(**SAME), 10, 256, 1, classes=100) == [294.61]
    assert published(FslSage(**SAME), 10, 256, 1, classes=100) == [213.44]
    assert published(FedAvg(**SAME), 3, 128, 1) == [256.15]
    assert published(CseFsl(**SAME), 3, 128, 1) == [142.46]
    assert published(FslSage(**SAME), 3, 128, 2) == [118.38, 94.29]


def test_fsl_sage_moves_a_sixth_of_splitfed_and_with_codecs_a_sixteenth() -> None:
    splitfed = published(SplitFedV1(**SAME), 10, 256, 1)[0]
    aligning, ordinary = published(FslSage(**SAME), 10, 256, 2)
    assert round((aligning + 9 * ordinary) / 10 / splitfed, 3) == 0.168
    aligning, ordinary = published(FslSage(**SAME), 10, 256, 2, codec=codecs.build("int8:activations+bf16"))
    assert round((aligning + 9 * ordinary) / 10 / splitfed, 3) == 0.061


@pytest.mark.parametrize("source", ["gpt2", "llama_60m"])
def test_language_models_with_masks(source: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from lilliput.models.transformers import pretrained

    torch.manual_seed(0)
    model = pretrained(source, layers=3, hidden=16, heads=2, vocabulary=40)
    at = "transformer.h.1" if source == "gpt2" else "model.layers.1"

    def batch(n: int, length: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(n, length, dtype=torch.int64)
        mask[0, -2:] = 0
        tokens = torch.randint(40, (n, length))
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.where(mask > 0, -100)}

    data = {0: [batch(4, 8), batch(2, 6)], 1: [batch(4, 8)]}
    for method, task in (
        (FedAvg(lr=0.1), Supervised(model)),
        (FslSage(lr=0.1, memory_size=9, align_epochs=2), Split.of(model, at, auxiliary=1)),
    ):
        made = [lilliput.Experiment(method, task, data, rounds=2, evaluate="none") for _ in range(2)]
        assert sizes(predicted_calls(made[0])) == sizes(real_calls(made[1], tmp_path / type(method).__name__))
