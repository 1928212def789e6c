"""What the mathematics of projected training says, written out."""

import io
from itertools import pairwise

import pytest
import torch
from torch import nn

from lilliput import optim
from lilliput.core.random import generator
from lilliput.optim import pca, subspace
from lilliput.optim.basis import Dense, orthonormal_rows
from lilliput.optim.projection import Projection, back, factors, from_factors, gram, haar, power, project, side, svd

SHAPES = [(12, 8), (6, 10), (8, 8)]
KINDS = ["std", "reverse_std", "right", "left", "full"]


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decaying(m: int, n: int, seed: int = 0, power: float = 1.0) -> torch.Tensor:
    """A matrix with singular values i^-power."""
    U, V = (torch.linalg.qr(normal(k, min(m, n), seed=seed + i))[0] for i, k in enumerate((m, n)))
    return U * torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -power @ V.mT


def drawn(shape: tuple[int, int], rank: int, where: str, seed: int, dtype=torch.float64) -> Projection:
    return haar(shape, rank, where, torch.Generator().manual_seed(seed), torch.empty(0, dtype=dtype))


def one_step(optimizer, p, grad):
    p.grad = grad.clone()
    before = p.detach().clone()
    optimizer.step()
    return p.detach() - before


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_descent_and_row_space(kind, shape):
    """<G, back(project(G))> = ||R||^2, and what comes back lies in the subspace."""
    G = normal(*shape)
    for projection in (svd(G, 3, side(kind, *shape)), drawn(shape, 3, side(kind, *shape), 1)):
        R = project(G, projection)
        update = back(R, projection)
        torch.testing.assert_close((G * update).sum(), R.square().sum())
        torch.testing.assert_close(back(project(update, projection), projection), update)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gram_basis_spans_what_the_decomposition_spans(kind, shape):
    G, where = decaying(*shape), side(kind, *shape)
    for ours, exact in zip(gram(G, 3, where), svd(G, 3, where), strict=True):
        assert (ours is None) == (exact is None)
        if ours is not None:
            P, Q = (x.expand(x.matrix.mT) for x in (ours, exact))
            torch.testing.assert_close(P, Q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_at_scale_one_is_the_plain_rule_where_the_basis_is_the_identity(kind):
    """Adam is not invariant under rotation, so only P = I gives equality; decay included."""
    p, q = (nn.Parameter(normal(8, 8)) for _ in range(2))
    projected = optim.GaLoreAdamW(
        [{"params": [p], "rank": 8, "scale": 1.0, "proj_type": kind}], lr=0.1, weight_decay=0.1
    )
    plain = torch.optim.AdamW([q], lr=0.1, eps=1e-6, weight_decay=0.1)
    projected.state[p]["P"] = torch.eye(8, dtype=torch.float64)
    if kind == "full":
        projected.state[p]["P2"] = torch.eye(8, dtype=torch.float64)
    for t in range(5):
        grad = normal(8, 8, seed=t + 1)
        one_step(projected, p, grad), one_step(plain, q, grad)
    torch.testing.assert_close(p, q, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_projection_loses_no_gradient(kind, shape):
    """With r = min(m, n) a rule without memory (SGD) is unchanged: back(project(G)) = G."""
    G = normal(*shape)
    projection = svd(G, min(shape), side(kind, *shape))
    torch.testing.assert_close(back(project(G, projection), projection), G)


def test_what_is_not_projected_is_torch_adamw_to_the_bit():
    p, q = (nn.Parameter(normal(7, 5, dtype=torch.float32)) for _ in range(2))
    ours = optim.GaLoreAdamW([p], lr=0.1, eps=1e-8, weight_decay=0.1)
    theirs = torch.optim.AdamW([q], lr=0.1, eps=1e-8, weight_decay=0.1, fused=True)
    for t in range(5):
        grad = normal(7, 5, seed=t, dtype=torch.float32)
        one_step(ours, p, grad), one_step(theirs, q, grad)
    assert torch.equal(p, q)


@pytest.mark.parametrize("guard", [True, False])
def test_the_guard_can_be_taken_off_what_is_not_projected(guard):
    p = nn.Parameter(normal(7, 5))
    optimizer = optim.GaLoreAdamW([p], lr=0.1, guard=guard)
    one_step(optimizer, p, torch.full((7, 5), float("nan"), dtype=torch.float64))
    assert optimizer.param_groups[0]["skipped"] == int(guard) and bool(p.isfinite().all()) == guard


# -- online PCA -------------------------------------------------------------------------------------------------------


def loss(G: torch.Tensor, projection: Projection, orthogonality: float) -> torch.Tensor:
    """The published loss, written as it stands there."""
    Gn = G / G.norm()
    rows = (projection.right or projection.left).matrix
    lost = back(project(Gn, projection), projection) - Gn
    return lost.square().sum() + orthogonality * (rows @ rows.mT - torch.eye(len(rows), dtype=G.dtype)).square().sum()


@pytest.mark.parametrize("orthogonality", [0.0, 0.1])
@pytest.mark.parametrize("where", ["left", "right"])
def test_closed_form_is_autograd(where, orthogonality):
    G, P = normal(12, 9), normal(*((12, 4) if where == "left" else (4, 9)), seed=1).requires_grad_()
    projection = from_factors(P, None, where)
    (expected,) = torch.autograd.grad(loss(G, projection, orthogonality), P)
    with torch.no_grad():
        ours = pca.gradient(G, project(G, projection), projection, G.square().sum(), orthogonality)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("where", ["left", "right"])
def test_the_decomposition_is_the_optimum_of_online_pca(where):
    """The loss there is 1 - sum_{i<=r} s_i^2 / sum s_i^2, its gradient nothing."""
    G = normal(12, 9)
    s2 = torch.linalg.svdvals(G).square()
    best = svd(G, 4, where)
    torch.testing.assert_close(loss(G, best, 0.1), 1 - s2[:4].sum() / s2.sum())
    assert pca.gradient(G, project(G, best), best, G.square().sum(), 0.1).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["continuous", "continuous_sgd", "continuous_adam8bit"])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_on_a_constant_gradient_the_projection_finds_its_top_space(kind, shape):
    G, p = decaying(*shape, power=1.5), nn.Parameter(normal(*shape))
    # 1 / gap is P's learning rate; Adam's steps shrink with a schedule, as in training.
    gap = 5 if kind == "continuous_sgd" else 20
    optimizer = optim.GaLoreAdamW([{"params": [p], "rank": 3, "proj_type": kind, "update_proj_gap": gap}], lr=1e-3)
    optimizer.state[p]["P"] = factors(drawn(shape, 3, side("std", *shape), 5))["P"].clone()
    steps = 6000 if kind == "continuous_sgd" else 1500
    for t in range(steps):
        if kind != "continuous_sgd":
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - t / steps) ** 2
        one_step(optimizer, p, G)
    where = side("std", *shape)
    found, exact = from_factors(optimizer.state[p]["P"], None, where), svd(G, 3, where)
    rows, truth = ((x.right or x.left).matrix for x in (found, exact))
    cosines = torch.linalg.svdvals(orthonormal_rows(rows) @ truth.mT)
    assert (1 - cosines.min().square()).clamp_min(0).sqrt() < 1e-3


