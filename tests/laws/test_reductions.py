"""Methods that must coincide, and optima that must be reached."""

from __future__ import annotations

from operator import mul
from typing import Any

import pytest
import torch
from fixtures import assert_same_state, batches, experiment, network
from torch import nn

import lilliput
from lilliput.algorithms import Centralized, FedAvg, FedNova, FedProx, LocalOnly, Moon, Scaffold
from lilliput.engines import Sequential
from lilliput.submodel import uniform_mean, weighted_mean
from lilliput.tasks import Supervised
from lilliput.training import updates

SETTINGS = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01, "local_epochs": 2, "cohort": 3}


def run(algorithm: Any, data: Any = None, rounds: int = 3, bn: bool = True) -> lilliput.History:
    data = data if data is not None else batches()
    return lilliput.Experiment(algorithm=algorithm, task=Supervised(network(bn)), data=data, rounds=rounds).run(
        Sequential()
    )


def test_fedprox_with_zero_mu_is_fedavg() -> None:
    assert_same_state(run(FedProx(**SETTINGS, mu=0.0)).state, run(FedAvg(**SETTINGS)).state)


def test_moon_with_zero_mu_is_fedavg() -> None:
    assert_same_state(run(Moon(**SETTINGS, mu=0.0)).state, run(FedAvg(**SETTINGS)).state)


def test_fednova_with_equal_work_is_fedavg() -> None:
    data = {c: batches()[c][:1] for c in range(6)}
    a, b = run(FedNova(**SETTINGS), data).state, run(FedAvg(**SETTINGS), data).state
    for name, x in a["params"].items():
        torch.testing.assert_close(x, b["params"][name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}])
def test_fedavg_of_one_kept_step_is_data_parallel_sgd(options: dict[str, Any]) -> None:
    """The mean of steps is the step of the mean gradient, momentum included."""
    data = {c: batches()[c][:1] for c in range(4)}
    model = network(bn=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    doubles = {c: [(x.double(), y) for x, y in batch] for c, batch in data.items()}
    algorithm = FedAvg(lr=0.1, local_steps=1, optimizer_state="keep", **options)
    task = Supervised(network(bn=False).double())
    history = lilliput.Experiment(algorithm=algorithm, task=task, data=doubles, rounds=6).run(Sequential())
    x, y = (torch.cat([doubles[c][0][i] for c in doubles]) for i in (0, 1))
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(history.state["params"][name], p.data, atol=1e-12, rtol=0)


def test_one_client_with_everything_is_plain_sgd_and_centralized() -> None:
    data = {0: [b for c in range(3) for b in batches()[c]]}
    settings = {"lr": 0.1, "momentum": 0.5, "local_epochs": 2, "optimizer_state": "keep"}
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for _ in range(3 * 2):
        for x, y in data[0]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    averaged = run(FedAvg(**settings), data).models["global"]
    alone = run(LocalOnly(**settings), data).models[0]
    central = run(Centralized(**settings), data).models["global"]
    for name, p in model.named_parameters():
        # The server adds what it was sent to what it had: one rounding per round more than SGD's own.
        torch.testing.assert_close(averaged.params[name], p.detach(), atol=1e-6, rtol=0)
        torch.testing.assert_close(alone.params[name], p.detach(), atol=1e-6, rtol=0)
        assert torch.equal(alone.params[name], central.params[name])


def test_scaffold_without_control_or_correction_moves_like_uniform_fedavg_in_its_first_round() -> None:
    """c and c_i start at zero, so the first round is FedAvg's with equal weights."""
    a = run(Scaffold(**SETTINGS), rounds=1).state
    b = run(FedAvg(**SETTINGS, combine=uniform_mean()), rounds=1).state
    assert_same_state(a["params"], b["params"])


def test_scaffold_official_and_corrected_agree_without_momentum_and_batchnorm() -> None:
    settings = {**SETTINGS, "momentum": 0.0, "cohort": None}
    a = run(Scaffold(**settings), bn=False).state["params"]
    b = run(Scaffold(**settings, compat="official"), bn=False).state["params"]
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], atol=1e-6, rtol=0)


class Quadratic(nn.Module):
    """f(w) = h/2 (w - o)^2 of a batch that holds (h, o)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0] / 2 * (self.w - x[:, 1]) ** 2


def quadratics(*clients: tuple[float, float, int]) -> dict[int, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Client c holds curvature h, optimum o, and that many batches of one example."""
    return {
        c: [(torch.tensor([[h, o]], dtype=torch.float64), torch.zeros(1)) for _ in range(n)]
        for c, (h, o, n) in enumerate(clients)
    }


def optimum(algorithm: Any, data: Any, rounds: int = 400) -> float:
    task = Supervised(Quadratic(), loss=lambda out, y: out.mean(), metrics={})
    history = lilliput.Experiment(algorithm=algorithm, task=task, data=data, rounds=rounds).run(Sequential())
    return float(history.models["global"].params["w"])


