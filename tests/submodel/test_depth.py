"""Clients of different depth: what a tier holds, what it computes, how tiers combine, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

import lilliput
from lilliput import models
from lilliput.algorithms import FedAvg, FedNova, FedProx, Moon, Scaffold
from lilliput.algorithms.inco import mix
from lilliput.core.tree import sub
from lilliput.engines.dry import predict
from lilliput.models.resnet import CifarResNet
from lilliput.submodel import SLICES, InCo, Stages, uniform_mean
from lilliput.tasks import Supervised

SIZES = {10: 4_910_922, 14: 10_812_234, 18: 11_181_642, 22: 17_082_954, 26: 17_452_362}
METHODS: dict[str, Any] = {
    "fedavg": lambda **k: FedAvg(momentum=0.5, **k),
    "fedprox": lambda **k: FedProx(mu=0.1, optimizer="adam", **k),
    "scaffold": lambda **k: Scaffold(**k),
    "fednova": lambda **k: FedNova(momentum=0.9, **k),
    "moon": lambda **k: Moon(mu=1.0, **k),
}  # fmt: skip
TIERS = Stages(blocks=((1, 1, 1), (1, 2, 1), (3, 2, 1)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet((3, 2, 1), shape=(3, 8, 8), classes=3, width=4)


def batches(clients: int = 6) -> dict[int, Any]:
    generator = torch.Generator().manual_seed(1)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator)

    return {c: [batch() for _ in range(1 + c % 3)] for c in range(clients)}


def experiment(algorithm: Any, rounds: int = 2, **options: Any) -> lilliput.Experiment:
    data = batches()
    test = [b for c in data for b in data[c]]
    return lilliput.Experiment(algorithm, Supervised(network()), data, rounds, **{"test": test, **options})


def test_incos_five_tiers_are_the_five_resnets() -> None:
    with torch.device("meta"):
        largest = models.build("resnet26", shape=(3, 32, 32), classes=10)
        state = dict(largest.named_parameters()), dict(largest.named_buffers())
        for (layers, size), part in zip(SIZES.items(), Stages().tiers(largest), strict=True):
            alone = models.build(f"resnet{layers}", shape=(3, 32, 32), classes=10)
            params, buffers = (part.gather(kind) for kind in state)
            assert {n: x.shape for n, x in params.items()} == {n: x.shape for n, x in alone.named_parameters()}
            assert {n: x.shape for n, x in buffers.items()} == {n: x.shape for n, x in alone.named_buffers()}
            assert sum(x.numel() for x in params.values()) == size


def test_a_tier_computes_what_a_model_of_its_depth_computes() -> None:
    task, x = Supervised(network()), torch.randn(5, 3, 8, 8)
    state = task.init()
    alone = CifarResNet((1, 2, 1), shape=(3, 8, 8), classes=3, width=4)
    part = TIERS.tiers(task.model)[1]
    params, buffers = part.gather(state["params"]), part.gather(state["buffers"])
    alone.load_state_dict({**params, **buffers})
    found = task.resident(params, buffers).eval()
    assert torch.equal(found(x), alone.eval().to(memory_format=torch.channels_last)(x))
    assert torch.equal(task.resident(state["params"], state["buffers"]).eval()(x), network().eval()(x))


@pytest.mark.parametrize("name", ["char_lm", "gpt2", "llama_9m"])
def test_transformers_lose_their_last_layers(name: str) -> None:
    if name != "char_lm":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    whole, shallow = (models.build(name, shape=(8,), classes=20, layers=n, hidden=16, heads=2) for n in (3, 2))
    task = Supervised(whole)
    params = Stages(blocks=(2,)).tiers(whole)[0].gather(task.init()["params"])
    shallow.load_state_dict(params, strict=False)
    x = torch.randint(20, (2, 8))
    found, expected = (m.eval()(x) for m in (task.resident(params), shallow))
    found, expected = (getattr(out, "logits", out) for out in (found, expected))
    assert torch.equal(found, expected)


def test_clients_are_given_to_tiers_by_their_shares_in_the_order_of_their_ids() -> None:
    rule = Stages()
    assert [rule.tier(range(12), c) for c in range(12)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    rule = Stages(blocks=((1,), (2,)), shares=(0.7, 0.3))
    assert [rule.tier((3, 5, 7, 20), c) for c in (3, 5, 7, 20)] == [0, 0, 1, 1]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_tiers_and_inco_is_the_mix_of_its_change(name: str) -> None:
    start = Supervised(network()).init()["params"]
    plain, mixed = (
        experiment(METHODS[name](lr=0.05, slice=TIERS, combine=c), 1).run("sequential")
        for c in (uniform_mean(), InCo("uniform"))
    )
    change = sub(plain.state["params"], start)
    for key, x in mix(change).items():
        torch.testing.assert_close(mixed.state["params"][key] - start[key], x, rtol=0, atol=2e-6)
    assert all(bool(d.any()) for d in change.values())
    (row,) = mixed.rows
    tiers = [row[f"tier {i}/accuracy"] for i in (1, 2, 3)]
    assert row["tiers/accuracy"] == pytest.approx(sum(tiers) / 3) and tiers[2] == row["accuracy"]


@pytest.mark.parametrize("name", METHODS)
def test_tiers_give_the_same_bits_on_every_engine_and_after_a_stop(name: str, tmp_path: Any) -> None:
    method = METHODS[name](lr=0.05, slice=TIERS, cohort=4)
    expected = experiment(method, 4).run("sequential").state["params"]
    workers = experiment(method, 4).run("workers").state["params"]
    folder = {"folder": tmp_path / "run", "checkpoint_every": 1}
    experiment(method, 2, **folder).run("sequential")
    resumed = experiment(method, 4, **folder).run("sequential", resume=True).state["params"]
    for found in (workers, resumed):
        assert all(torch.equal(x, found[key]) for key, x in expected.items())


@pytest.mark.parametrize("codec", [None, "bf16", "int8"])
@pytest.mark.parametrize("name", METHODS)
def test_the_dry_engine_foretells_bytes_and_memory(name: str, codec: str | None) -> None:
    from lilliput.wire.codecs import CODECS

    def run() -> lilliput.Experiment:
        made = CODECS[codec]() if codec else None
        return experiment(METHODS[name](lr=0.05, slice=TIERS), evaluate="none", test=None, codec=made)

    rows, foretold = run().run("sequential").rows, predict(run()).rows
    for real, dry in zip(rows, foretold, strict=True):
        for key in ("up_bytes", "down_bytes", "peak_memory_bytes"):
            assert real[key] == dry[key], key


def test_without_a_step_no_mix_of_tiers_moves_the_model() -> None:
    """Steps of 1e-30 change nothing but what is zero."""
    start = Supervised(network()).init()
    state = experiment(FedAvg(lr=1e-30, slice=TIERS, buffers="none")).run("sequential").state
    for key, x in start["params"].items():
        torch.testing.assert_close(state["params"][key], x, rtol=0, atol=1e-25)


def test_blocks_that_no_client_of_the_round_holds_stay() -> None:
    start = Supervised(network()).init()["params"]
    state = experiment(FedAvg(lr=0.05, slice=TIERS, combine=InCo()), cohorts=[[0, 1], [1, 2]]).run("sequential").state
    moved = {name for name, x in state["params"].items() if not torch.equal(x, start[name])}
    assert moved == {n for n in start if not n.startswith(("layer1.1", "layer1.2"))}


def test_fednova_normalises_each_coordinate_by_those_who_hold_it() -> None:
    """Clients 0 and 1 hold one block and take 1 and 2 steps, client 2 holds all and takes 3: only it moves the rest."""
    data = {c: batches()[c] for c in range(3)}
    shares = Stages(blocks=((1, 1, 1), (3, 2, 1)), shares=(2 / 3, 1 / 3))

    def after(algorithm: Any, clients: list[int]) -> dict[str, torch.Tensor]:
        run = lilliput.Experiment(algorithm, Supervised(network()), data, 1, cohorts=[clients])
        return run.run("sequential").state["params"]

    mixed = after(FedNova(lr=0.05, momentum=0.9, slice=shares), [0, 1, 2])
    alone = after(FedNova(lr=0.05, momentum=0.9), [2])
    own = [n for n in mixed if n.startswith(("layer1.1", "layer1.2", "layer2.1"))]
    assert own
    for name in own:
        torch.testing.assert_close(mixed[name], alone[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": ((1, 1, 1), (1, 4, 1))}, "keeps 4 blocks of layer2; CifarResNet has layer1 3, layer2 2, layer3 1"),
        ({"blocks": ((0, 1, 1),)}, "keeps 0 blocks of layer1"),
        ({"blocks": ((1, 1),)}, "names 2 stages; CifarResNet has layer1 3, layer2 2, layer3 1"),
        ({"blocks": (1, 2), "shares": (0.5, 0.6)}, "must be 2 numbers, one for each tier, that sum to 1"),
        ({"blocks": (1, 2), "shares": (1.0,)}, "must be 2 numbers"),
        ({"blocks": ()}, "blocks is empty"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SLICES["stage"](**options).tiers(network())  # type: ignore[attr-defined]


def test_a_model_without_stages_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"MLP has no stages to shorten; put its blocks, of one class of your own"):
        Stages().tiers(models.build("mlp", shape=(4,), classes=2))


def test_the_published_fednova_knows_whole_models_only() -> None:
    with pytest.raises(ValueError, match="knows whole models only; leave compat=official or slice= out"):
        experiment(FedNova(lr=0.1, slice=TIERS, compat="official")).run("sequential")