@pytest.mark.parametrize("kind", sorted(pca.OPTIMIZERS))
def test_the_first_step_and_zero_gradients_never_move_the_projection(kind):
    p, G = nn.Parameter(normal(12, 8)), normal(12, 8, seed=1)
    optimizer = optim.GaLoreAdamW([{"params": [p], "rank": 3, "proj_type": kind, "update_proj_gap": 5}], lr=0.01)
    one_step(optimizer, p, G)
    first = optimizer.state[p]["P"].clone()
    torch.testing.assert_close(first.mT @ first, (V := svd(G, 3, "right").right.matrix).mT @ V, atol=1e-7, rtol=0)
    one_step(optimizer, p, torch.zeros_like(G))
    assert torch.equal(optimizer.state[p]["P"], first)
    one_step(optimizer, p, normal(12, 8, seed=2))
    assert not torch.equal(optimizer.state[p]["P"], first)


def test_without_a_learning_rate_online_pca_is_galore_with_a_frozen_projection():
    p, q, P = (
        nn.Parameter(normal(12, 8)),
        nn.Parameter(normal(12, 8)),
        drawn((12, 8), 3, "right", 0).right.matrix,
    )
    learning = optim.GaLoreAdamW(
        [{"params": [p], "rank": 3, "proj_type": "continuous_sgd", "update_proj_gap": 10**15}], lr=0.01
    )
    frozen = optim.GaLoreAdamW([{"params": [q], "rank": 3, "proj_type": "std", "update_proj_gap": 10**15}], lr=0.01)
    learning.state[p]["P"], frozen.state[q]["P"] = P.clone(), P.clone()
    for t in range(5):
        one_step(learning, p, normal(12, 8, seed=t)), one_step(frozen, q, normal(12, 8, seed=t))
    torch.testing.assert_close(p, q, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["std", "continuous", "seeded"])