def test_scaffold_reaches_the_optimum_of_unequal_quadratics() -> None:
    """f = (w^2 + 10 (w - 1)^2) / 2: optimum 10/11.  FedAvg's fixed point solves sum (1 - (1 - lr h)^K)(o - w) = 0."""
    data = quadratics((1.0, 0.0, 10), (10.0, 1.0, 10))
    lr, steps = 0.05, 10
    assert optimum(Scaffold(lr=lr), data) == pytest.approx(10 / 11, abs=1e-12)
    pulls = [1 - (1 - lr * h) ** steps for h in (1.0, 10.0)]
    stall = pulls[1] / sum(pulls)
    assert abs(stall - 10 / 11) > 0.05
    assert optimum(FedAvg(lr=lr), data) == pytest.approx(stall, abs=1e-9)


def test_scaffold_with_momentum_still_reaches_the_optimum() -> None:
    data = quadratics((1.0, 0.0, 10), (10.0, 1.0, 10))
    assert optimum(Scaffold(lr=0.01, momentum=0.9), data, rounds=800) == pytest.approx(10 / 11, abs=1e-9)


def test_scaffold_with_two_of_four_clients_reaches_the_optimum() -> None:
    data = quadratics((1.0, 0.0, 5), (10.0, 1.0, 5), (3.0, -1.0, 5), (6.0, 2.0, 5))
    target = (10 * 1 - 3 + 12) / 20
    assert optimum(Scaffold(lr=0.02, cohort=2), data, rounds=3000) == pytest.approx(target, abs=1e-6)


def test_fednova_tends_to_the_optimum_of_unequal_work_and_fedavg_does_not() -> None:
    """Equal curvature, 2 and 20 steps, weights 2/22 and 20/22: the objective's optimum is 20/22, and weighting by work
    a second time takes FedAvg to 400/404 as the step shrinks.  FedNova's error is of the order of the step."""
    data = quadratics((1.0, 0.0, 2), (1.0, 1.0, 20))
    right, wrong = 20 / 22, 400 / 404
    errors = [abs(optimum(FedNova(lr=lr), data, int(8 / lr)) - right) for lr in (0.04, 0.02, 0.01)]
    assert errors[0] > 1.8 * errors[1] > 3.2 * errors[2]  # halves with the step
    assert errors[2] < 0.02
    assert optimum(FedAvg(lr=0.01), data, 400) == pytest.approx(wrong, abs=0.01)
    assert abs(wrong - right) > 0.07


def test_unheld_coordinates_keep_their_value() -> None:
    e = experiment("rolling_slices", rounds=1, data={0: batches()[0]}, settings={"cohort": None})
    before = e.task.init()["params"]
    after = e.run(Sequential()).state["params"]
    held = torch.tensor([1, 2])  # width 2 in round 1 holds the hidden units 1 and 2
    rest = torch.tensor([i for i in range(8) if i not in (1, 2)])
    assert torch.equal(after["0.weight"][rest], before["0.weight"][rest])
    assert torch.equal(after["3.weight"][:, rest], before["3.weight"][:, rest])
    assert not torch.equal(after["0.weight"][held], before["0.weight"][held])


def test_averaged_projections_are_the_mean_subspace_of_the_clients() -> None:
    """Each round starts in the mean of the subspaces that the clients trained in; one client's mean is its own."""
    galore = {"rank": 2, "proj_type": "std", "update_proj_gap": 1000}
    settings = {"lr": 0.01, "optimizer": "galore_adamw", "optimizer_options": galore, "optimizer_state": "average"}
    alone = run(FedAvg(**settings), {0: batches()[0]}, rounds=3, bn=False).state["projections"]
    first = run(FedAvg(**settings), {0: batches()[0]}, rounds=1, bn=False).state["projections"]
    together = run(FedAvg(**settings), rounds=1, bn=False).state["projections"]
    assert alone.keys() == together.keys() and alone
    for name, P in alone.items():
        rows, before = (x if x.shape[0] <= x.shape[1] else x.mT for x in (P, first[name]))
        torch.testing.assert_close(rows @ rows.mT, torch.eye(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(rows.mT @ rows, before.mT @ before, atol=1e-5, rtol=0)  # kept: no refresh was due
    assert not any(torch.allclose(together[n].abs(), first[n].abs(), atol=1e-3) for n in first)


def test_projections_of_an_optimizer_without_any_cannot_be_averaged() -> None:
    with pytest.raises(RuntimeError, match="needs a subspace optimizer"):
        run(FedAvg(optimizer_state="average"), rounds=1)


def quadratic_step(tau: int, momentum: float, dampening: float, nesterov: bool) -> float:
    """How far torch's SGD goes in so many steps at lr 1 against gradients of one."""
    w = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([w], 1.0, momentum, dampening, nesterov=nesterov)
    for _ in range(tau):
        w.grad = torch.ones_like(w)
        optimizer.step()
    return -w.item()


MOMENTA = [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.4, False), (0.5, 0.0, True), (0.0, 0.3, False)]


@pytest.mark.parametrize(("momentum", "dampening", "nesterov"), MOMENTA)
@pytest.mark.parametrize("make", ["sgd", torch.optim.SGD])
def test_sgd_states_what_it_makes_of_gradients_of_one(
    make: Any, momentum: float, dampening: float, nesterov: bool
) -> None:
    if make == "sgd":
        given: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "options": {"dampening": dampening}}
    else:
        options = {"momentum": momentum, "nesterov": nesterov, "dampening": dampening}
        given = {"momentum": 0.0, "nesterov": False, "options": options}
    update = updates.make(make, [torch.zeros(2)], 0.1, weight_decay=0.0, **given)
    for steps in (0, 1, 2, 7):
        assert update.weight(0, steps) == pytest.approx(quadratic_step(steps, momentum, dampening, nesterov))


