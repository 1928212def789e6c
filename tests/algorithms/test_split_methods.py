"""Split learning: what its methods must coincide with, and what they must leave alone."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures import assert_same_state, batches, network
from torch import Tensor, nn

import lilliput
from lilliput import models, wire
from lilliput.algorithms import SPLIT, CseFsl, FedAvg, FslSage, SplitFedV1, SplitFedV2
from lilliput.algorithms.fsl_sage import Aligner
from lilliput.core import random, tree
from lilliput.core.fleet import Client, Reply, on_client
from lilliput.core.tree import Body
from lilliput.data.batches import ArrayBatches
from lilliput.engines import Sequential
from lilliput.engines.device import Device
from lilliput.splitter import Split
from lilliput.tasks import Supervised
from lilliput.training.step import Trainer

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01, "local_epochs": 2}
ONE = {0: [batch for c in (0, 1, 2) for batch in batches()[c]]}  # six batches on one client


def task(auxiliary: nn.Module | None = None, dropout: float = 0.0, norm: bool = True) -> Split:
    model = network(norm)
    client = nn.Sequential(model[0], model[1], nn.Dropout(dropout))
    return Split(client, nn.Sequential(nn.ReLU(), nn.Dropout(dropout), model[3]), auxiliary or nn.Linear(8, 3))


def run(algorithm: Any, data: Any = None, rounds: int = 3, on: Any = None, **options: Any) -> lilliput.History:
    data = data if data is not None else batches()
    e = lilliput.Experiment(algorithm=algorithm, task=on or task(), data=data, rounds=rounds, **options)
    return e.run(Sequential())


def part(history: lilliput.History, name: str) -> dict[str, Tensor]:
    return {n: x for n, x in history.models["global"].params.items() if n.startswith(name)}


def assert_close(a: tree.Tree, b: tree.Tree, atol: float) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], atol=atol, rtol=0)


def apart(a: tree.Tree, b: tree.Tree) -> float:
    return float(tree.norm(tree.sub(a, b)))


@pytest.mark.parametrize("optimizer", [{"momentum": 0.5}, {"momentum": 0.0, "optimizer": "adam", "lr": 0.01}])
@pytest.mark.parametrize("cohort", [None, 3])
def test_splitfed_v1_is_fedavg_to_the_last_bit(optimizer: dict[str, Any], cohort: int | None) -> None:
    settings = {**SETTINGS, **optimizer, "cohort": cohort, "optimizer_state": "keep"}
    a, b = run(SplitFedV1(**settings)), run(FedAvg(**settings))
    assert_same_state(a.state, b.state)
    # FedAvg adds up float32 losses where the two ends of the split exchange them as numbers.
    assert [r["train_loss"] for r in a.rows] == pytest.approx([r["train_loss"] for r in b.rows], abs=1e-6)


def whole(model: Split, chunk: int, epochs: int, optimizer: Any) -> list[dict[str, Tensor]]:
    """The joined model trained in one piece on client 0, and its parameters after every chunk of batches; the client's
    part takes all steps of a chunk by gradients at the weights from before it."""
    client, server = model.client_part.model.train(), model.server_part.model.train()
    ends = [optimizer(list(half.parameters())) for half in (client, server)]
    seen, stream = [], list(enumerate(ONE[0] * epochs))
    for first in range(0, len(stream), chunk):
        grads = []
        for n, (x, y) in stream[first : first + chunk]:
            with random.seeded(0, 1, 0, "batch", n):
                cut = client(x)
            with random.seeded(0, 1, 0, "server", str(n)):
                loss = nn.functional.cross_entropy(server(cut), y)
            own = list(client.parameters())
            found = torch.autograd.grad(loss, [*own, *server.parameters()])
            grads.append(found[: len(own)])
            stepped(ends[1], list(server.parameters()), found[len(own) :])
        for g in grads:
            stepped(ends[0], list(client.parameters()), g)
        seen.append({n: p.detach().clone() for n, p in [*client.named_parameters(), *server.named_parameters()]})
    return seen


def stepped(optimizer: Any, params: list[Tensor], grads: Any) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()


@pytest.mark.parametrize("method", [SplitFedV1, SplitFedV2])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_splitfed_with_one_client_is_sgd(
    method: type, chunk: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step, exactly; only the end of a round rounds once more, as x + (y - x)."""
    seen: dict[str, Tensor] = {}
    plain = Trainer.apply

    def apply(self: Trainer, indices: Any, grads: list[Tensor], squares: float | None) -> None:
        plain(self, indices, grads, squares)
        seen.update({n: p.detach().clone() for n, p in zip(self.names, self.params, strict=True)})

    monkeypatch.setattr(Trainer, "apply", apply)
    on = task(dropout=dropout)
    history = run(method(**{**SETTINGS, "weight_decay": 0.0}, chunk=chunk), ONE, rounds=1, on=copy.deepcopy(on))
    steps = whole(on, chunk, 2, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.5))
    assert all(torch.equal(seen[name], x) for name, x in steps[-1].items())
    assert_close(history.models["global"].params, steps[-1], 1e-7)


