"""Local training: one path of a step equals the other, and every option does what it says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lilliput.core import tree
from lilliput.core.fleet import Client, Profile
from lilliput.data.batches import as_batches
from lilliput.tasks import Supervised
from lilliput.training.fit import fit
from lilliput.training.settings import Training, factor
from lilliput.training.step import pull_to, shift


def model(bn: bool = False) -> nn.Module:
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8) if bn else nn.Identity(), nn.Tanh())  # noqa: E731
    return nn.Sequential(nn.Linear(5, 8), block(), block(), nn.Linear(8, 3))


def client(net: nn.Module | None = None, batches: int = 3, size: int = 6) -> Client:
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(batches)
    ]
    return Client(0, Supervised(net or model()), as_batches(data), Profile(), round=1, rounds=10, seed=0)


def trained(config: Training, net: nn.Module | None = None, **options: Any) -> tree.Tree:
    c = client(net)
    start = c.task.init()
    return fit(c, start["params"], config=config, buffers=start["buffers"], **options)[0]


def assert_close(a: tree.Tree, b: tree.Tree, atol: float = 0.0) -> None:
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], atol=atol, rtol=0)


OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "adam": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "accumulate": {"accumulate": 3, "momentum": 0.5},
    "own": {"optimizer": torch.optim.RMSprop, "lr": 0.01},
    "galore": {"optimizer": "galore_adamw", "lr": 0.01, "optimizer_options": {"rank": 2, "update_proj_gap": 2}},
    "online": {"optimizer": "online_subspace_lion", "lr": 0.01, "optimizer_options": {"rank": 2, "update_proj_gap": 5}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_updates_in_backward_hooks_equal_updates_at_once(options: dict[str, Any]) -> None:
    config = Training(**{"lr": 0.1, "local_epochs": 2, **options})
    x = client().task.init()["params"]
    corrections = [pull_to(tree.zeros_like(x), 0.1), shift({n: torch.full_like(p, 0.01) for n, p in x.items()})]
    assert_close(
        trained(replace(config, per_layer=True), corrections=corrections),
        trained(config, corrections=corrections),
        1e-7,
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
            lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01, nesterov=True),
        ),
        ({"optimizer": "adam", "weight_decay": 0.01}, lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.01)),
        ({"optimizer": "adamw", "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1)),
        ({"optimizer": torch.optim.Adagrad}, lambda p: torch.optim.Adagrad(p, 0.1)),
    ],
    ids=["sgd", "adam", "adamw", "adagrad"],
)
def test_training_is_that_of_torch_optim(ours: dict[str, Any], theirs: Any) -> None:
    net = model()
    optimizer = theirs(net.parameters())
    for _ in range(2):
        for x, y in client().data.epoch(None):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    expected = {n: p.detach() for n, p in net.named_parameters()}
    assert_close(trained(Training(lr=0.1, local_epochs=2, **ours)), expected, 2e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_kept_optimizer_goes_on_where_it_stopped(options: dict[str, Any]) -> None:
    config = Training(**{"lr": 0.1, "local_epochs": 1, "optimizer_state": "keep", **options})
    c = client()
    once, state, _ = fit(c, c.task.init()["params"], config=config)
    twice, _, _ = fit(c, once, state, config=config)
    assert_close(twice, trained(replace(config, local_epochs=2)), 1e-7)


def test_micro_batches_add_up_to_the_batch() -> None:
    assert_close(trained(Training(accumulate=4)), trained(Training()), 1e-7)


class Sum(nn.Module):
    """A layer whose weight is a sum of two, or of views of them: then the gradients of both lie in one memory."""

    def __init__(self, views: bool):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.views = nn.Parameter(torch.randn(15)), nn.Parameter(torch.randn(15)), views

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a, self.b
        return x @ (a.view(5, 3) + b.view(5, 3) if self.views else (a + b).view(5, 3))


@pytest.mark.parametrize("way", [{}, {"per_layer": True}, {"precision": "fp16"}], ids=str)
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"accumulate": 3, "clip": 0.1}, {"clip": 0.1}], ids=str)
def test_gradients_in_one_memory_are_changed_one_by_one(options: dict[str, Any], way: dict[str, Any]) -> None:
    config = Training(momentum=0.9, **options, **way)
    x = Sum(True).state_dict()
    for corrections in ([], [shift({n: torch.full_like(p, 0.1) for n, p in x.items()})]):
        plain, views = (trained(config, Sum(views), corrections=corrections) for views in (False, True))
        assert_close(plain, views, 1e-6)


@pytest.mark.parametrize("per_layer", [False, True])
def test_checkpointing_changes_neither_weights_nor_statistics(per_layer: bool) -> None:
    outcomes = []
    for checkpointing in (False, True):
        c = client(model(bn=True))
        start = c.task.init()
        config = Training(checkpointing=checkpointing, per_layer=per_layer)
        params, _, stats = fit(c, start["params"], config=config, buffers=start["buffers"])
        outcomes.append({**params, **stats.buffers})
    assert_close(*outcomes, atol=1e-7)
    assert int(outcomes[1]["1.1.num_batches_tracked"]) == 3


def test_checkpointing_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no Sequential or ModuleList"):
        trained(Training(checkpointing=True), nn.Linear(5, 3))


def test_clipping_bounds_the_step() -> None:
    c = client(batches=1)
    x = c.task.init()["params"]
    free, clipped = (fit(c, x, config=Training(lr=1.0, clip=clip))[0] for clip in (None, 0.01))
    assert float(tree.norm(tree.sub(free, x))) > 0.02
    assert float(tree.norm(tree.sub(clipped, x))) == pytest.approx(0.01, rel=1e-3)


def test_pull_is_the_gradient_of_half_mu_times_the_squared_distance() -> None:
    names, w = ["a"], torch.randn(4, requires_grad=True)
    x, grads = {"a": torch.randn(4)}, [torch.zeros(4)]
    (expected,) = torch.autograd.grad(0.3 / 2 * (w - x["a"]).square().sum(), w)
    pull_to(x, 0.3)(names, [w.detach()], grads)
    torch.testing.assert_close(grads[0], expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_stays_near_float32(precision: Any) -> None:
    a, b = trained(Training(precision=precision)), trained(Training())
    start = client().task.init()["params"]
    assert float(tree.norm(tree.sub(a, b))) < 0.05 * float(tree.norm(tree.sub(b, start)))
    assert not all(torch.equal(a[n], b[n]) for n in a)


def scaled_loss(c: Client, *factors: float) -> Any:
    """The task's loss times a factor for each step."""
    left = iter(factors)
    return lambda m, batch, context: (next(left) * c.task.loss(m, batch)[0].float(), {})


