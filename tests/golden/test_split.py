"""The published program's runs of FedAvg, SplitFed v1 and v2, CSE-FSL and FSL-SAGE, replayed step for step.

The recording: three clients with 3, 3 and 6 fixed batches, three rounds of two local epochs, SGD(0.1, momentum 0.9,
weight decay 1e-4, a tenth of the rate in the third round), heads by Adam(0.01); q = l = 2, alignments of five epochs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lilliput
from lilliput.algorithms import CseFsl, FslSage, SplitFedV1, SplitFedV2
from lilliput.algorithms.fsl_sage import Aligner
from lilliput.algorithms.splitting.shared_half import SharedHalfFedAvg
from lilliput.splitter import Split
from lilliput.training.step import Trainer

HERE = Path(__file__).parent
TRAINING = {
    "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "multistep:2:0.1", "local_epochs": 2,
    "optimizer_state": "keep", "compat": "official",
}  # fmt: skip
HEAD = {"auxiliary_lr": 0.01, "server_update_interval": 2}
RUNS: dict[str, Any] = {
    "fed_avg": SharedHalfFedAvg(**TRAINING),
    "sl_multi_server": SplitFedV1(**TRAINING),
    "sl_single_server": SplitFedV2(**TRAINING),
    "cse_fsl": CseFsl(**TRAINING, **HEAD),
    "fsl_sage": FslSage(**TRAINING, **HEAD, align_interval=2, align_epochs=5),
}


class Part(nn.Module):
    """Linear layers of the recording's names with tanh between them, after the last one too if it is the client's."""

    def __init__(self, last_tanh: bool, **sizes: tuple[int, int]):
        super().__init__()
        for name, (n, m) in sizes.items():
            self.add_module(name, nn.Linear(n, m))
        self.last_tanh = last_tanh

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self.children())
        for layer in layers:
            x = layer(x)
            x = torch.tanh(x) if layer is not layers[-1] or self.last_tanh else x
        return x


class Recording:
    """One file: trees of numbers under prefixes."""

    def __init__(self, name: str):
        self.file = load_file(HERE / f"mlp_sgd__{name}.safetensors")

    def tree(self, prefix: str) -> dict[str, Tensor]:
        start = f"{prefix}/"
        return {key.removeprefix(start): x for key, x in self.file.items() if key.startswith(start)}

    def data(self) -> dict[int, list[tuple[Tensor, Tensor]]]:
        owned = {c: self.tree(f"data/client{c}") for c in range(3)}
        return {c: list(zip(own["x"], own["y"], strict=True)) for c, own in owned.items()}

    def task(self) -> Split:
        parts = Part(True, fc=(6, 5)), Part(False, fc1=(5, 7), fc2=(7, 3)), Part(False, fc=(5, 3))
        for part, name in zip(parts, ("client", "server", "aux"), strict=True):
            part.load_state_dict(self.tree(f"init/{name}"))
        return Split(*parts)

    def steps(self, part: str) -> list[tuple[tuple[int, ...], dict[str, Tensor]]]:
        """(round, client, epoch, batch) of each step, and the part after it."""
        rows = self.tree(f"steps/{part}")
        index = self.file["steps/index"].tolist()
        return [(tuple(at), {name: x[i] for name, x in rows.items()}) for i, at in enumerate(index)]


def run(name: str, rounds: int = 3, folder: Path | None = None) -> lilliput.History:
    recording = Recording(name)
    x, y = recording.tree("data/test")["x"], recording.tree("data/test")["y"]
    return lilliput.Experiment(
        algorithm=RUNS[name], task=recording.task(), data=recording.data(), rounds=rounds, test=[(x, y)], folder=folder
    ).run(engine="sequential")


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], prefix: str, where: object) -> None:
    assert {n for n in ours if n.startswith(prefix)} == {prefix + n for n in theirs}
    for name, x in theirs.items():
        torch.testing.assert_close(ours[prefix + name], x, atol=2e-6, rtol=0, msg=lambda m, n=name: f"{where} {n}: {m}")


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The parameters after every optimizer step of the run, in the order of the steps."""
    seen: list[dict[str, Tensor]] = []
    plain = Trainer.apply

    def apply(self: Trainer, indices: Any, grads: list[Tensor], *squares: Any) -> None:
        plain(self, indices, grads, *squares)
        seen.append({n: p.detach().clone() for n, p in zip(self.names, self.params, strict=True)})

    monkeypatch.setattr(Trainer, "apply", apply)
    return seen


