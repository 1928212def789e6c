"""A gradient seen in a subspace, and an update brought back from it.

    right: R = G B^T        left: R = A^T G        full: R = A^T G B^T         update = A U B, a missing factor left out

Legend: G_mn gradient, A_mr (orthonormal columns), B_rn (orthonormal rows), R, U low-rank.  The side is explicit, chosen
from the projection's name and the weight's shape, never guessed from the shape of the low-rank tensor.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Side = Literal["left", "right", "full"]


class Basis(NamedTuple):
    """The factors of a projection: A (m, r) on the left, B (r, n) on the right; None where that side is whole."""

    left: Tensor | None
    right: Tensor | None


def side(proj_type: str, m: int, n: int) -> Side:
    """Which side of an m x n matrix a projection compresses: `std` and its kin the smaller dimension."""
    if proj_type in ("left", "right", "full"):
        return proj_type  # type: ignore[return-value]
    tall = m >= n
    return "right" if tall != (proj_type == "reverse_std") else "left"


def low_rank_shape(shape: tuple[int, int], rank: int, where: Side) -> tuple[int, int]:
    """The shape of R."""
    m, n = shape
    return (rank if where != "right" else m, rank if where != "left" else n)


def basis_shapes(shape: tuple[int, int], rank: int, where: Side) -> dict[str, tuple[int, int]]:
    """State names and shapes of a projection's factors: P, and P2 for the second one of `full`."""
    m, n = shape
    if where == "full":
        return {"P": (m, rank), "P2": (rank, n)}
    return {"P": (m, rank) if where == "left" else (rank, n)}


def as_basis(P: Tensor, P2: Tensor | None, where: Side) -> Basis:
    """The factors stored as P and P2."""
    return Basis(P, P2) if where == "full" else Basis(P, None) if where == "left" else Basis(None, P)


def factors(basis: Basis) -> dict[str, Tensor]:
    """The inverse of `as_basis`."""
    present = [x for x in basis if x is not None]
    return dict(zip(("P", "P2"), present, strict=False))


def project(G_mn: Tensor, basis: Basis, dtype: torch.dtype | None = None) -> Tensor:
    """R, in the basis' dtype; the products run in `dtype` (G's own by default) and accumulate in float32 or better."""
    R = G_mn.to(dtype or G_mn.dtype)
    if basis.left is not None:
        R = basis.left.to(R.dtype).mT @ R
    if basis.right is not None:
        R = R @ basis.right.to(R.dtype).mT
    return R.to(_dtype(basis))


def back(U: Tensor, basis: Basis, dtype: torch.dtype | None = None) -> Tensor:
    """A U B, in `dtype` (U's own by default)."""
    U = U.to(dtype or U.dtype)
    if basis.left is not None:
        U = basis.left.to(U.dtype) @ U
    return U if basis.right is None else U @ basis.right.to(U.dtype)


def add_back_(
    W_mn: Tensor, U: Tensor, basis: Basis, beta: float, alpha: float, dtype: torch.dtype | None = None
) -> None:
    """W = beta W + alpha A U B, in place, without a second m x n tensor when the products run in W's dtype."""
    if dtype not in (None, W_mn.dtype):
        shrink_(W_mn, beta).add_(back(U, basis, dtype), alpha=alpha)
        return
    if basis.left is not None and basis.right is not None:
        U, basis = basis.left.to(U.dtype) @ U, Basis(None, basis.right)
    first, second = (U, basis.right) if basis.right is not None else (basis.left, U)
    assert first is not None and second is not None
    W_mn.addmm_(first.to(W_mn.dtype), second.to(W_mn.dtype), beta=beta, alpha=alpha)


def shrink_(W: Tensor, keep: float) -> Tensor:
    """W times keep, in place; without a pass over memory for 1."""
    return W if keep == 1.0 else W.mul_(keep)


def turn(new: Basis, old: Basis) -> Basis:
    """The change of coordinates: `project(R, turn(new, old))` is what R, written in `old`, reads in `new`."""
    left = None if new.left is None or old.left is None else old.left.mT @ new.left
    right = None if new.right is None or old.right is None else new.right @ old.right.mT
    return Basis(left, right)


def squared(basis: Basis) -> Basis:
    """Entry-wise squares: how variances of independent coordinates change under a turn."""
    return Basis(*(None if x is None else x.square() for x in basis))


def overlap(new: Basis, old: Basis) -> float:
    """The share of `new` that lies in `old`: the mean squared cosine of their principal angles, in [0, 1]."""
    parts = [x.square().sum() / x.shape[0] for x in turn(new, old) if x is not None]
    return float(torch.stack(parts).mean())


def _dtype(basis: Basis) -> torch.dtype:
    return next(x.dtype for x in basis if x is not None)