def test_one_client_makes_both_versions_of_splitfed_the_same() -> None:
    a, b = run(SplitFedV1(**SETTINGS), ONE, rounds=1), run(SplitFedV2(**SETTINGS), ONE, rounds=1)
    assert_same_state(part(a, "client"), part(b, "client"))
    assert_close(part(a, "server"), part(b, "server"), 1e-7)


def test_the_order_of_clients_matters_to_version_two_alone() -> None:
    data = batches(3)
    renamed = {2 - c: own for c, own in data.items()}
    ends = {
        m: [run(m(**SETTINGS), d).models["global"].params for d in (data, renamed)] for m in (SplitFedV1, SplitFedV2)
    }
    assert apart(*ends[SplitFedV1]) < 1e-6 < 1e-3 < apart(*ends[SplitFedV2])


@pytest.mark.parametrize("order", ["sequential", "interleaved"])
@pytest.mark.parametrize("method", [SplitFedV2, CseFsl, FslSage])
def test_the_server_takes_its_steps_in_the_stated_order(
    method: type, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lilliput.algorithms.splitting import server as server_end

    taken: list[tuple[int, int]] = []
    step = server_end.step

    def noted(server: Any, cut: Tensor, y: Tensor, key: Any, *options: Any) -> Any:
        taken.append((key[2], int(key[4])))
        return step(server, cut, y, key, *options)

    monkeypatch.setattr(server_end, "step", noted)
    run(method(**SETTINGS, order=order), batches(3), rounds=1)
    every = [(c, n) for c in range(3) for n in range(2 * (1 + c)) if method is SplitFedV2 or n % 5 == 0]
    assert taken == (every if order == "sequential" else sorted(every, key=lambda at: (at[1], at[0])))


@pytest.mark.parametrize("name", SPLIT)
def test_each_forward_moves_batchnorm_once(name: str) -> None:
    data = {0: batches()[2], 1: batches()[2]}
    history = run(SPLIT[name](**SETTINGS), data, rounds=2)
    assert int(history.models["global"].buffers["client.1.num_batches_tracked"]) == 2 * 2 * 3


@pytest.mark.parametrize("name", SPLIT)
def test_no_graph_outlives_a_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Device.handle

    def checked(self: Device, request: Any) -> Any:
        response = handle(self, request)
        for x in (*tree.tensors(response.body or {}), *tree.tensors(self._states)):
            assert not x.requires_grad and x.grad_fn is None
        return response

    monkeypatch.setattr(Device, "handle", checked)
    history = run(SPLIT[name](**SETTINGS))
    assert not any(x.requires_grad for x in tree.tensors(history.state))


def test_bytes_by_kind_with_uneven_batches(tmp_path: Path) -> None:
    """10 examples in batches of 4, 4 and 2, two epochs, q = 4: batches 0 and 4 go up, 4 + 4 examples of 8 floats."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 6, generator=generator), torch.randint(3, (10,), generator=generator)
    data = {c: ArrayBatches([x, y], 4) for c in range(3)}
    part, head = 4 * 72 + 4 * 16 + 8, 4 * 27
    methods = {
        "splitfed": SplitFedV1(**SETTINGS, chunk=2),
        "cse_fsl": CseFsl(**SETTINGS, server_update_interval=4),
        "fsl_sage": FslSage(**SETTINGS, server_update_interval=4),
    }
    sums: dict[str, dict[str, int]] = {}
    for name, method in methods.items():
        run(method, data, rounds=1, folder=tmp_path / name)
        sums[name] = {}
        for call in json.loads((tmp_path / name / "ledger.jsonl").read_text())["calls"]:
            for kind, n in (*call["up"].items(), *call["down"].items()):
                sums[name][kind] = sums[name].get(kind, 0) + n
    model = {"params": 3 * 4 * 72, "buffers": 3 * 72, "delta": 3 * 4 * 72, "buffer_delta": 3 * 72}
    assert sum(model.values()) == 2 * 3 * part
    assert nonzero(sums["splitfed"]) == {
        **model, "cut": 3 * 20 * 32, "gradient": 3 * 20 * 32, "labels": 3 * 20 * 8,
    }  # fmt: skip
    uploads = {"cut": 3 * 8 * 32, "labels": 3 * 8 * 8}
    assert nonzero(sums["cse_fsl"]) == {**model, **uploads, "auxiliary": 3 * head, "auxiliary_delta": 3 * head}
    assert nonzero(sums["fsl_sage"]) == {**model, **uploads, "auxiliary": 3 * head}


def nonzero(sums: dict[str, int]) -> dict[str, int]:
    return {kind: n for kind, n in sums.items() if n}


def test_a_head_equal_to_the_server_gives_the_servers_gradients() -> None:
    """One step of each method: CSE-FSL's head is the server's copy, FSL-SAGE's has nothing to align to a server that
    stands still."""
    settings = {"lr": 0.1, "local_steps": 1}
    on = task()
    truth = part(run(SplitFedV1(**settings), rounds=1, on=on), "client")
    on = task(copy.deepcopy(on.server_part.model.server))
    cse = run(CseFsl(**settings), rounds=1, on=on)
    sage = run(FslSage(**settings, server_lr=1e-30), rounds=1, on=on)
    assert_same_state(part(cse, "client"), truth)
    assert_same_state(part(sage, "client"), truth)


def test_alignment_does_not_depend_on_its_batch_size() -> None:
    """A perfect head stays as it is under any batch of the alignment; as published, only if that is the memory."""
    on = task()
    on = task(copy.deepcopy(on.server_part.model.server))
    start = on.auxiliary_part.init()["params"]

    def moved(batch: int, compat: str | None) -> float:
        sage = FslSage(
            lr=0.1, local_epochs=2, server_lr=1e-30, server_update_interval=1, align_interval=1, align_epochs=3,
            align_batch_size=batch, auxiliary="shared", auxiliary_optimizer="sgd", auxiliary_lr=0.1, compat=compat,
        )  # fmt: skip
        return apart(run(sage, rounds=2, on=on).state["auxiliary"], start)

    assert moved(1000, None) < 1e-6 and moved(3, None) < 1e-6
    assert moved(1000, "official") < 1e-6 and moved(3, "official") > 1e-3


@pytest.mark.parametrize("compat", [None, "official"])
def test_alignment_leaves_the_server_as_it_is(compat: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, aligned = Aligner._fit, []

    def checked(self: Aligner, *args: Any) -> None:
        before = self.server.after()
        fit(self, *args)
        after = self.server.after()
        assert_same_state(after["params"], before["params"])
        aligned.append(apart(after["buffers"], before["buffers"]))

    monkeypatch.setattr(Aligner, "_fit", checked)
    model = network()
    server = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), model[3])
    run(FslSage(**SETTINGS, align_epochs=2, compat=compat), rounds=1, on=Split(model[0], server, nn.Linear(8, 3)))
    assert len(aligned) == 6 and all((moved > 0) == (compat == "official") for moved in aligned)


def test_a_linear_head_aligns_to_a_linear_server() -> None:
    """The estimates reach the true gradients, though the head's weights need not be the server's."""
    torch.manual_seed(1)
    on = Split(nn.Linear(6, 8).double(), nn.Linear(8, 3).double(), nn.Linear(8, 3).double())
    method = FslSage(lr=0.1, align_epochs=2000, auxiliary_lr=0.02)
    x, y = torch.randn(40, 8, dtype=torch.float64), torch.randint(3, (40,))
    fleet: Any = SimpleNamespace(memory={0: {"cut": x, "labels": y}}, round=1, rounds=1, seed=0, task=on)
    server = method.server(fleet, on.server_part.init())
    aligner = Aligner(method, fleet, server, method.init(on))
    truth = aligner._slope(server, x, y, (0,), again=True)

    def misfit(held: tree.Tree) -> float:
        head = method.head(on, {"auxiliary": held}, "test", "cpu")
        return float((aligner._slope(head, x, y, (0,), again=True) - truth).square().sum())

    first = misfit(aligner.state["auxiliary"])
    assert misfit(aligner.align(0)) < 1e-8 * first


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_heads_with_convolutions_align(seed: int) -> None:
    """As they do under torch.optim.Adam.  Double backward gives gradients in another order of memory than the weights'.

    Adam's kernel must not see those: it would read them as if they lay in the weights' order, and heads hardly align.
    """
    torch.manual_seed(seed)

    def rest(width: int) -> nn.Module:
        pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
        return nn.Sequential(nn.Conv2d(8, width, 3, padding=1), nn.ReLU(), *pooled)

    on = Split(nn.Conv2d(3, 8, 3, padding=1), rest(16), rest(8))
    method = FslSage(lr=0.1, align_epochs=20, align_batch_size=64, auxiliary_lr=0.01)
    x, y = torch.randn(64, 8, 6, 6), torch.randint(4, (64,))
    fleet: Any = SimpleNamespace(memory={0: {"cut": x, "labels": y}}, round=1, rounds=1, seed=0, task=on)
    server = method.server(fleet, on.server_part.init())
    aligner = Aligner(method, fleet, server, method.init(on))
    truth = aligner._slope(server, x, y, (0,), again=True)

    def slope(head: nn.Module) -> Tensor:
        h = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(head(h), y, reduction="sum")
        return torch.autograd.grad(loss, h, create_graph=True)[0]

    def cosine(head: nn.Module) -> float:
        return float(torch.cosine_similarity(slope(head).detach().flatten(), truth.flatten(), dim=0))

    assert on.auxiliary_part is not None
    ours, plain = copy.deepcopy(on.auxiliary_part.model), copy.deepcopy(on.auxiliary_part.model)
    ours.load_state_dict(aligner.align(0))
    optimizer = torch.optim.Adam(plain.parameters(), lr=method.auxiliary_lr)
    before = cosine(plain)
    for _ in range(method.align_epochs):
        optimizer.zero_grad()
        ((slope(plain) - truth).square().sum() / len(y)).backward()
        optimizer.step()
    assert cosine(ours) == pytest.approx(cosine(plain), abs=0.02)
    assert cosine(ours) > before + 0.3


def test_the_memory_keeps_the_newest_with_their_labels() -> None:
    fleet: Any = SimpleNamespace(memory={}, round=1)
    aligner = Aligner(FslSage(memory_size=5), fleet, None, {"auxiliary": {}, "auxiliary_opt": {}})  # type: ignore[arg-type]
    for first in (0, 2, 4, 6):
        y = torch.arange(first, first + 2)
        aligner.remember(Reply(0, {"cut": {"0": y[:, None].float()}, "labels": {"0": y}}, 8, {}))
    assert fleet.memory[0]["labels"].tolist() == [3, 4, 5, 6, 7]
    assert fleet.memory[0]["cut"].squeeze().tolist() == [3, 4, 5, 6, 7]


def test_warm_start_is_a_round_of_cse_fsl() -> None:
    ends = [run(method, rounds=1).state for method in (FslSage(**SETTINGS, warm_start=True), CseFsl(**SETTINGS))]
    sage, cse = ({n: state[n] for n in ("params", "buffers", "auxiliary", "server_opt")} for state in ends)
    assert_same_state(sage, cse)


def test_a_long_interval_gives_the_server_one_step_per_client_and_round() -> None:
    """q beyond the round: plain SGD of the server on each client's first activations, all from the first weights."""
    on = task(norm=False)
    history = run(CseFsl(lr=0.1, server_update_interval=100), rounds=1, on=on)
    client, server = copy.deepcopy(on.client_part.model), copy.deepcopy(on.server_part.model)
    for c in range(6):
        x, y = batches()[c][0]
        grads = torch.autograd.grad(nn.functional.cross_entropy(server(client(x)), y), list(server.parameters()))
        with torch.no_grad():
            for p, g in zip(server.parameters(), grads, strict=True):
                p.add_(g, alpha=-0.1)
    assert_close(part(history, "server"), {n: p.detach() for n, p in server.named_parameters()}, 1e-6)


def test_a_personal_head_never_travels(tmp_path: Path) -> None:
    run(CseFsl(**SETTINGS, auxiliary="personal"), rounds=2, folder=tmp_path)
    assert "auxiliary" not in (tmp_path / "ledger.jsonl").read_text()


def test_a_client_whose_labels_do_not_fit_is_out_and_the_rest_go_on() -> None:
    for method in SPLIT.values():
        data = batches()
        data[1] = [(x, y + 7) for x, y in data[1]]
        history = run(method(**SETTINGS), data, rounds=2)
        assert [row["dropped"] for row in history.rows] == [1, 1]
        assert all(x.isfinite().all() for x in tree.tensors(history.state))


@pytest.mark.parametrize("clip", [1e-3, 1e6])
def test_clip_costs_two_numbers_a_batch(clip: float) -> None:
    """One with each gradient that goes down and one in each answer, in the headers; no tensor more."""
    rows = [run(SplitFedV1(**SETTINGS, clip=c), rounds=1).rows[0] for c in (None, clip)]
    assert [rows[0][k] for k in ("up_bytes", "down_bytes")] == [rows[1][k] for k in ("up_bytes", "down_bytes")]
    numbers = wire.nbytes({"squares": 1.0}).overhead + wire.nbytes({"loss": 1.0, "squares": 1.0}).overhead
    numbers -= wire.nbytes({}).overhead + wire.nbytes({"loss": 1.0}).overhead
    steps = 2 * sum(len(own) for own in batches().values())
    assert rows[1]["overhead_bytes"] - rows[0]["overhead_bytes"] == steps * numbers


@dataclass(frozen=True)
class Boaster(SplitFedV1):
    """Client 1 claims a squared norm that none can have."""

    @on_client
    def backward(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        reply, state = super().backward(client, state, msg)
        return {"squares": -1.0} if client.id == 1 else reply, state


def test_a_norm_that_none_can_have_takes_its_client_out() -> None:
    liars = run(Boaster(**SETTINGS, clip=0.1), rounds=1)
    honest = run(SplitFedV1(**SETTINGS, clip=0.1), {c: own for c, own in batches().items() if c != 1}, rounds=1)
    assert liars.rows[0]["dropped"] == 1
    assert_same_state(liars.state, honest.state)


@dataclass(frozen=True)
class Fainting(SplitFedV2):
    """Client 0 is gone once the server has its gradient."""

    @on_client
    def backward(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        if client.id == 0:
            raise RuntimeError("gone")
        return super().backward(client, state, msg)


def test_a_step_that_waits_for_a_client_that_is_gone_is_not_the_next_ones() -> None:
    """Client 1 has no label that counts in its first batch, so that nothing of its own takes the place."""
    data, on = batches(3), partial(task, norm=False)
    data[1][0][1].fill_(-100)
    settings = {**SETTINGS, "clip": 0.1, "local_epochs": 1}
    fainted = run(Fainting(**settings), data, rounds=1, on=on())
    without = run(SplitFedV2(**settings), {c: data[c] for c in (1, 2)}, rounds=1, on=on())
    assert fainted.rows[0]["dropped"] == 1
    assert_same_state(fainted.state, without.state)


@dataclass(frozen=True)
class Liar(SplitFedV1):
    """Client 1 hands back a part of another shape, in a call that did not bring it the model."""

    @on_client(like={"delta": "params", "buffer_delta": "buffers"})
    def finish(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        reply, state = super().finish(client, state, msg)
        if client.id == 1:
            reply["delta"] = {name: x[:1] for name, x in reply["delta"].items()}
        return reply, state


def test_a_delta_of_another_shape_is_refused_whichever_call_brought_the_model() -> None:
    liars = run(Liar(**SETTINGS), rounds=1)
    honest = run(SplitFedV1(**SETTINGS), {c: own for c, own in batches().items() if c != 1}, rounds=1)
    assert liars.rows[0]["dropped"] == 1
    assert_same_state(liars.state, honest.state)


def test_bad_settings_are_refused_with_the_rule() -> None:
    for method, settings, rule in (
        (CseFsl, {"server_update_interval": 0}, "at least 1"),
        (FslSage, {"align_interval": 0}, "at least 1"),
        (SplitFedV1, {"chunk": 0}, "at least 1"),
        (SplitFedV2, {"order": "random"}, "sequential or interleaved"),
        (CseFsl, {"auxiliary": "none"}, "shared or personal"),
        (SplitFedV1, {"accumulate": 2}, "smaller batch"),
        (SplitFedV1, {"server_lr": 0.0}, "positive"),
        (SplitFedV1, {"clip": 1.0, "chunk": 2}, "use chunk=1, or no clip"),
        (SplitFedV2, {"clip": 1.0, "order": "interleaved"}, "use order=sequential, or no clip"),
    ):
        with pytest.raises(ValueError, match=rule):
            method(**settings)
    with pytest.raises(ValueError, match="memory_size >= batch_size"):
        run(FslSage(memory_size=3))
    with pytest.raises(ValueError, match="Split"):
        run(SplitFedV1(), on=Supervised(network()))
    with pytest.raises(ValueError, match="auxiliary head"):
        run(CseFsl(), on=Split(nn.Linear(6, 8), nn.Linear(8, 3)))
    with pytest.raises(ValueError, match="does not fit the server's part"):
        run(SplitFedV1(), on=Split(nn.Linear(6, 8), nn.Linear(7, 3)))


def test_the_published_mebibytes_of_resnet18(tmp_path: Path) -> None:
    """10 clients of 5000 examples of CIFAR-10, batch 256, q = 5: 20 batches a round, of which 0, 5, 10 and 15 go up.
    The sizes of what travels are read off the ledger of a round with two examples."""
    whole: Any = models.build("resnet18", shape=(3, 32, 32), classes=10, stem="imagenet")
    first = nn.Sequential(whole.conv1, whole.bn1, nn.ReLU(), whole.maxpool, whole.layer1, whole.layer2)
    last = nn.Sequential(whole.layer3, whole.layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten(), whole.fc)
    head = nn.Sequential(copy.deepcopy(whole.layer3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    on, data = Split(first, last, head), {0: [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]}
    run(FslSage(align_epochs=1), data, rounds=1, on=on, folder=tmp_path)
    calls = json.loads((tmp_path / "ledger.jsonl").read_text())["calls"]
    sizes = {kind: n for call in calls for kind, n in {**call["up"], **call["down"]}.items() if n}
    part, cut = sizes["params"] + sizes["buffers"], sizes["cut"] // 2
    auxiliary, server = sizes["auxiliary"], tree.size(on.server_part.model.state_dict())
    assert (part, server, auxiliary, cut) == (2_740_048, 42_025_080, 8_419_408, 8192)
    up = 4 * 256 * cut
    mebibytes = {
        "fedavg": 20 * (part + server), "splitfed": 20 * part + 2 * 50_000 * cut,
        "cse_fsl": 20 * (part + auxiliary) + 10 * up, "fsl_sage": 20 * part + 10 * up,
        "fsl_sage aligning": 20 * part + 10 * up + 10 * auxiliary,
    }  # fmt: skip
    assert [round(n / 2**20, 2) for n in mebibytes.values()] == [853.83, 833.51, 292.85, 132.26, 212.56]


class Begins(nn.Module):
    """Something in place, or as well out of place, of what it is given or of a view of it; dropout only in training."""

    def __init__(self, how: str, inplace: bool):
        super().__init__()
        self.how, self.changes = how, inplace

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "dropout":
            return nn.functional.dropout(x, 0.5, self.training, self.changes)
        y = x.view(x.shape) if self.how == "view" else x
        if self.how == "add":
            return y.add_(0.5).relu() if self.changes else (y + 0.5).relu()
        return nn.functional.relu(y, inplace=self.changes) + 0.5


@pytest.mark.parametrize("how", ["module", "relu", "view", "add", "dropout"])
@pytest.mark.parametrize("name", [*SPLIT, "tail"])
def test_parts_may_begin_in_place(name: str, how: str) -> None:
    """What they change is a copy: it is not the batch, nor the activation that goes up, and no leaf that a gradient is
    taken at."""
    ends = []
    for inplace in (False, True):
        torch.manual_seed(4)
        first = lambda: nn.ReLU(inplace=inplace) if how == "module" else Begins(how, inplace)  # noqa: B023, E731
        tail = nn.Sequential(first(), nn.Linear(3, 3)) if name == "tail" else None
        client = nn.Sequential(first(), nn.Linear(6, 8), nn.Tanh())
        server, head = (nn.Sequential(first(), nn.Linear(8, 3)) for _ in range(2))
        on = Split(client, server, head, tail=tail)
        data = batches()
        ends.append(run(SPLIT.get(name, SplitFedV1)(lr=0.1), data, rounds=2, on=on).state)
        assert_same_state(columns(data), columns(batches()))
    assert_same_state(*ends)


def columns(data: dict[int, Any]) -> Body:
    return {str((c, n)): x for c, own in data.items() for n, (x, _) in enumerate(own)}


def test_a_loss_that_depends_on_nothing_trained_is_told_so() -> None:
    class Detached(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    on = Split(nn.Linear(6, 8), Detached(8, 3), Detached(8, 3))
    for method in (*SPLIT.values(), FedAvg):
        with pytest.raises(RuntimeError, match="the loss depends on no trained parameter"):
            run(method(lr=0.1), on=on)