def test_the_first_fp16_step_finds_its_loss_scale_and_later_overflows_are_skipped() -> None:
    config, c = Training(precision="fp16", lr=1e-6), client(batches=2)
    x = c.task.init()["params"]
    first, state, stats = fit(c, x, config=replace(config, local_steps=1), loss=scaled_loss(c, *[1e6] * 20))
    assert stats.steps == 1 and not stats.skipped and not torch.equal(first["0.weight"], x["0.weight"])
    assert state["scaler"]["scale"] < 2.0**16
    after, state, stats = fit(c, x, config=config, loss=scaled_loss(c, 1.0, 1e12))
    once = fit(c, x, config=replace(config, local_steps=1))[0]
    assert (stats.steps, stats.skipped, state["scaler"]["scale"]) == (1, 1, 2.0**15)
    assert_close(after, once)


def test_after_step_follows_the_steps_that_were_applied() -> None:
    config, c = Training(precision="fp16", lr=1e-6), client(batches=3)
    calls: list[nn.Module] = []
    _, _, stats = fit(
        c, c.task.init()["params"], config=config, loss=scaled_loss(c, 1, 1e9, 1), after_step=calls.append
    )
    assert stats.skipped == 1 and len(calls) == stats.steps == 2
    x, y = torch.randn(4, 5), torch.tensor([-100] * 4)
    c = replace(c, data=as_batches([(x, y), (x, y.clamp_min(1))]))
    calls.clear()
    fit(c, c.task.init()["params"], config=Training(), after_step=calls.append)
    assert len(calls) == 1


@pytest.mark.parametrize("kept", ["reset", "keep"])
def test_the_fp16_loss_scale_goes_on_in_the_next_round(kept: Any) -> None:
    config, c = Training(precision="fp16", lr=1e-6, optimizer_state=kept), client(batches=1)
    x, state, _ = fit(c, c.task.init()["params"], config=config, loss=scaled_loss(c, *[1e6] * 20))
    passes: list[int] = []

    def counting(m: nn.Module, batch: Any, context: Any) -> Any:
        passes.append(1)
        return 1e6 * c.task.loss(m, batch)[0].float(), {}

    fit(c, x, state, config=config, loss=counting)
    assert len(passes) == 1


