"""A loop of one's own: what the dual does over a round, and two processes against the engine."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lilliput
from lilliput import optim
from lilliput.algorithms.fedsub import FedSub
from lilliput.subspace import subspace_layers
from lilliput.tasks import Supervised

TAU, ROUNDS = 3, 4


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


def batches(client: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(client)
    return [(torch.randn(4, 6, generator=g) + client, torch.randint(3, (4,), generator=g)) for _ in range(TAU)]


@pytest.mark.parametrize("dual", ["rotated", "full"])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"optimizer": optim.Lion}]
)
def test_the_dual_is_a_term_of_the_gradient_that_leaves_no_trace_in_it(dual: Any, options: dict[str, Any]) -> None:
    model = network()
    subspace = lilliput.replace_with_subspace(model, ["0", "2"], rank=2, dual=dual)
    for own in subspace.duals.values():
        own.normal_()
    optimizer, _ = lilliput.subspace_optimizer(model, lr=0.1, **options)
    alone = {name: nn.Parameter(layer.b.detach().clone()) for name, layer in subspace.layers.items()}
    made = options.get("optimizer", torch.optim.SGD)
    theirs = made(alone.values(), lr=0.1, **{k: v for k, v in options.items() if k != "optimizer"})
    for _ in range(TAU):
        for name, layer in subspace.layers.items():
            own = subspace.duals[name]
            layer.b.grad = torch.randn_like(layer.b)
            alone[name].grad = layer.b.grad + (layer.basis.compress(own) if dual == "full" else own)
        before = {name: layer.b.grad.clone() for name, layer in subspace.layers.items()}
        optimizer.step(), theirs.step()
    for name, layer in subspace.layers.items():
        torch.testing.assert_close(layer.b, alone[name])
        assert torch.equal(layer.b.grad, before[name])


def test_steps_in_which_a_dual_would_be_lost_are_refused() -> None:
    model = network()
    lilliput.replace_with_subspace(model, ["0"], rank=2)
    optimizer, _ = lilliput.subspace_optimizer(model, lr=0.1)
    with pytest.raises(ValueError, match="a closure would make gradients without the duals"):
        optimizer.step(lambda: 0.0)
    optimizer.grad_scale = torch.ones(())  # what GradScaler leaves to fused optimizers
    with pytest.raises(ValueError, match="gradients are still scaled"):
        optimizer.step()


def test_an_outer_update_of_one_process_changes_no_output() -> None:
    model, x = network(), torch.randn(5, 6)
    subspace = lilliput.replace_with_subspace(model, rank=2)
    for layer in subspace.layers.values():
        nn.init.normal_(layer.b)
    before = model(x)
    lilliput.outer_update(model, refresh=True)
    torch.testing.assert_close(model(x), before)
    assert not any(own.any() for own in subspace.duals.values())


def test_new_bases_drop_the_momentum_of_b_alone() -> None:
    model = network()
    lilliput.replace_with_subspace(model, ["0"], rank=2)
    optimizer, _ = lilliput.subspace_optimizer(model, lr=0.1, momentum=0.9)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    layer = subspace_layers(model)["0"]
    old = layer.basis.dense()
    lilliput.outer_update(model, refresh=True, optimizer=optimizer)
    assert not torch.equal(layer.basis.dense(), old)
    assert layer.b not in optimizer.state
    assert optimizer.state[model[4].weight]["momentum_buffer"].any()


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"optimizer": torch.optim.AdamW, "weight_decay": 0.0}])
def test_after_new_bases_b_takes_a_fresh_optimizers_step(options: dict[str, Any]) -> None:
    model = network()
    layer = lilliput.replace_with_subspace(model, ["0"], rank=2, dual="none").layers["0"]
    optimizer, _ = lilliput.subspace_optimizer(model, lr=0.1, **options)
    for _ in range(5):
        layer.b.grad = torch.randn(layer.b.shape)
        optimizer.step()
    lilliput.outer_update(model, refresh=True, optimizer=optimizer)
    layer.b.grad = torch.randn(layer.b.shape)
    fresh = nn.Parameter(torch.zeros_like(layer.b))
    fresh.grad = layer.b.grad.clone()
    optimizer.step()
    made = options.get("optimizer", torch.optim.SGD)
    made([fresh], lr=0.1, **{k: v for k, v in options.items() if k != "optimizer"}).step()
    torch.testing.assert_close(layer.b, fresh)


@pytest.mark.parametrize("name", ["0.b", "4.weight"])
def test_what_is_not_finite_is_refused_and_nothing_changes(name: str) -> None:
    model = network()
    lilliput.replace_with_subspace(model, ["0", "2"], rank=2)
    model.get_parameter("2.b").data.normal_()
    model.get_parameter(name).data.view(-1)[3] = float("nan")
    before = {n: x.clone() for n, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{name} is not finite"):
        lilliput.outer_update(model, refresh=True)
    assert all(x.equal(before[n]) or n == name for n, x in model.state_dict().items())


@pytest.mark.parametrize("made", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, optim.Lion])
def test_in_full_dimension_a_loop_decays_as_without_subspaces(made: Any) -> None:
    plain, model = network().double(), network().double()
    lilliput.replace_with_subspace(model, ["0", "2"], rank=1.0, projection="idx")
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.3}
    ours, _ = lilliput.subspace_optimizer(model, optimizer=made, **settings)
    theirs = made(plain.parameters(), **settings)
    for step in range(2 * TAU):
        x, y = batches(0)[step % TAU]
        for net, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            F.cross_entropy(net(x.double()), y).backward()
            optimizer.step()
        if step == TAU:
            lilliput.outer_update(model)
    for name, p in lilliput.dense(model).named_parameters():
        torch.testing.assert_close(p, plain.get_parameter(name), atol=1e-9, rtol=0)


def test_svd_takes_the_leading_directions_of_the_gradient() -> None:
    model, x = network(), torch.randn(16, 6)
    layer = lilliput.replace_with_subspace(model, ["0"], rank=2, projection="svd").layers["0"]
    with pytest.raises(ValueError, match="projection=svd needs the dense gradient of 0"):
        lilliput.outer_update(model, refresh=True)
    assert int(layer.epoch) == 0
    gradient = torch.randn(8, 2) @ torch.randn(2, 6)
    lilliput.outer_update(model, refresh=True, gradients={"0": gradient})
    p = layer.basis.dense()
    torch.testing.assert_close(gradient @ p.T @ p, gradient, atol=1e-4, rtol=0)
    assert model(x).isfinite().all()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no layer in a subspace"):
        lilliput.outer_update(network())
    model = network()
    lilliput.replace_with_subspace(model, rank=2)
    with pytest.raises(ValueError, match="lr is 0"):
        lilliput.subspace_optimizer(model, lr=0.0)


def test_a_state_dict_carries_bases_duals_and_epochs() -> None:
    one, two = network(), network()
    for model, seed in ((one, 0), (two, 1)):
        lilliput.replace_with_subspace(model, rank=2, seed=seed)
    for layer in subspace_layers(one).values():
        nn.init.normal_(layer.b), layer.dual.normal_()  # type: ignore[union-attr]
    lilliput.outer_update(one, refresh=True)
    two.load_state_dict(one.state_dict())
    x = torch.randn(4, 6)
    assert torch.equal(one(x), two(x))
    for model in (one, two):
        lilliput.outer_update(model, refresh=True)  # the seed came along
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize("dual", ["rotated", "full"])
@pytest.mark.parametrize("options", [{"momentum": 0.9, "nesterov": True}, {"optimizer": optim.Lion}])
def test_a_loop_saved_within_a_round_goes_on_to_the_same_bits(dual: Any, options: Any, tmp_path: Path) -> None:
    def started() -> list[Any]:
        model = network()
        lilliput.replace_with_subspace(model, ["0", "2"], rank=2, dual=dual)
        return [model, *lilliput.subspace_optimizer(model, lr=0.1, warmup=2, steps=15, **options)]

    def train(parts: list[Any], steps: range) -> dict[str, Tensor]:
        model, optimizer, schedule = parts
        for step in steps:
            x, y = batches(step % 4)[step % TAU]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step(), schedule.step()
            if step % TAU == 0:
                lilliput.outer_update(model, refresh=step % (2 * TAU) == 0, optimizer=optimizer)
                for layer in subspace_layers(model).values():
                    layer.dual.add_(0.1)  # type: ignore[union-attr]  # one process has none of its own making
        return model.state_dict()

    straight, broken, resumed = started(), started(), started()
    train(broken, range(1, 2 * TAU + 2))
    torch.save([part.state_dict() for part in broken], tmp_path / "saved.pt")
    for part, state in zip(resumed, torch.load(tmp_path / "saved.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    expected, found = train(straight, range(1, 4 * TAU)), train(resumed, range(2 * TAU + 2, 4 * TAU))
    assert all(torch.equal(found[name], x) for name, x in expected.items())


# What a loop and the engine do alike: the dual's kind, and the optimizer, whose state both keep until P changes.
ALIKE: tuple[tuple[Any, dict[str, Any]], ...] = (
    ("rotated", {}), ("full", {}), ("full", {"optimizer": torch.optim.Adam, "eps": 0.1}),
    ("rotated", {"optimizer": torch.optim.RMSprop, "eps": 0.1}),
)  # fmt: skip


def joined(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)


def own_loop(rank: int, port: int, folder: str) -> None:
    """One of two processes: client `rank` of FedSub."""
    joined(rank, port)
    for i, (dual, options) in enumerate(ALIKE):
        model = network()
        lilliput.replace_with_subspace(model, rank=2, dual=dual)
        optimizer, _ = lilliput.subspace_optimizer(model, lr=0.1, **options)
        for round in range(ROUNDS):
            for x, y in batches(rank):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            lilliput.outer_update(model, refresh=round % 2 == 1, optimizer=optimizer)
        torch.save({n: p.detach() for n, p in model.state_dict().items()}, f"{folder}/{i}-{rank}.pt")
    torch.distributed.destroy_process_group()


def quadratic(rank: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rank)
    return torch.randn(12, 4, generator=g).double(), torch.randn(12, 2, generator=g).double()


def to_the_optimum(rank: int, port: int, folder: str) -> None:
    """One of two processes, which take other numbers of steps, saves how far from the optimum of both it ends."""
    joined(rank, port)
    x, y = (torch.cat(parts) for parts in zip(*map(quadratic, range(2)), strict=True))
    best, found = torch.linalg.lstsq(x, y).solution.T, []
    for options in ({"momentum": 0.9}, {"optimizer": torch.optim.Adam, "eps": 1.0}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 2, bias=False)).double()
        layer = lilliput.replace_with_subspace(model, ["0"], rank=2, dual="full").layers["0"]
        lr = 0.03 if "momentum" in options else 0.1
        optimizer, _ = lilliput.subspace_optimizer(model, lr=lr, **options)
        for _ in range(600):
            for _ in range(2 + 3 * rank):
                optimizer.zero_grad()
                F.mse_loss(model(quadratic(rank)[0]), quadratic(rank)[1]).backward()
                optimizer.step()
            lilliput.outer_update(model, refresh=True, optimizer=optimizer)
        found.append(float((layer.weight - best).norm()))
    Path(folder, str(rank)).write_text(" ".join(map(str, found)))
    torch.distributed.destroy_process_group()


def disagreeing(rank: int, port: int, folder: str) -> None:
    """One of two processes whose seeds differ, then their epochs, then their models."""
    joined(rank, port)
    words = []
    for case in ("seed", "epoch", "weight"):
        model = network()
        layer = lilliput.replace_with_subspace(model, ["0", "2"], rank=2).layers["2"]
        getattr(layer, case).data.view(-1)[0] += rank
        try:
            lilliput.outer_update(model)
        except ValueError as error:
            words.append(str(error))
    Path(folder, str(rank)).write_text("\n".join(words))
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_processes_of_other_bases_or_models_are_refused_in_all_of_them(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(disagreeing, (free_port(), str(tmp_path)), nprocs=2)
    for rank in range(2):
        seed, epoch, weight = Path(tmp_path, str(rank)).read_text().splitlines()
        assert seed.startswith(f"the basis of 2 is of seed {rank} and epoch 0 here")
        assert epoch.startswith(f"the basis of 2 is of seed 0 and epoch {rank} here")
        assert weight.startswith("the frozen weight of 2 differs between processes; start all of them from one model")


def test_two_processes_are_the_engine(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(own_loop, (free_port(), str(tmp_path)), nprocs=2)
    for i, (dual, options) in enumerate(ALIKE):
        given = {"optimizer": options.get("optimizer", "sgd"), "optimizer_state": "keep", "dual": dual}
        given["optimizer_options"] = {name: x for name, x in options.items() if name != "optimizer"}
        history = lilliput.Experiment(
            algorithm=FedSub(lr=0.1, rank=2, refresh=2, **given), task=Supervised(network()),
            data={c: batches(c) for c in range(2)}, rounds=ROUNDS, evaluate="none",
        ).run("sequential")  # fmt: skip
        for rank in range(2):
            own = torch.load(tmp_path / f"{i}-{rank}.pt", weights_only=True)
            for name, x in history.state["params"].items():
                torch.testing.assert_close(own[name], x, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_two_processes_end_in_their_optimum_under_momentum_adam_and_unequal_steps(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(to_the_optimum, (free_port(), str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert max(map(float, Path(tmp_path, str(rank)).read_text().split())) < 1e-10


@pytest.mark.parametrize("projection", ["cd", "ss"])
def test_a_model_saved_within_a_round_keeps_what_b_has_learnt(projection: str, tmp_path: Path) -> None:
    model, x = network(), batches(0)[0][0]
    lilliput.replace_with_subspace(model, ["0", "2"], rank=2, projection=projection)
    optimizer, _ = lilliput.subspace_optimizer(model, lr=0.1, momentum=0.9)
    for inputs, labels in batches(0):
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    torch.save(lilliput.dense(model).state_dict(), tmp_path / "plain.pt")
    torch.save(model.state_dict(), tmp_path / "apart.pt")
    plain = lilliput.models.load_weights(network(), tmp_path / "plain.pt")
    torch.testing.assert_close(plain(x), model(x))
    with pytest.raises(ValueError, match=r"it has '0\.b', which the model lacks"):
        lilliput.models.load_weights(network(), tmp_path / "apart.pt")
