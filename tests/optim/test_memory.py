"""State bytes are the formulas, exactly; q and p are the smaller and the larger side of a matrix, r the rank."""

import pytest
import torch
from torch import nn

from lilliput import optim
from lilliput.optim.options import PROJECTIONS

R = 4
# Elements of the moments of a low-rank gradient of a x b.
MOMENTS = {
    optim.GaLoreAdamW: lambda a, b: 2 * a * b,
    optim.GaLoreLion: lambda a, b: a * b,
    optim.GaLoreAdafactor: lambda a, b: a + b,
}
# Elements of a projection's own moments, P being r x q.
LEARNING = {
    "continuous": lambda r, q: 2 * r * q,
    "continuous_adam8bit": lambda r, q: 2 * r * q,  # below 4096 elements it stays in float32
    "continuous_lion": lambda r, q: r * q,
    "continuous_sgd": lambda r, q: 0,
}


def elements(kind: str, m: int, n: int, moments, learning) -> int:
    q, p = min(m, n), max(m, n)
    if kind == "full":
        return moments(R, R) + R * (m + n)
    whole, compressed = (m, n) if kind == "right" else (n, m) if kind == "left" else (p, q)
    if kind == "reverse_std":
        whole, compressed = q, p
    own = 0 if kind == "seeded" else R * compressed
    return moments(whole, R) + own + learning(R, compressed)


def learning_of(kind: str, m: int, n: int):
    if kind == "continuous_adafactor":  # rows and columns of P as it is stored
        return lambda r, q: r + q
    return LEARNING.get(kind, lambda r, q: 0)


@pytest.mark.parametrize("shape", [(12, 8), (6, 10), (8, 8)])
@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("make", MOMENTS, ids=lambda make: make.__name__)
def test_bytes_are_the_formula(make, kind, shape):
    model = nn.Linear(shape[1], shape[0], bias=False)
    optimizer = make([{"params": [model.weight], "rank": R, "proj_type": kind}], lr=0.01)
    expected = 4 * elements(kind, *shape, MOMENTS[make], learning_of(kind, *shape))
    assert optim.memory(model, optimizer).state == expected  # announced
    for _ in range(2):
        model.weight.grad = torch.randn(shape)
        optimizer.step()
    held = sum(x.nbytes for x in optimizer.state[model.weight].values() if isinstance(x, torch.Tensor))
    assert optim.memory(model, optimizer).state == held == expected


def test_the_formulas_of_the_papers():
    """AdamW over AdamW 2pr + 3qr; P by Lion 2pr + 2qr; by SGD 2pr + qr; Lion over AdamW pr + 3qr."""
    p, q, r = 24, 16, R
    for make, kind, expected in [
        (optim.GaLoreAdamW, "std", 2 * p * r + q * r),
        (optim.GaLoreAdamW, "continuous", 2 * p * r + 3 * q * r),
        (optim.GaLoreAdamW, "continuous_lion", 2 * p * r + 2 * q * r),
        (optim.GaLoreAdamW, "continuous_sgd", 2 * p * r + q * r),
        (optim.GaLoreLion, "continuous", p * r + 3 * q * r),
    ]:
        for shape in ((p, q), (q, p)):
            model = nn.Linear(shape[1], shape[0], bias=False)
            optimizer = make([{"params": [model.weight], "rank": r, "proj_type": kind}], lr=0.01)
            assert optim.memory(model, optimizer).state == 4 * expected


def test_eight_bits_are_one_byte_and_four_per_block():
    """1 + 4/256 bytes for each of two moments of 80 x 64 numbers; P (64 x 72) in float32, its own moments in 8 bits."""
    model = nn.Linear(72, 80, bias=False)
    group = {"params": [model.weight], "rank": 64, "proj_type": "continuous_adam8bit"}
    optimizer = optim.GaLoreAdamW8bit([group], lr=0.01)
    seen, P = 80 * 64, 64 * 72
    assert optim.memory(model, optimizer).state == 2 * (seen + 4 * seen // 256) + 4 * P + 2 * (P + 4 * P // 256)
    plain = optim.GaLoreAdamW8bit(model.parameters(), lr=0.01)
    assert optim.memory(model, plain).state == 2 * (80 * 72 + 4 * -(-80 * 72 // 256))


def test_bfloat16_states_take_two_bytes():
    model = nn.Linear(16, 24, bias=False)
    optimizer = optim.GaLoreAdamW([{"params": [model.weight], "rank": 4}], lr=0.01, states="bf16")
    assert optim.memory(model, optimizer).states == {"exp_avg": 2 * 24 * 4, "exp_avg_sq": 2 * 24 * 4, "P": 4 * 16 * 4}


def test_the_residual_costs_one_number():
    model = nn.Linear(16, 24, bias=False)
    sizes = [
        optim.memory(model, optim.GaLoreAdamW(model.parameters(), rank=4, update=u)).state for u in ("project", "fira")
    ]
    assert sizes[1] - sizes[0] == 4


def test_the_sixty_million_parameter_llama():
    """Its 56 attention and MLP matrices at rank 128: 65.3 MB of state for GaLore, 202.4 for AdamW."""
    shapes = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]
    model = nn.ParameterList([nn.Parameter(torch.empty(s, device="meta")) for s in shapes * 8])
    optimizer = optim.GaLoreAdamW(model.parameters(), lr=0.01, rank=128)
    found = optim.memory(model, optimizer)
    assert round(found.state / 1e6, 1) == 65.3 and round(found.undivided / 1e6, 1) == 202.4
    assert found.gradients == found.parameters == 4 * 25_296_896 and found.largest_gradient == 4 * 512 * 1376
    assert "state P" in str(found) and "65.3" not in str(found).split("state P")[0]
