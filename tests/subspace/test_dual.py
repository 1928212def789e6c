"""Dual variables: what a change of basis keeps, and what a round adds."""

from __future__ import annotations

import pytest
import torch

from lilliput.subspace import Dense, rotated, seeded_basis
from lilliput.subspace.dual import learnt, move_, whole, within


@pytest.mark.parametrize("projection", ["cd", "ss", "rd"])
def test_a_dual_in_the_same_span_means_the_same_afterwards(projection: str) -> None:
    old = seeded_basis(projection, 4, 9, 0)
    turn, _ = torch.linalg.qr(torch.randn(4, 4))
    new = Dense(turn @ old.dense(), orthonormal=projection != "rd")
    dual = torch.randn(5, 4)
    torch.testing.assert_close(rotated(dual, old, new) @ new.dense(), dual @ old.dense(), atol=1e-5, rtol=0)


def test_a_change_between_orthonormal_bases_is_their_product() -> None:
    old, new, dual = seeded_basis("ss", 4, 9, 0), seeded_basis("ss", 4, 9, 1), torch.randn(5, 4)
    torch.testing.assert_close(rotated(dual, old, new), dual @ old.dense() @ new.dense().T)


def test_a_change_of_coordinates_is_a_signed_partial_permutation() -> None:
    old, new = seeded_basis("cd", 4, 9, 0), seeded_basis("cd", 4, 9, 1)
    factor = rotated(torch.eye(4), old, new)
    assert set(factor.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert (factor.abs().sum(0) <= 1).all() and (factor.abs().sum(1) <= 1).all()


@pytest.mark.parametrize("of_b", [False, True])
@pytest.mark.parametrize("projection", ["cd", "ss", "rd"])
def test_in_full_size_a_dual_loses_nothing(projection: str, of_b: bool) -> None:
    basis, dual = seeded_basis(projection, 4, 9, 0, dtype=torch.double), torch.randn(2, 5, 4).double()
    torch.testing.assert_close(within(whole(dual, basis, of_b), basis, of_b), dual)


@pytest.mark.parametrize("full", [False, True])
def test_the_duals_of_all_clients_sum_to_what_they_did_before(full: bool) -> None:
    """Of a client that took no step too, which counts as if its own gradient were zero."""
    basis = seeded_basis("ss", 4, 9, 0, dtype=torch.double)
    duals = [torch.randn(5, 9 if full else 4).double() for _ in range(3)]
    total = sum(duals, torch.zeros(()))
    short = [within(mu, basis) if full else mu for mu in duals]
    gradients = [torch.randn(5, 4).double(), torch.randn(5, 4).double(), None]
    us = [learnt(g, mu) for g, mu in zip(gradients, short, strict=True)]
    assert torch.equal(us[2], -short[2])
    for mu, u in zip(duals, us, strict=True):
        move_(mu, u, sum(us, torch.zeros(())) / 3, basis if full else None)
    torch.testing.assert_close(sum(duals, torch.zeros(())), total)