def test_down_and_up_use_the_same_projection(kind):
    """Each step's change lies in the row space of the projection that was stored, or assigned, before the step."""
    p = nn.Parameter(normal(12, 8))
    optimizer = optim.GaLoreAdamW([{"params": [p], "rank": 3, "proj_type": kind, "update_proj_gap": 2}], lr=0.01)
    for t in range(4):
        P = drawn((12, 8), 3, "right", t).right.matrix
        optimizer.state[p]["P"] = P.clone()
        delta = one_step(optimizer, p, normal(12, 8, seed=t))
        torch.testing.assert_close(delta, delta @ P.mT @ P)


# -- Lion -------------------------------------------------------------------------------------------------------------


def test_lion_ignores_scale_and_moves_by_the_rate_or_not_at_all():
    results = []
    for scale in (0.1, 1.0):
        p = nn.Parameter(normal(12, 8))
        optimizer = optim.GaLoreLion([{"params": [p], "rank": 3, "scale": scale}], lr=0.01)
        for t in range(4):
            delta = one_step(optimizer, p, normal(12, 8, seed=t))
            assert ((delta.abs() - 0.01).abs() < 1e-12).logical_or(delta == 0).all()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("make", "compat"), [(optim.GaLoreLion, "official"), (optim.GaLoreLion, None), (optim.Lion, None)]
)
def test_the_order_of_weight_decay(make, compat):
    """After the step in the published program, before it otherwise: with a momentum but no gradient the two differ."""
    p = nn.Parameter(torch.full((4, 4), 2.0, dtype=torch.float64))
    optimizer = make([p], lr=0.1, weight_decay=0.5, **({"compat": compat} if compat else {}))
    one_step(optimizer, p, torch.ones(4, 4, dtype=torch.float64))
    w = p[0, 0].item()
    one_step(optimizer, p, torch.zeros(4, 4, dtype=torch.float64))
    expected = (w - 0.1) * 0.95 if compat else w * 0.95 - 0.1
    torch.testing.assert_close(p.detach(), torch.full_like(p, expected))


# -- refreshes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [optim.GaLoreAdamW, optim.GaLoreAdafactor, optim.GaLoreLion])
@pytest.mark.parametrize("kind", ["right", "left", "full"])
def test_rotated_moments_make_signs_of_the_basis_irrelevant(kind, make):
    """Flip rows of P at a refresh: with rotation nothing changes; without, the moments' signs are wrong."""
    changed = {}
    for rotate in (True, False):
        ends = []
        for flip in (False, True):
            p = nn.Parameter(normal(12, 8))
            extra = {"beta1": 0.9} if make is optim.GaLoreAdafactor else {}
            group = {
                "params": [p],
                "rank": 4,
                "proj_type": kind,
                "update_proj_gap": 3,
                "rotate": rotate,
                "refresh": "svd",
            }
            optimizer = make([group], lr=0.01, **extra)
            for t in range(5):
                if t == 3 and flip:
                    _flip_next_refresh(optimizer)
                one_step(optimizer, p, normal(12, 8, seed=9) + 0.5 * normal(12, 8, seed=t))
            ends.append(p.detach())
        changed[rotate] = float((ends[0] - ends[1]).abs().max())
    assert changed[True] < 1e-10 < 1e-5 < changed[False]


def _flip_next_refresh(optimizer) -> None:
    def flipped(G, rank, where):
        subspace.svd = svd
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=G.dtype)
        return Projection(*(None if x is None else Dense(x.matrix * signs[:, None]) for x in svd(G, rank, where)))

    subspace.svd = flipped


def test_the_power_refresh_keeps_the_energy_of_the_decomposition():
    """Gradients that share large directions, as in training: one warm step captures 99.5 % of what an SVD does."""
    base, old = decaying(160, 96, power=0.7), None
    for t in range(4):
        G = base + 0.02 * normal(160, 96, seed=t) / 10
        old = gram(G, 24, "right") if old is None else power(G, old)
        best = svd(G, 24, "right")
        assert project(G, old).square().sum() > 0.995 * project(G, best).square().sum()


@pytest.mark.parametrize("rank_of_G", [1, 3, 24])
def test_a_basis_is_orthonormal_whatever_the_gradient(rank_of_G):
    G = (normal(40, rank_of_G) @ normal(rank_of_G, 30, seed=1)).float()
    old = drawn((40, 30), 8, "full", 0, G.dtype)
    for new in (power(G, old), power(G, Projection(None, old.right)), power(G, Projection(old.left, None))):
        for basis in new:
            if basis is not None:
                rows = basis.matrix
                torch.testing.assert_close(rows @ rows.mT, torch.eye(8), atol=1e-4, rtol=0)