def test_a_round_whose_every_fp16_step_overflows_is_refused() -> None:
    c = client(batches=1)
    endless = lambda m, batch, context: (c.task.loss(m, batch)[0] * math.inf, {})  # noqa: E731
    with pytest.raises(ValueError, match=r"all 1 steps overflowed in fp16.*use precision=bf16"):
        fit(c, c.task.init()["params"], config=Training(precision="fp16"), loss=endless)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "extent"), [(3, 2, 1), (1, 3, 2), (5, 3, 1)])
def test_bf16_convolutions_over_less_than_their_stride_are_computed_in_float32(
    kernel: int, stride: int, extent: int, checkpointing: bool
) -> None:
    torch.manual_seed(0)
    padding = kernel // 2 or 1
    net = nn.Sequential(nn.Conv2d(16, 32, kernel, stride, padding), nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(4, 16, extent, extent), torch.tensor([0, 1, 2, 0])
    net(x)  # the last layer takes its width
    c = Client(0, Supervised(net), as_batches([(x, y)]), Profile(), round=1, rounds=1, seed=0)
    start = c.task.init()["params"]
    exact = fit(c, start, config=Training())[0]
    torch.full((2**16,), 1e30)  # what an uninitialised gradient would find in memory
    found = fit(c, start, config=Training(precision="bf16", checkpointing=checkpointing))[0]
    for name, w in start.items():
        torch.testing.assert_close(found[name] - w, exact[name] - w, atol=1e-3, rtol=0.05)
    assert "forward" not in vars(c.task.resident(start)[0])


def test_steps_can_be_counted_instead_of_epochs() -> None:
    c = client(batches=3)
    assert [fit(c, c.task.init()["params"], config=Training(local_steps=n))[2].steps for n in (0, 2, 7)] == [0, 2, 7]
    assert_close(trained(Training(local_steps=6)), trained(Training(local_epochs=2)))


def test_without_buffers_batches_are_normalised_by_themselves() -> None:
    c = client(model(bn=True))
    params, _, stats = fit(c, c.task.init()["params"], config=Training())
    assert stats.buffers == {}
    assert int(c.task.resident(params).state_dict()["1.1.num_batches_tracked"]) == 0


def test_what_fit_returns_shares_no_memory_with_the_model() -> None:
    c = client()
    x = c.task.init()["params"]
    params, _, _ = fit(c, x, config=Training())
    kept = tree.clone(params)
    fit(c, x, config=Training(lr=0.5))
    assert_close(params, kept)


def test_schedules() -> None:
    assert [factor("constant", r, 4) for r in (1, 4)] == [1.0, 1.0]
    assert [factor("linear", r, 4) for r in (1, 2, 4)] == [1.0, 0.75, 0.25]
    assert factor("cosine", 3, 4) == pytest.approx(0.5)
    assert factor("exponential:0.9", 3, 9) == pytest.approx(0.81)
    assert [factor("multistep:2,4:0.1", r, 9) for r in (2, 3, 5)] == pytest.approx([1.0, 0.1, 0.01])


def test_a_warm_up_rises_to_where_the_schedule_begins() -> None:
    assert [factor("constant", r, 8, warmup=3) for r in (1, 2, 3, 4, 8)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [factor("linear", r, 8, warmup=0.5) for r in (1, 4, 5, 7)] == pytest.approx([0.2, 0.8, 1.0, 0.5])
    assert factor("constant", 29, 100, warmup=0.29) == 29 / 30  # 0.29 * 100 is below 29 in floating point
    assert factor("cosine", 4, 6, warmup=1) == pytest.approx(0.5 * (1 + math.cos(math.pi * 2 / 5)))
    assert factor("exponential:0.5", 4, 9, warmup=2) == 0.5
    assert [factor("multistep:4:0.1", r, 9, warmup=1) for r in (1, 2, 5)] == pytest.approx([0.5, 1.0, 0.1])
    config = Training(lr=2.0, schedule="linear", warmup=1)
    assert [config.lr_at(r, 5) for r in (1, 2, 4)] == pytest.approx([1.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, "warmup is -1; it must not be negative"),
        ({"lr": 0.0}, "lr is 0.0; it must be positive"),
        ({"nesterov": True}, "nesterov without momentum"),
        ({"schedule": "cosin"}, "not one of constant, cosine"),
        ({"precision": "int4"}, "choose one of float32, bf16, fp16"),
        ({"local_epochs": -1}, "must not be negative"),
        ({"per_layer": True, "precision": "fp16"}, "use precision=bf16"),
        ({"optimizer_state": "forget"}, "choose one of reset, keep"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**options)


def test_momentum_for_an_optimizer_that_has_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum is SGD's"):
        trained(Training(optimizer="adam", momentum=0.9))
