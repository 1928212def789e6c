"""FedSub's laws: what it reduces to, what its duals keep, where it converges, and what it sends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lilliput
from lilliput import optim, wire
from lilliput.algorithms import FedAvg, Scaffold
from lilliput.algorithms.fedsub import FedSub
from lilliput.engines import Sequential
from lilliput.subspace import Dense, seeded_basis
from lilliput.tasks import Supervised

TAU = 3


def orthogonal(layer: str, rank: int, width: int, epoch: int) -> Dense:
    """A full basis that is not the identity."""
    return Dense(seeded_basis("ss", width, width, layer, epoch, dtype=torch.double).dense())


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches(client: int, same: bool = False) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0 if same else client)
    shift = 0 if same else client
    return [(torch.randn(4, 6, generator=g).double() + shift, torch.randint(3, (4,), generator=g)) for _ in range(TAU)]


class Watching(Sequential):
    """The engine, keeping what each device holds."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, Any] = {}

    def commit(self, clients: Sequence[int]) -> dict[int, Any]:
        states = super().commit(clients)
        self.held.update(states)
        return states


def run(
    algorithm: Any, rounds: int = 5, clients: int = 3, same: bool = False, **more: Any
) -> tuple[Any, dict[int, Any]]:
    engine = Watching()
    history = lilliput.Experiment(
        algorithm=algorithm, task=Supervised(network()), data={c: batches(c, same) for c in range(clients)},
        rounds=rounds, evaluate="none", **more,
    ).run(engine)  # fmt: skip
    return history, engine.held


def close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


@pytest.mark.parametrize("projection", ["idx", orthogonal])
def test_in_full_dimension_and_with_everyone_it_is_scaffold_on_the_layers_in_subspaces(projection: Any) -> None:
    """Both correct a step by the mean deviation of the client's gradients in the round before."""
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()
    found = []
    for algorithm in (
        Scaffold(lr=0.3, local_steps=TAU),
        FedSub(lr=0.3, local_steps=TAU, rank=1.0, projection=projection, targets=["0", "2"], dual="full"),
        FedSub(lr=0.3, local_steps=TAU, rank=1.0, projection=projection, targets=["0"], dual="full"),
    ):
        e = lilliput.Experiment(algorithm, Supervised(model), {c: batches(c) for c in range(3)}, rounds=6)
        found.append(e.run(Sequential()).state["params"])
    close(found[0], found[1])
    assert (found[0]["2.weight"] - found[2]["2.weight"]).abs().max() > 1e-3  # what is ordinary is not corrected


@pytest.mark.parametrize("projection", ["idx", orthogonal])
@pytest.mark.parametrize("refresh", [1, 3])
def test_in_full_dimension_without_dual_it_is_fedavg(projection: Any, refresh: int) -> None:
    ours, _ = run(FedSub(lr=0.2, rank=1.0, projection=projection, refresh=refresh, dual="none"))
    close(ours.state["params"], run(FedAvg(lr=0.2))[0].state["params"])


def dual_averaging(rounds: int, lr: float) -> dict[str, Tensor]:
    """The method in full dimension, written out: each step goes along the gradient and -dual / tau."""
    model = network()
    names = [n for n, _ in model.named_parameters()]
    subspace = [n in ("0.weight", "2.weight") for n in names]
    x = [p.detach().clone() for p in model.parameters()]
    duals = [[torch.zeros_like(p) for p in x] for _ in range(3)]
    for _ in range(rounds):
        ends = []
        for c in range(3):
            w = [p.clone().requires_grad_() for p in x]
            for inputs, labels in batches(c):
                out = torch.func.functional_call(model, dict(zip(names, w, strict=True)), (inputs,))
                grads = torch.autograd.grad(F.cross_entropy(out, labels), w)
                w = [
                    (p - lr * g - (d / TAU if s else 0)).detach().requires_grad_()
                    for p, g, d, s in zip(w, grads, duals[c], subspace, strict=True)
                ]
            ends.append([p.detach() for p in w])
        mean = [sum(ps) / 3 for ps in zip(*ends, strict=True)]
        duals = [[d + p - m for d, p, m in zip(duals[c], ends[c], mean, strict=True)] for c in range(3)]
        x = mean
    return dict(zip(names, x, strict=True))


