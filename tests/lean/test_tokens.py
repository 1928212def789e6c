"""Cross-entropy in chunks is torch's, its gradients included, however often they are asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.lean import cross_entropy

TOKENS, WIDTH, CLASSES = 11, 5, 7


def example(dtype: torch.dtype = torch.float64, biased: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((TOKENS, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    )
    labels = torch.randint(CLASSES, (TOKENS,), generator=generator)
    labels[::4] = -100
    return hidden, weight, labels, bias if biased else None


def expected(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), labels)


@pytest.mark.parametrize("tokens", [1, 4, None])
@pytest.mark.parametrize("biased", [True, False])
def test_value_and_gradients(tokens: int | None, biased: bool) -> None:
    hidden, weight, labels, bias = example(biased=biased)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    reference = 3 * expected(hidden, weight, labels, bias)
    loss = 3 * cross_entropy(hidden, weight, labels, bias, tokens=tokens)
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(reference, inputs))


def test_second_derivatives() -> None:
    hidden, weight, labels, bias = example()
    torch.autograd.gradcheck(lambda *x: cross_entropy(x[0], x[1], labels, x[2], tokens=4), (hidden, weight, bias))
    torch.autograd.gradgradcheck(lambda *x: cross_entropy(x[0], x[1], labels, x[2], tokens=4), (hidden, weight, bias))


def test_gradients_may_be_asked_for_twice() -> None:
    hidden, weight, labels, bias = example()
    loss = cross_entropy(hidden, weight, labels, bias)
    first = torch.autograd.grad(2 * loss, (hidden, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    torch.testing.assert_close(second, first, rtol=1e-15, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(kept, first, strict=True))


def test_axes_before_the_last_and_frozen_weights() -> None:
    hidden, weight, labels, bias = example()
    weight.requires_grad_(False)
    three = hidden.detach().view(1, TOKENS, WIDTH).requires_grad_()
    cross_entropy(three, weight, labels.view(1, TOKENS), bias).backward()
    expected(hidden, weight, labels, bias).backward()
    torch.testing.assert_close(three.grad, hidden.grad.view_as(three))
    assert weight.grad is None


def test_logits_of_any_size_are_safe() -> None:
    hidden, weight, labels, _ = example(torch.float32)
    for scale in (1e-30, 1e4, 1e30):
        torch.testing.assert_close(
            cross_entropy(hidden * scale, weight, labels), expected(hidden * scale, weight, labels, None)
        )


def test_no_label_that_counts_is_nan_without_spoiling_gradients() -> None:
    hidden, weight, labels, bias = example()
    loss = cross_entropy(hidden, weight, torch.full_like(labels, -100), bias)
    assert loss.isnan() and expected(hidden, weight, torch.full_like(labels, -100), bias).isnan()
    assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight, bias)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_torch(dtype: torch.dtype) -> None:
    exact = example()
    truth = torch.autograd.grad(expected(*exact), (exact[0], exact[1]))
    hidden, weight, labels, bias = example(dtype)

    def error(loss: Tensor) -> list[float]:
        grads = torch.autograd.grad(loss, (hidden, weight))
        return [float((g.double() - t).norm() / t.norm()) for g, t in zip(grads, truth, strict=True)]

    stock = error(F.cross_entropy(F.linear(hidden, weight, bias).float(), labels))
    ours = error(cross_entropy(hidden, weight, labels, bias, tokens=4))
    assert all(a < 1.5 * b for a, b in zip(ours, stock, strict=True))


def test_labels_must_fit() -> None:
    hidden, weight, labels, _ = example()
    with pytest.raises(ValueError, match=r"labels \[10\].*hidden states \[11, 5\]"):
        cross_entropy(hidden, weight, labels[1:])
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy(hidden, weight, labels + CLASSES)