def of(part: str, applied: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    return iter([tree for tree in applied if any(name.startswith(f"{part}.") for name in tree)])


@pytest.mark.parametrize("name", RUNS)
def test_every_step_of_every_client_and_of_the_server_is_replayed(name: str, applied: list) -> None:
    run(name)
    recording = Recording(name)
    for part, prefix in (("client", "client."), ("server", "server.")):
        steps, ours = recording.steps(part), of(part, applied)
        if part == "server" and "fsl" in name:  # NaN marks the batches on which the server took no step
            losses = recording.file["steps/g_loss"].tolist()
            steps = [step for step, loss in zip(steps, losses, strict=True) if loss == loss]
        if name == "sl_multi_server":  # its clients work at the same time: batch by batch, not client by client
            length = (3, 3, 6)
            steps.sort(key=lambda step: (step[0][0], step[0][2] * length[step[0][1]] + step[0][3], step[0][1]))
        assert len(steps) == (3 * 12 if part == "server" and "fsl" in name else 3 * 24)
        for where, theirs in steps:
            assert_close({n: x for n, x in next(ours).items() if n.startswith(prefix)}, theirs, prefix, (name, where))
        assert next(ours, None) is None


@pytest.mark.parametrize("name", RUNS)
def test_every_round_ends_with_the_published_model_loss_and_accuracy(name: str) -> None:
    file = Recording(name)
    for rounds in (1, 2, 3):
        history = run(name, rounds)
        params = history.models["global"].params
        for part in ("client", "server"):
            theirs = {n: x[rounds - 1] for n, x in file.tree(f"rounds/{part}").items()}
            assert_close({n: x for n, x in params.items() if n.startswith(part)}, theirs, f"{part}.", rounds)
        assert history.rows[-1]["loss"] == pytest.approx(float(file.file["rounds/test_loss"][rounds - 1]), abs=2e-6)
        assert history.rows[-1]["accuracy"] == pytest.approx(float(file.file["rounds/test_acc"][rounds - 1]), abs=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_bytes_as_published_are_exact(name: str, tmp_path: Path) -> None:
    """Everything that travels but the labels, which the published count leaves out."""
    run(name, folder=tmp_path)
    ledger = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    cumulative, sums = 0, []
    for line in ledger:
        for call in line["calls"]:
            cumulative += sum(n for way in ("up", "down") for kind, n in call[way].items() if kind != "labels")
        sums.append(cumulative)
    assert sums == Recording(name).file["rounds/comm_bytes"].tolist()


def test_cse_fsl_trains_its_heads_as_published(applied: list) -> None:
    history, file = run("cse_fsl"), Recording("cse_fsl")
    for (where, theirs), ours in zip(file.steps("aux"), of("auxiliary", applied), strict=True):
        assert_close(ours, theirs, "auxiliary.", where)
    final = {n: x[-1] for n, x in file.tree("rounds/aux0").items()}
    assert_close(history.state["auxiliary"], final, "auxiliary.", "mean")


def test_fsl_sage_aligns_its_heads_as_published(applied: list, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[tuple[int, int, Tensor, Tensor]] = []
    fit, slopes, slope = Aligner._fit, [], Aligner._slope

    def noted_fit(self: Aligner, head: Any, cut: Tensor, y: Tensor, c: int) -> None:
        fits.append((self.fleet.round - 1, c, cut, y))
        fit(self, head, cut, y, c)

    def noted_slope(self: Aligner, *args: Any, **options: Any) -> Tensor:
        out = slope(self, *args, **options)
        if not options.get("graph"):
            slopes.append(out)
        return out

    monkeypatch.setattr(Aligner, "_fit", noted_fit)
    monkeypatch.setattr(Aligner, "_slope", noted_slope)
    run("fsl_sage")
    file = Recording("fsl_sage")
    heads = list(of("auxiliary", applied))
    assert [[t, c] for t, c, *_ in fits] == file.file["align/index"].tolist()
    for i, ((_, _, cut, y), target) in enumerate(zip(fits, slopes, strict=True)):
        theirs = file.tree(f"align/{i}")
        torch.testing.assert_close(cut, theirs["memory_x"], atol=2e-6, rtol=0)
        torch.testing.assert_close(target, theirs["target_grad"], atol=2e-6, rtol=0)
        assert torch.equal(y, theirs["labels"])
        assert_close(heads[5 * i + 4], file.tree(f"align/{i}/aux_after"), "auxiliary.", i)
    assert len(heads) == 5 * len(fits)


@pytest.mark.parametrize("name", RUNS)
def test_the_copies_are_the_recordings(name: str, shared: Path) -> None:
    file = f"mlp_sgd__{name}.safetensors"
    assert (shared / "golden" / "split" / file).read_bytes() == (HERE / file).read_bytes()