@pytest.mark.parametrize(
    ("projection", "dual"), [("idx", "rotated"), ("idx", "full"), (orthogonal, "rotated"), (orthogonal, "full")]
)
def test_in_full_dimension_it_is_dual_averaging(projection: Any, dual: Any) -> None:
    ours, _ = run(FedSub(lr=0.2, rank=1.0, projection=projection, dual=dual))
    close(ours.state["params"], dual_averaging(5, 0.2))


@pytest.mark.parametrize("projection", ["cd", "ss"])
def test_one_client_runs_projected_sgd(projection: Any) -> None:
    history, held = run(FedSub(lr=0.2, rank=2, projection=projection, targets=["0"], ordinary="frozen"), clients=1)
    assert not held[0]["dual"]["0.b"].any()
    model = network()
    for epoch in range(5):
        p = seeded_basis(projection, 2, 6, 0, "0", epoch, dtype=torch.double).dense()
        for x, y in batches(0):
            (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model[0].weight])
            with torch.no_grad():
                model[0].weight -= 0.2 * grad @ p.T @ p
    close(history.state["params"], dict(model.state_dict()))


def test_alike_clients_have_no_dual() -> None:
    _, held = run(FedSub(lr=0.2, rank=2), same=True)
    for state in held.values():
        assert all(x.abs().max() < 1e-15 for x in state["dual"].values())


@pytest.mark.parametrize("dual", ["rotated", "full"])
@pytest.mark.parametrize("projection", ["cd", "ss", "rd", "svd"])
def test_duals_sum_to_zero_and_devices_hold_the_servers_model(dual: Any, projection: str) -> None:
    history, held = run(FedSub(lr=0.1, rank=2, projection=projection, refresh=2, dual=dual))
    for name in held[0]["dual"]:
        assert sum(state["dual"][name] for state in held.values()).abs().max() < 1e-12
        assert held[0]["dual"][name].abs().max() > 1e-4
    for state in held.values():
        for name, x in history.state["params"].items():
            assert torch.equal(state["params"][name], x), name


def test_under_sampling_the_full_duals_still_sum_to_zero() -> None:
    # A rotated dual loses what the next basis does not span, for each client at a time of its own; a full one nothing.
    for dual, zero in (("full", True), ("rotated", False)):
        _, held = run(FedSub(lr=0.1, rank=2, cohort=2, dual=dual), rounds=9, clients=4)
        for name in ("0.b", "2.b"):
            worst = sum(state["dual"][name] for state in held.values()).abs().max()
            assert (worst < 1e-12) == zero, (dual, name, worst)


@pytest.mark.parametrize("downlink", ["means", "model"])
@pytest.mark.parametrize("dual", ["rotated", "full"])
def test_a_client_that_missed_rounds_is_told_what_it_missed(downlink: Any, dual: Any) -> None:
    cohorts = [[0, 1, 2], [0, 1], [1, 2], [0, 1], [1], [0, 1, 2]]
    plain = FedSub(lr=0.1, rank=1, refresh=2, dual=dual, downlink="model", ordinary="frozen")
    history, held = run(
        FedSub(lr=0.1, rank=1, refresh=2, dual=dual, downlink=downlink, ordinary="frozen"), rounds=6, cohorts=cohorts
    )
    close(history.state["params"], run(plain, rounds=6, cohorts=cohorts)[0].state["params"], atol=0.0)
    if downlink == "means":
        for state in held.values():
            close(state["params"], history.state["params"], atol=0.0)
    else:
        assert not any("params" in state for state in held.values())


