"""What is made again has the gradients of what was made first, once and twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.lean.formulas import GELU, LAYER_NORM, RMS_NORM, SWIGLU, Formula
from lilliput.lean.remake import product, remade

CASES = {  # formula, shapes of the sources, options
    "rms_norm": (RMS_NORM, [(2, 3, 5), (5,)], (1e-6,)),
    "swiglu": (SWIGLU, [(2, 3, 5), (2, 3, 5)], ()),
    "gelu": (GELU, [(2, 3, 5)], ("none",)),
    "gelu_tanh": (GELU, [(2, 3, 5)], ("tanh",)),
    "layer_norm": (LAYER_NORM, [(2, 3, 5), (5,), (5,)], (1e-5,)),
}


def sources(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("case", CASES)
def test_cheap_results(case: str) -> None:
    formula, shapes, options = CASES[case]
    assert torch.autograd.gradcheck(lambda *x: remade(formula, *x, options=options), sources(shapes))
    assert torch.autograd.gradgradcheck(lambda *x: remade(formula, *x, options=options), sources(shapes))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_cheap_results(case: str, transposed: bool) -> None:
    formula, shapes, options = CASES[case]
    inputs = [*sources(shapes), weight(5, 4) if transposed else weight(4, 5), weight(4)]

    def run(*x: Tensor) -> Tensor:
        out = product(remade(formula, *x[:-2], options=options), x[-2], x[-1], transposed)
        assert out is not None
        return out

    plain = F.linear(formula.make(*inputs[:-2], *options), inputs[-2].mT if transposed else inputs[-2], inputs[-1])
    torch.testing.assert_close(run(*inputs), plain)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_source_has_no_gradient(frozen: int) -> None:
    inputs = sources([(2, 5), (5,)])
    inputs[frozen].requires_grad_(False)
    remade(RMS_NORM, *inputs, options=(1e-6,)).sum().backward()
    assert [x.grad is None for x in inputs] == [i == frozen for i in range(2)]


def test_no_recipe_where_none_would_hold_or_help() -> None:
    gate, up = sources([(2, 5), (2, 5)])
    W = weight(4, 5)
    assert product(gate, W, None) is None  # nothing made it
    written = remade(SWIGLU, gate, up)
    assert product(written, W, None) is not None
    written.mul_(2)
    assert product(written, W, None) is None
    assert product(remade(SWIGLU, gate, up), W.detach(), None) is None  # a frozen weight reads no input
    with torch.no_grad():
        assert product(remade(SWIGLU, gate, up), W, None) is None


def test_a_formula_is_evaluated_again_only_for_the_backward_pass() -> None:
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(x)
        return 2 * x

    (x,) = sources([(3, 5)])
    loss = product(remade(Formula(double), x), weight(4, 5), None).sum()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 3  # for the gradient of the weight and for its own
