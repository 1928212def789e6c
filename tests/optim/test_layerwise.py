"""Updates inside the backward pass equal updates after it, with one dense gradient alive at a time."""

import pytest
import torch
from torch import nn

from lilliput import optim

OPTIONS = [
    {"proj_type": "std"},
    {"proj_type": "full"},
    {"proj_type": "continuous"},
    {"proj_type": "seeded", "rotate": True},
    {"proj_type": "std", "update": "fira"},
    {"proj_type": "left", "rotate": True, "lazy": 0.4},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))


def build(options, make=optim.GaLoreAdamW):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 5)).double()
    groups = optim.param_groups(model, rank=3, update_proj_gap=2, **options)
    return model, make(groups, lr=0.01, weight_decay=0.1)


def batches(count=6, size=8):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(size, 12, generator=generator).double(), torch.randn(size, 5, generator=generator).double())
            for _ in range(count)]  # fmt: skip


def loss(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def train_flat(options, clip=None):
    model, optimizer = build(options)
    for batch in batches():
        optimizer.zero_grad()
        loss(model, batch).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model, optimizer


def same(a, b, tolerance=1e-12):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=tolerance, rtol=0)


@every_option
def test_hooks_equal_the_flat_step(options):
    flat, _ = train_flat(options)
    model, optimizer = build(options)
    optim.per_layer(optimizer)
    for batch in batches():
        loss(model, batch).backward()
    same(flat, model)


@every_option
def test_micro_batches_equal_one_big_batch(options):
    """Linear in the gradient while the subspace stays, and dense when a new one is due."""
    flat, _ = train_flat(options)
    model, optimizer = build(options)
    optim.per_layer(optimizer, accumulate=4)
    for x, y in batches():
        for part in zip(x.chunk(4), y.chunk(4), strict=True):
            (loss(model, part) / 4).backward()
    same(flat, model, 1e-9)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_gradients_in_one_memory_are_changed_one_by_one(clip):
    """Those of views that are added lie in one memory; as the sum of the weights themselves they do not."""

    def trained(views):
        torch.manual_seed(0)
        a, b = (nn.Parameter(torch.randn(48, dtype=torch.float64)) for _ in range(2))
        optimizer = optim.GaLoreAdamW([a, b], lr=0.01, eps=1e-2)
        layers = optim.per_layer(optimizer, accumulate=2, clip=clip)
        for x, _ in batches():
            for part in x.chunk(2):
                w = a.view(8, 6) + b.view(8, 6) if views else (a + b).view(8, 6)
                (part[:, :8] @ w).square().mean().backward()
        layers.complete()
        return a, b

    for x, y in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


def test_one_dense_gradient_lives_at_a_time():
    model, optimizer = build({"proj_type": "std"})
    alive = []
    projected = optimizer.param_groups[0]["params"]
    for p in model.parameters():  # these hooks run first: each sees its own gradient, not yet freed
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    optim.per_layer(optimizer)
    for batch in batches():
        loss(model, batch).backward()
    assert max(alive) == 1 and all(p.grad is None for p in model.parameters()) and len(projected) == 3


def test_compressed_sums_free_the_dense_gradients_between_micro_batches():
    model, optimizer = build({"proj_type": "std"})
    layers = optim.per_layer(optimizer, accumulate=2)
    held = []
    for x, y in batches():
        for part in zip(x.chunk(2), y.chunk(2), strict=True):
            (loss(model, part) / 2).backward()
            held.append([p.grad is not None for p in optimizer.param_groups[0]["params"]])
    # Steps 0, 2 and 4 renew the subspace: dense after their first half; the others are compressed.
    assert [any(h) for h in held] == [True, False, False, False] * 3
    layers.remove()


def test_global_clipping_equals_the_flat_one_at_the_price_of_a_second_pass():
    flat, _ = train_flat({"proj_type": "std"}, clip=0.05)
    model, optimizer = build({"proj_type": "std"})
    layers = optim.per_layer(optimizer, clip=0.05, by="global")
    for batch in batches():
        with layers.measuring():
            loss(model, batch).backward()
        loss(model, batch).backward()
    same(flat, model)