@pytest.mark.parametrize("dual", ["full", "none"])
def test_own_ordinary_parameters_stay_on_the_device_whatever_comes_down(dual: Any) -> None:
    settings: dict[str, Any] = {"lr": 0.1, "rank": 1, "dual": dual, "ordinary": "local"}
    (means, kept), (model, own) = (run(FedSub(**settings, downlink=way)) for way in ("means", "model"))
    close(means.state["params"], model.state["params"], atol=0.0)
    for c, state in own.items():
        assert "0.weight" not in state["params"] and "4.weight" in state["params"]
        close({name: kept[c]["params"][name] for name in state["params"]}, state["params"], atol=0.0)
    assert not torch.equal(own[0]["params"]["4.weight"], own[1]["params"]["4.weight"])


def test_a_device_that_needs_nothing_afterwards_keeps_nothing() -> None:
    settings: dict[str, Any] = {"lr": 0.1, "rank": 1, "refresh": 2, "momentum": 0.5, "optimizer_state": "keep"}
    history, held = run(FedSub(**settings, dual="none", downlink="model"))
    assert all(state.keys() == {"epoch", "opt"} for state in held.values())
    expected, _ = run(FedSub(**settings, dual="none"))
    close(history.state["params"], expected.state["params"], atol=0.0)


def calls(history_folder: Any, key: str) -> dict[tuple[int, int, str], int]:
    import json

    lines = [json.loads(line) for line in (history_folder / "ledger.jsonl").read_text().splitlines()]
    return {
        (line["round"], e["client"], e["handler"]): e[key].get(kind, 0) if kind else sum(e[key].values())
        for line in lines for e in line["calls"] for kind in [None]
    }  # fmt: skip


@pytest.mark.parametrize("ordinary", ["average", "frozen"])
@pytest.mark.parametrize("projection", ["cd", "ss", "svd"])
def test_bytes_are_the_closed_formula(tmp_path: Any, ordinary: Any, projection: str) -> None:
    run(FedSub(lr=0.1, rank=2, projection=projection, refresh=2, ordinary=ordinary), rounds=3, folder=tmp_path)
    up, down = calls(tmp_path, "up"), calls(tmp_path, "down")
    b = 8 * (8 * 2 + 5 * 2)
    rest = 8 * (8 + 5 + 5 * 3 + 3) if ordinary == "average" else 0
    model = 8 * (6 * 8 + 8 + 8 * 5 + 5 + 5 * 3 + 3)
    rows = 4 * (2 * 6 + 2 * 8) if projection == "svd" else 0
    for c in range(3):
        for t in (1, 2, 3):
            assert up[t, c, "train"] == b + rest
            assert down[t, c, "settle"] == b + rest
            assert up[t, c, "settle"] == 0
        if projection == "svd":  # a sketch goes up and the rows of P come down, whenever it changes
            assert up[1, c, "sketch"] == 4 * (8 * 6 + 5 * 8)
            assert [down[1, c, "sketch"], down[1, c, "train"], down[2, c, "train"]] == [model, rows, 0]
        else:
            assert [down[t, c, "train"] for t in (1, 2, 3)] == [model, 0, 0]


def test_whoever_missed_much_gets_the_model_where_that_is_smaller(tmp_path: Any) -> None:
    cohorts = [[0, 1, 2], *[[0, 1]] * 3, [0, 1, 2], *[[0, 1]] * 10, [0, 1, 2]]
    run(FedSub(lr=0.1, rank=1, ordinary="frozen"), rounds=len(cohorts), cohorts=cohorts, folder=tmp_path)
    down, model = calls(tmp_path, "down"), 8 * (6 * 8 + 8 + 8 * 5 + 5 + 5 * 3 + 3)
    assert down[5, 2, "train"] == 3 * 8 * (8 + 5)
    assert down[16, 2, "train"] == model


