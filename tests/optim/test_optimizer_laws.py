"""Laws that hold for every weight optimizer with every projection and every option."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from lilliput import optim
from lilliput.optim import states
from lilliput.optim.options import PROJECTIONS

OPTIMIZERS = {
    "adamw": optim.GaLoreAdamW,
    "adamw8bit": optim.GaLoreAdamW8bit,
    "adafactor": optim.GaLoreAdafactor,
    "lion": optim.GaLoreLion,
}
OPTIONS = {
    "svd": {"refresh": "svd"},
    "rotate": {"rotate": True},
    "lazy": {"lazy": 0.4},
    "fira": {"update": "fira"},
    "apollo": {"update": "apollo"},
    "apollo_mini": {"update": "apollo_mini"},
    "bf16_states": {"states": "bf16"},
    "bf16_products": {"precision": "bf16"},
    "momentum": {"beta1": 0.9},
    "official": {"compat": "official"},
    "decay": {"weight_decay": 0.1},
}
SHAPES = [(48, 36), (36, 48), (32, 32), (8, 6, 3, 3)]
RATES = {"adamw": 0.1, "adamw8bit": 0.1, "adafactor": 0.1, "lion": 0.03}


def allowed(optimizer: str, options: dict) -> bool:
    if optimizer == "lion" and str(options.get("update")).startswith("apollo"):
        return False
    if optimizer == "adamw8bit" and "states" in options:
        return False
    return "beta1" not in options or optimizer == "adafactor"


CASES = [(o, "std", options) for o in OPTIMIZERS for options in OPTIONS.values() if allowed(o, options)]
CASES += [(o, projection, {}) for o in OPTIMIZERS for projection in PROJECTIONS]
CASES += [
    ("adamw", p, {"update": u, "rotate": True})
    for p in ("left", "full", "seeded", "continuous")
    for u in ("fira", "apollo")
]
# What is left of the whole product takes minutes.
REST = [(o, p, options) for o in OPTIMIZERS for p in PROJECTIONS for options in OPTIONS.values() if allowed(o, options)]
REST = [case for case in REST if case not in CASES]


def named(case: tuple[str, str, dict], marks: tuple = ()):  # type: ignore[type-arg]
    optimizer, projection, options = case
    return pytest.param(
        case, id=f"{optimizer}-{projection}-{'+'.join(map(str, options.values())) or 'plain'}", marks=marks
    )


every_case = pytest.mark.parametrize("case", [*map(named, CASES), *(named(case, (pytest.mark.slow,)) for case in REST)])


@pytest.fixture(autouse=True)
def compressed_from_150_elements(monkeypatch):
    """Low-rank gradients here have 16 to 216 elements: some are coded in 8 bits, some not."""
    monkeypatch.setattr(states, "SMALL", 150)


class Problem:
    """Weights that should reach low-rank targets, a bias that should reach ones: the gradients of ||W - T||^2 / 2."""

    def __init__(self, case, dtype=torch.float32, gap=4):
        optimizer, projection, options = case
        generator = torch.Generator().manual_seed(1)
        self.targets = [self._low_rank(shape, generator).to(dtype) for shape in SHAPES] + [torch.ones(5, dtype=dtype)]
        self.params = [nn.Parameter(torch.zeros_like(t)) for t in self.targets]
        self.options = {"rank": 4, "update_proj_gap": gap, "scale": 1.0, "proj_type": projection}
        group = {"params": self.params[:-1], **self.options}
        self.optimizer = OPTIMIZERS[optimizer]([group, {"params": self.params[-1:]}], lr=RATES[optimizer], **options)

    @staticmethod
    def _low_rank(shape, generator) -> Tensor:
        m, n = shape[0], torch.Size(shape[1:]).numel()
        return (torch.randn(m, 2, generator=generator) @ torch.randn(2, n, generator=generator)).view(shape)

    def loss(self) -> float:
        return (
            float(sum(((p - t).float() ** 2).sum() for p, t in zip(self.params, self.targets, strict=True)).detach())
            / 2
        )

    def step(self, factor: float = 1.0) -> None:
        for p, t in zip(self.params, self.targets, strict=True):
            p.grad = (p.detach() - t) * factor
        self.optimizer.step()

    def run(self, steps: int) -> list[Tensor]:
        for _ in range(steps):
            self.step()
        return [p.detach().clone() for p in self.params]


def tensors(optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]


@every_case
def test_it_descends(case):
    problem = Problem(case)
    before = problem.loss()
    problem.run(30)
    # `full` moves no more than rank x rank numbers at a time.
    assert problem.loss() < before * (1.0 if case[1] == "full" else 0.95)


@every_case
def test_a_resumed_run_is_the_straight_run(case):
    straight = Problem(case)
    expected = straight.run(11)
    halves = Problem(case)
    weights = halves.run(6)
    file = io.BytesIO()
    torch.save(halves.optimizer.state_dict(), file)
    file.seek(0)
    resumed = Problem(case)
    resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
    for p, w in zip(resumed.params, weights, strict=True):
        p.data.copy_(w)
    assert all(torch.equal(a, b) for a, b in zip(resumed.run(5), expected, strict=True))


BROKEN = [(case, bad) for case in CASES for bad in (0.0, float("nan"))] + [(case, float("inf")) for case in CASES[::6]]


@pytest.mark.parametrize(("case", "bad"), BROKEN, ids=str)
def test_zero_and_broken_gradients_poison_nothing(case, bad):
    for when in (0, 2, 4):  # before there is a projection, with one, and when its refresh is due
        problem = Problem(case)
        problem.run(when)
        before, counted = (
            [p.detach().clone() for p in problem.params],
            [copy.deepcopy(x) for x in tensors(problem.optimizer)],
        )
        problem.step(bad)
        if bad:
            assert all(torch.equal(a, b) for a, b in zip(before, problem.params, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(counted, tensors(problem.optimizer), strict=False))
            assert sum(group["skipped"] for group in problem.optimizer.param_groups) == len(problem.params)
        middle = problem.loss()
        problem.run(8)
        assert all(x.isfinite().all() for x in tensors(problem.optimizer)) and problem.loss() < middle


@every_case
def test_dtypes_stay(case):
    for dtype in (torch.bfloat16, torch.float64):
        problem = Problem(case, dtype)
        before = problem.loss()
        problem.run(6)
        dtypes = [x.dtype for x in tensors(problem.optimizer)]
        problem.run(1)
        assert [x.dtype for x in tensors(problem.optimizer)] == dtypes and problem.loss() < before
        assert all(p.dtype == dtype for p in problem.params)
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        assert all(state["P"].dtype == wide for state in problem.optimizer.state.values() if "P" in state)


@every_case
def test_state_has_the_layout_that_is_announced(case):
    problem = Problem(case)
    problem.run(3)
    for group in problem.optimizer.param_groups:
        for p in group["params"]:
            held = {
                n: (tuple(x.shape), x.dtype) for n, x in problem.optimizer.state[p].items() if isinstance(x, Tensor)
            }
            assert held == problem.optimizer.layout(p, group)


@every_case
def test_accumulated_gradients_are_one_gradient(case):
    whole, parts = Problem(case), Problem(case)
    for _ in range(6):
        whole.step()
        for p, t in zip(parts.params, parts.targets, strict=True):
            grad = p.detach() - t
            p.grad = grad / 2
            p.grad += grad / 2
        parts.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.params, parts.params, strict=True))


@pytest.mark.parametrize("case", [*map(named, CASES[::5])])
def test_copies_and_pickles_carry_on(case):
    problem = Problem(case)
    problem.run(5)
    twin = copy.deepcopy(problem)
    assert all(torch.equal(a, b) for a, b in zip(problem.run(4), twin.run(4), strict=True))


@pytest.mark.parametrize("case", [*map(named, CASES[::5])])
def test_a_parameter_without_gradient_is_left_alone(case):
    problem = Problem(case)
    problem.run(2)
    still = problem.params[1].detach().clone()
    for p, t in zip(problem.params, problem.targets, strict=True):
        p.grad = None if p is problem.params[1] else p.detach() - t
    problem.optimizer.step()
    assert torch.equal(still, problem.params[1]) and problem.optimizer.state[problem.params[1]]["step"] == 2


def test_schedulers_and_closures_work():
    problem = Problem(("adamw", "continuous", {}))
    schedule = torch.optim.lr_scheduler.LambdaLR(problem.optimizer, lambda t: t / 10)
    problem.step()
    assert all(not p.any() for p in problem.params)  # the warm-up's first rate is 0
    schedule.step()
    problem.step()
    assert problem.params[0].abs().max() > 0
    assert problem.optimizer.step(lambda: 3.5) == 3.5