def test_clipping_by_parameter_bounds_what_the_subspace_sees():
    """SGD-like reading: with b1 = 0 the first moment after a step is the clipped gradient itself."""
    model, _ = build({"proj_type": "std"})
    optimizer = optim.GaLoreAdamW(optim.param_groups(model, rank=3), lr=0.01, betas=(0.0, 0.9))
    optim.per_layer(optimizer, clip=1e-3)
    loss(model, batches()[0]).backward()
    norms = [optimizer.state[p]["exp_avg"].norm() for p in model.parameters()]
    torch.testing.assert_close(torch.stack(norms), torch.full((6,), 1e-3, dtype=torch.float64), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"by": "global"}, "would do nothing"),
        ({"by": "global", "clip": 1.0, "accumulate": 2}, "needs all of them at once"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"by": "layer"}, "by 'layer' is unknown"),
    ],
)
def test_combinations_that_do_nothing_are_refused(arguments, words):
    _, optimizer = build({"proj_type": "std"})
    with pytest.raises(ValueError, match=words):
        optim.per_layer(optimizer, **arguments)


def test_a_foreign_optimizer_and_a_second_hooking_are_refused():
    model, optimizer = build({"proj_type": "std"})
    with pytest.raises(ValueError, match="which AdamW cannot; use one of lilliput"):
        optim.per_layer(torch.optim.AdamW(model.parameters()))
    layers = optim.per_layer(optimizer)
    with pytest.raises(ValueError, match="updated per layer already"):
        optim.per_layer(optimizer)
    layers.remove()
    optim.per_layer(optimizer)


def test_frozen_parameters_are_left_out():
    model, optimizer = build({"proj_type": "std"})
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optim.per_layer(optimizer)
    loss(model, batches()[0]).backward()
    assert torch.equal(model[0].weight, before) and model[0].weight not in optimizer.state
    assert optimizer.state[model[2].weight]["step"] == 1


class Exits(nn.Module):
    """Two heads, of which a pass may use one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.early, self.late = nn.Linear(12, 16), nn.Linear(16, 5), nn.Linear(16, 5)

    def forward(self, x, early):
        return (self.early if early else self.late)(self.first(x).tanh())


@pytest.mark.parametrize("first", [True, False], ids=["in the first pass", "in the last pass"])
def test_a_head_that_some_passes_do_not_use_steps_on_what_it_got(first):
    """Equals gradients that accumulate in .grad and an ordinary step; a head without any gradient is left alone."""
    ends = []
    for per_layer in (True, False):
        model = Exits().double()
        optimizer = optim.GaLoreAdamW(optim.param_groups(model, rank=3), lr=0.01, weight_decay=0.1)
        if per_layer:
            optim.per_layer(optimizer, accumulate=2)
        for step, (x, y) in enumerate(batches()):
            for number in range(2):
                early = step % 3 > 0 and (number == 0) == first
                nn.functional.mse_loss(model(x, early), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model)
        assert optimizer.state[model.early.weight]["step"] == 4
    same(*ends)


def test_a_step_that_was_left_incomplete_is_said():
    model = Exits().double()
    optimizer = optim.GaLoreAdamW(optim.param_groups(model, rank=3), lr=0.01)
    optim.per_layer(optimizer, accumulate=2)
    x, _ = batches()[0]
    for early in (True, False):
        model(x, early).sum().backward()
    with pytest.raises(RuntimeError, match="2 parameters had no gradient in the last pass of a step: call"):
        model(x, True).sum().backward()


def test_global_clipping_without_a_measured_norm_is_refused():
    model, optimizer = build({"proj_type": "std"})
    optim.per_layer(optimizer, clip=1.0, by="global")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="measuring"):
            loss(model, batches()[0]).backward()


def test_a_broken_gradient_is_skipped_and_counted_in_hooks_too():
    model, optimizer = build({"proj_type": "std"})
    optim.per_layer(optimizer)
    x, y = batches()[0]
    loss(model, (x * float("nan"), y)).backward()
    assert sum(group["skipped"] for group in optimizer.param_groups) == 6
    assert all(p.isfinite().all() for p in model.parameters())