def regression(client: int) -> tuple[Tensor, Tensor]:
    """Unequal quadratics: 12 equations in 6 unknowns, of another solution for each client."""
    g = torch.Generator().manual_seed(100 + client)
    x = torch.randn(12, 6, generator=g).double() * torch.linspace(0.6, 1.4, 6).double().roll(client)
    return x, x @ torch.randn(6, 2, generator=g).double() + 0.3 * torch.randn(12, 2, generator=g).double()


def distance(algorithm: Any, rounds: int) -> float:
    """How far from the minimiser of the mean loss a method ends."""
    data = {c: [regression(c)] for c in range(4)}
    x, y = (torch.cat([batch[0][i] for batch in data.values()]) for i in (0, 1))
    best = torch.linalg.lstsq(x, y).solution.T
    torch.manual_seed(0)
    task = Supervised(nn.Sequential(nn.Linear(6, 2, bias=False)).double(), loss=F.mse_loss, metrics={})
    history = lilliput.Experiment(algorithm=algorithm, task=task, data=data, rounds=rounds, evaluate="none").run(
        "sequential"
    )
    return (history.state["params"]["0.weight"] - best).norm().item()


SETTINGS: dict[str, Any] = {"lr": 0.3, "local_epochs": 4, "targets": ["0"]}


@pytest.mark.parametrize(("refresh", "rounds"), [(1, 110), (5, 180), (20, 640)])
def test_full_duals_reach_the_optimum(refresh: int, rounds: int) -> None:
    assert distance(FedSub(**SETTINGS, rank=3, dual="full", refresh=refresh), rounds) < 1e-10


def test_in_full_dimension_it_reaches_the_optimum_where_fedavg_stalls() -> None:
    assert distance(FedSub(**SETTINGS, rank=1.0, projection="idx"), 50) < 1e-10
    assert distance(FedAvg(lr=0.3, local_epochs=4), 50) > 0.1


def test_rotated_duals_forget() -> None:
    # Stated, not wished for: each change of P drops the part of the dual that the new one does not span.
    none, rotated = (distance(FedSub(**SETTINGS, rank=3, dual=d, refresh=20), 200) for d in ("none", "rotated"))
    assert 1e-4 < rotated < none / 10


def moved_rank(**settings: Any) -> int:
    task = Supervised(network())
    before = task.init()["params"]["2.weight"]
    history, _ = run(FedSub(lr=0.3, rank=1, targets=["2"], **settings), rounds=4)
    return int(torch.linalg.matrix_rank(history.state["params"]["2.weight"] - before, atol=1e-9))


def test_refreshes_leave_the_first_subspace() -> None:
    assert moved_rank(refresh=9) == 1
    assert moved_rank(refresh=1) == 4
    assert moved_rank(refresh=1, stale_projection=True) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9}, {"momentum": 0.9, "optimizer_state": "keep"},
        {"optimizer": "adam", "optimizer_state": "keep"},
        {"optimizer": "galore_adamw", "optimizer_options": {"rank": 1}}, {"per_layer": True}, {"accumulate": 2},
        {"precision": "bf16"}, {"weight_decay": 0.1}, {"optimizer_options": {"dampening": 0.5}, "momentum": 0.9},
    ],
    ids=str,
)  # fmt: skip
def test_it_trains_with_everything_that_a_client_can_do(settings: dict[str, Any]) -> None:
    history, held = run(FedSub(**{"lr": 0.1, "rank": 2, "refresh": 2, **settings}))
    assert history.rows[-1]["train_loss"] < history.rows[0]["train_loss"]
    for name in held[0]["dual"]:
        assert sum(state["dual"][name] for state in held.values()).abs().max() < 1e-9


@pytest.mark.parametrize("optimizer", ["galore_adamw", optim.GaLoreAdamW])
def test_an_optimizer_that_projects_says_that_it_leaves_b_whole(optimizer: Any) -> None:
    with pytest.warns(UserWarning, match="projects nothing of layers in subspaces"):
        FedSub(optimizer=optimizer, optimizer_options={"rank": 2})


UNEVEN: tuple[int, ...] = (1, 2, 4, 3)  # batches of each client, whose loss is the same on each