def test_a_kept_buffer_passes_a_gradient_on_in_full_and_adaptive_optimizers_state_no_weight() -> None:
    update = updates.make("sgd", [torch.zeros(2), torch.zeros(2)], 0.1, momentum=0.9, weight_decay=0.0, nesterov=False,
                          options={})  # fmt: skip
    update.load({"1": torch.ones(2)})
    assert update.weight(0, 3) == pytest.approx(1 + 1.9 + 2.71) and update.weight(1, 3) == pytest.approx(3 / 0.1)
    for name in ("adam", "adamw", "lion", torch.optim.RMSprop):
        adaptive = updates.make(name, [torch.zeros(2)], 0.1, momentum=0.0, weight_decay=0.0, nesterov=False, options={})
        assert adaptive.weight(0, 3) is None


@pytest.mark.parametrize(("momentum", "dampening", "nesterov"), MOMENTA)
@pytest.mark.parametrize("combine", [weighted_mean(), uniform_mean()], ids=["weighted", "uniform"])
def test_fednova_takes_weights_and_tau_from_optimizer_and_combine(
    combine: Any, momentum: float, dampening: float, nesterov: bool
) -> None:
    """Gradients that are constant: x moves by -lr (sum p_i a_i) (sum p_i g_i)."""
    taus, slopes, lr = (2, 5, 1), (1.0, -2.0, 4.0), 0.1
    data = {c: [(torch.full((1, 1), s), torch.zeros(1))] * n for c, (n, s) in enumerate(zip(taus, slopes, strict=True))}
    task = Supervised(Slope(), loss=lambda out, y: out.mean(), metrics={})
    settings: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov}
    settings["optimizer_options"] = {"dampening": dampening} if dampening else {}
    algorithm = FedNova(lr=lr, combine=combine, **settings)
    found = lilliput.Experiment(algorithm=algorithm, task=task, data=data, rounds=1).run(Sequential()).state["params"]
    p = [n / sum(taus) for n in taus] if combine == weighted_mean() else [1 / 3] * 3
    a = [quadratic_step(n, momentum, dampening, nesterov) for n in taus]
    expected = -lr * sum(map(mul, p, a)) * sum(map(mul, p, slopes))
    assert float(found["w"]) == pytest.approx(expected, abs=1e-6)


class Slope(nn.Module):
    """f(w) = s w of a batch that holds s."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0] * self.w


@pytest.mark.parametrize(("momentum", "dampening", "nesterov"), MOMENTA)
def test_scaffold_learns_constant_gradients_in_one_round(momentum: float, dampening: float, nesterov: bool) -> None:
    """c_i+ = g_i, whatever the optimizer makes of it, so that c is their mean."""
    slopes, taus = (1.0, -2.0, 4.0), (2, 5, 1)
    data = {c: [(torch.full((1, 1), s), torch.zeros(1))] * n for c, (n, s) in enumerate(zip(taus, slopes, strict=True))}
    task = Supervised(Slope(), loss=lambda out, y: out.mean(), metrics={})
    options = {"optimizer_options": {"dampening": dampening}} if dampening else {}
    algorithm = Scaffold(lr=0.1, momentum=momentum, nesterov=nesterov, **options)
    state = lilliput.Experiment(algorithm=algorithm, task=task, data=data, rounds=1).run(Sequential()).state
    assert float(state["control"]["w"]) == pytest.approx(1.0, abs=1e-6)


UNEQUAL = ((1.0, 0.0, 3), (10.0, 1.0, 7), (3.0, -1.0, 10), (6.0, 2.0, 5))


@pytest.mark.parametrize("kept", ["reset", pytest.param("keep", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("momentum", "dampening", "nesterov"), MOMENTA)
def test_scaffold_reaches_the_optimum_under_any_momentum_and_unequal_steps(
    kept: Any, momentum: float, dampening: float, nesterov: bool
) -> None:
    """Equal weights: (10 - 3 + 12) / 20.  Kept, the optimum is the only fixed point: there all buffers are zero."""
    options = {"optimizer_options": {"dampening": dampening}} if dampening else {}
    algorithm = Scaffold(lr=0.005, momentum=momentum, nesterov=nesterov, optimizer_state=kept, **options)
    assert optimum(algorithm, quadratics(*UNEQUAL), rounds=250) == pytest.approx(19 / 20, abs=1e-9)
