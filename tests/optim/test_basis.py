"""Bases: orthonormal, unbiased, the same for whoever has the seed."""

from __future__ import annotations

import pytest
import torch

from lilliput.optim.basis import Columns, leading, seeded_basis
from lilliput.optim.projection import svd


@pytest.mark.parametrize("projection", ["cd", "ss", "idx"])
def test_rows_are_orthonormal(projection: str) -> None:
    rank = 12 if projection == "idx" else 5
    p = seeded_basis(projection, rank, 12, 0, "layer", 3).dense()
    torch.testing.assert_close(p @ p.T, torch.eye(rank), atol=1e-6, rtol=0)


@pytest.mark.parametrize("projection", ["cd", "rd", "ss"])
def test_projection_is_unbiased_up_to_its_share(projection: str) -> None:
    draws, rank, width = 10_000, 2, 6
    mean = sum(p.T @ p for i in range(draws) for p in [seeded_basis(projection, rank, width, i).dense()]) / draws
    # The entries' standard error is below sqrt(2 / width) / sqrt(draws) * rank / width ~ 0.002.
    torch.testing.assert_close(mean, rank / width * torch.eye(width), atol=0.012, rtol=0)


@pytest.mark.parametrize("projection", ["cd", "rd", "ss"])
def test_the_labels_decide_a_basis(projection: str) -> None:
    one, same, other = (seeded_basis(projection, 3, 8, 0, layer, 1).dense() for layer in ("a", "a", "b"))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_coordinates_gather_and_scatter() -> None:
    basis = seeded_basis("cd", 3, 8, 0)
    p, x, z = basis.dense(), torch.randn(4, 8), torch.randn(4, 3)
    assert isinstance(basis, Columns)
    assert torch.equal(basis.compress(x), x @ p.T)
    assert torch.equal(basis.expand(z), z @ p)
    assert torch.equal(basis.added(x, z), x + z @ p)
    assert p.abs().sum() == 3 and (p.abs().sum(1) == 1).all()


def test_leading_directions_of_a_sketch_are_the_gradients() -> None:
    u, v = torch.linalg.qr(torch.randn(40, 3))[0], torch.linalg.qr(torch.randn(12, 3))[0]
    gradient = u @ torch.diag(torch.tensor([9.0, 4.0, 2.0])) @ v.T
    found = leading(torch.randn(11, 40) @ gradient, 3).dense()
    torch.testing.assert_close(found.T @ found, v @ v.T, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="has no 5 singular vectors"):
        leading(torch.randn(4, 12), 5)


def test_layers_and_optimizers_find_the_same_subspace_of_a_gradient() -> None:
    gradient = torch.randn(12, 7).double()
    right = svd(gradient, 3, "right").right
    assert right is not None and torch.equal(leading(gradient, 3).dense(), right.dense())


def test_a_basis_that_is_not_orthonormal_works_in_half_precision() -> None:
    """Models of bfloat16 weights have such bases under `rd`, and torch no solver for them."""
    wide = seeded_basis("rd", 4, 9, 0)
    g, x = torch.randn(5, 4), torch.randn(5, 9)
    low = wide.to(torch.empty((), dtype=torch.bfloat16))
    for ours, exact in (
        (low.lift(g.bfloat16()), wide.lift(g)),
        (low.coordinates(x.bfloat16()), wide.coordinates(x)),
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - exact).norm() < 0.1 * exact.norm()


def test_what_has_no_seed_or_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match="'svd' cannot be made from a seed"):
        seeded_basis("svd", 2, 8, 0)
    with pytest.raises(ValueError, match="needs rank=8, not 2"):
        seeded_basis("idx", 2, 8, 0)