def weighted_distance(algorithm: Any, rounds: int) -> float:
    """How far from the minimiser of the mean loss by examples a method ends, where clients take unequal steps."""
    data = {c: [regression(c)] * n for c, n in enumerate(UNEVEN)}
    x, y = (torch.cat([b[i] for batches in data.values() for b in batches]) for i in (0, 1))
    best = torch.linalg.lstsq(x, y).solution.T
    torch.manual_seed(0)
    task = Supervised(nn.Sequential(nn.Linear(6, 2, bias=False)).double(), loss=F.mse_loss, metrics={})
    history = lilliput.Experiment(algorithm=algorithm, task=task, data=data, rounds=rounds, evaluate="none").run(
        "sequential"
    )
    return (history.state["params"]["0.weight"] - best).norm().item()


@pytest.mark.parametrize("kept", ["reset", "keep"])
@pytest.mark.parametrize(("refresh", "rounds"), [(1, 160), (5, 240), (20, 560)])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "lr": 0.05, "local_epochs": 2}], ids=["plain", "momentum"])
def test_the_optimum_is_the_fixed_point_under_momentum_and_unequal_steps(
    options: Any, refresh: int, rounds: int, kept: Any
) -> None:
    """Kept, the optimum is the only fixed point as well: there every buffer of momentum is zero."""
    settings = {"lr": 0.2, "targets": ["0"], "rank": 4, "dual": "full", "optimizer_state": kept, **options}
    assert weighted_distance(FedSub(**settings, refresh=refresh), rounds) < 1e-9


def test_other_momenta_and_bases_have_that_fixed_point_too() -> None:
    full: dict[str, Any] = {"lr": 0.1, "targets": ["0"], "rank": 3, "dual": "full", "momentum": 0.5}
    for more in ({"nesterov": True}, {"optimizer_options": {"dampening": 0.3}}, {"projection": "ss"}):
        assert weighted_distance(FedSub(**full, **more), 400) < 1e-9, more
    assert weighted_distance(FedAvg(lr=0.05, momentum=0.5), 400) > 1e-2


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9}, {"optimizer": "adam"}, {"optimizer": "adamw"}, {"optimizer": torch.optim.RMSprop},
        {"optimizer": "adamw8bit"},
    ],
    ids=str,
)  # fmt: skip
def test_a_forgotten_state_takes_a_fresh_optimizers_step(settings: dict[str, Any]) -> None:
    from lilliput.algorithms.spaces import forgotten
    from lilliput.training.step import Trainer

    def trainer() -> Trainer:
        torch.manual_seed(0)
        return Trainer(nn.Linear(3, 2).requires_grad_(), FedSub(**settings, optimizer_state="keep"), 0.1)

    def step(of: Trainer, seed: int) -> list[Tensor]:
        g = torch.Generator().manual_seed(seed)
        before = [p.detach().clone() for p in of.params]
        of.apply(of.everything, [torch.randn(p.shape, generator=g) for p in of.params])
        return [p.detach() - x for p, x in zip(of.params, before, strict=True)]

    used = trainer()
    for seed in range(5):
        step(used, seed)
    on, state = used.state(), forgotten(used.state(), [0])
    moved = []
    for loaded in (state, on, None):
        again = trainer()
        if loaded is not None:
            again.load(loaded)
        moved.append(step(again, 7))
    assert torch.equal(moved[0][0], moved[2][0]) and torch.equal(moved[0][1], moved[1][1])
    assert not torch.equal(moved[1][0], moved[2][0]) and not torch.equal(moved[1][1], moved[2][1])


def test_the_identity_never_changes_so_that_momentum_stays() -> None:
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "optimizer_state": "keep"}
    ours, _ = run(FedSub(**settings, rank=1.0, projection="idx", refresh=1, dual="none"))
    close(ours.state["params"], run(FedAvg(**settings))[0].state["params"])