def test_lazy_refresh_doubles_the_gap_while_the_subspace_stays():
    p, G = nn.Parameter(normal(12, 8)), decaying(12, 8)
    optimizer = optim.GaLoreAdamW(
        [{"params": [p], "rank": 3, "update_proj_gap": 2, "lazy": 0.4, "refresh": "svd"}], lr=0.01
    )
    due = []
    for t in range(15):
        one_step(optimizer, p, G + 0.01 * normal(12, 8, seed=t))
        due.append(optimizer.state[p]["due"])
    assert sorted(set(due)) == [2, 2 + 4, 6 + 8, 14 + 16]


def test_random_subspaces_average_to_a_scaled_identity():
    """E[P^T P] = (r / n) I over independent seeds."""
    n, r, draws = 6, 2, 4000
    total = torch.zeros(n, n, dtype=torch.float64)
    for seed in range(draws):
        P = haar((n, n), r, "right", generator("projection", 0, 0, seed), total).right.matrix
        total += P.mT @ P
    assert (total / draws - r / n * torch.eye(n, dtype=torch.float64)).abs().max() < 0.02  # 5 sigma of the mean


def test_seeded_projections_store_nothing_and_change_with_the_gap():
    p = nn.Parameter(normal(12, 8))
    optimizer = optim.GaLoreAdamW([{"params": [p], "rank": 3, "proj_type": "seeded", "update_proj_gap": 2}], lr=0.01)
    spans = []
    for t in range(4):
        delta = one_step(optimizer, p, normal(12, 8, seed=t))
        assert "P" not in optimizer.state[p]
        spans.append(torch.linalg.svd(delta)[2][:3])
    overlaps = [float(torch.linalg.matrix_norm(a @ b.mT) ** 2 / 3) for a, b in pairwise(spans)]
    assert overlaps[0] > 1 - 1e-9 and overlaps[2] > 1 - 1e-9 and overlaps[1] < 0.9


# -- precision and checkpoints ----------------------------------------------------------------------------------------


def test_a_bf16_run_keeps_small_steps_of_its_float32_projection():
    """1000 steps of P at a rate of 1/200: in bfloat16 they would be below its resolution."""
    starts, finals = [], []
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.zeros(24, 16, dtype=dtype))
        optimizer = optim.GaLoreAdamW([{"params": [p], "rank": 4, "proj_type": "continuous_sgd"}], lr=1e-3)
        for t in range(1000):
            one_step(optimizer, p, (decaying(24, 16) + 0.02 * normal(24, 16, seed=t)).to(dtype))
            if t == 0:
                starts.append(optimizer.state[p]["P"].clone())
        finals.append(optimizer.state[p]["P"])
    exact, low = finals
    assert low.dtype == torch.float32
    assert (low - exact).norm() < 0.1 * (exact - starts[0]).norm()


def test_moments_in_bfloat16_decay_instead_of_freezing():
    """b2 = 0.999 lies below bfloat16's resolution; the dithered second moment still follows the exact one."""
    p, q = (nn.Parameter(torch.zeros(64, 64)) for _ in range(2))
    low = optim.GaLoreAdamW([p], lr=1e-3, states="bf16")
    exact = optim.GaLoreAdamW([q], lr=1e-3)
    for t in range(600):
        grad = normal(64, 64, seed=t, dtype=torch.float32) * (1.0 if t < 100 else 0.01)
        one_step(low, p, grad), one_step(exact, q, grad)
    v, truth = low.state[p]["exp_avg_sq"].float().mean(), exact.state[q]["exp_avg_sq"].mean()
    assert abs(float(v / truth) - 1) < 0.02


def test_checkpoints_load_with_weights_only_and_move_between_devices():
    p = nn.Parameter(normal(12, 8).bfloat16())
    optimizer = optim.GaLoreAdamW8bit([{"params": [p], "rank": 3, "proj_type": "continuous_adam8bit"}], lr=0.01)
    one_step(optimizer, p, normal(12, 8).bfloat16())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    moved = optim.GaLoreAdamW8bit([{"params": [p], "rank": 3, "proj_type": "continuous_adam8bit"}], lr=0.01)
    moved.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    for name, x in optimizer.state[p].items():
        y = moved.state[p][name]
        assert (x.dtype == y.dtype and torch.equal(x, y)) if isinstance(x, torch.Tensor) else x == y


def test_state_follows_a_model_to_another_device():
    p = nn.Parameter(normal(12, 8))
    optimizer = optim.GaLoreAdamW([{"params": [p], "rank": 3}], lr=0.01)
    one_step(optimizer, p, normal(12, 8))
    moved = nn.Parameter(torch.empty(12, 8, dtype=p.dtype, device="meta"))
    optimizer.state[moved] = optimizer.state.pop(p)
    state = optimizer.ready(moved, optimizer.param_groups[0])
    assert {x.device.type for x in state.values() if isinstance(x, torch.Tensor)} == {"meta"} and state["step"] == 1