def test_what_is_frozen_starts_where_the_run_does() -> None:
    elsewhere = {name: x.detach() + 0.5 for name, x in network().named_parameters()}
    moved = {"algorithm": FedSub(lr=0.2, rank=0.5, ordinary="frozen"), "rounds": 2}
    ours, _ = run(**moved, init=elsewhere)
    model = network()
    model.load_state_dict(elsewhere)
    theirs = lilliput.Experiment(
        task=Supervised(model), data={c: batches(c) for c in range(3)}, evaluate="none", **moved
    )
    close(ours.state["params"], theirs.run().state["params"])


@pytest.mark.parametrize("ordinary", ["average", "frozen"])
def test_beside_adapters_it_is_they_that_train_in_subspaces(ordinary: Any) -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False), nn.Linear(8, 3)
    ).double()
    model[0].requires_grad_(False), model[3].requires_grad_(False)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    history = lilliput.Experiment(
        FedSub(lr=0.1, rank=2, ordinary=ordinary), Supervised(model), {0: batches(0), 1: batches(1)}, rounds=2
    ).run()
    assert history.rows[-1]["up_bytes"] == 2 * 8 * (4 * 2 + 8 * 2)
    assert not torch.equal(history.state["params"]["1.weight"], start["1.weight"])
    frozen = FedSub(lr=0.1, rank=2, targets=["0"])
    with pytest.raises(ValueError, match="0 is frozen, and trains in no subspace"):
        lilliput.Experiment(frozen, Supervised(model), {0: batches(0)}, rounds=1).run()


def test_the_model_of_a_run_is_not_copied_for_its_spaces() -> None:
    task = Supervised(network())
    spaces = FedSub(rank=0.5).spaces(task)
    places = {p.data_ptr() for p in task.model.parameters()}
    own = {name for name, p in spaces.task.model.named_parameters() if p.data_ptr() not in places}
    assert own == {"0.b", "2.b"} and all(p.requires_grad for p in task.model.parameters())


def test_replies_of_other_shapes_are_dropped() -> None:
    class Lying(FedSub):
        pass

    original = FedSub.train

    def train(self: Any, client: Any, state: Any, msg: Any) -> Any:
        reply, after = original(self, client, state, msg)
        if client.id == 1:
            reply["delta"] = {name: x[..., :1] for name, x in reply["delta"].items()}
        return reply, after

    train.on_client, train.like = True, {}  # type: ignore[attr-defined]
    Lying.train = train  # type: ignore[method-assign]
    history, held = run(Lying(lr=0.1, rank=2))
    assert history.rows[-1]["dropped"] == 1 and sorted(held) == [0, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 9}, "rank=9 does not fit 0, whose width is 6"),
        ({"targets": ["nothing"]}, "targets: no layer of Sequential is called 'nothing'"),
        ({"targets": ["1"]}, "1 is a Tanh; only linear layers"),
        ({"refresh": 0}, "refresh is 0"),
        ({"local_steps": 0}, "local_steps is 0"),
        ({"lr": 0.0}, "lr is 0"),
        ({"projection": "qr"}, "projection is 'qr'"),
        ({"projection": "svd", "stale_projection": True}, "stale_projection is for projections from a seed"),
        ({"optimizer_state": "average"}, "optimizer_state=average is for subspace optimizers"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(FedSub(**{"lr": 0.1, **settings}), rounds=1)


def test_a_device_of_another_round_is_refused() -> None:
    algorithm, task = FedSub(lr=0.1, rank=2), Supervised(network())
    client = lilliput.Client(0, task, None, lilliput.Profile(), 7, 9, 0)
    with pytest.raises(ValueError, match="the model here is of round 3, and what was sent goes on from round 6"):
        algorithm.train(client, {"round": 3}, {"since": 6})


def test_messages_are_the_payload_and_a_header() -> None:
    zeros = {"0.b": torch.zeros(8, 2), "2.b": torch.zeros(5, 2)}
    assert wire.nbytes({"mean": zeros}).payload == 4 * (8 * 2 + 5 * 2)
