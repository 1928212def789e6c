"""A gradient seen in a subspace, and an update brought back from it.

    right: R = G B^T        left: R = A G        full: R = A G B^T         update = A^T U B, a missing factor left out

Legend: G_mn gradient, A_rm and B_rn bases (orthonormal rows) of its columns and of its rows, R, U low-rank.  The side
is explicit, chosen from the projection's name and the weight's shape, never guessed from the shape of the low-rank
tensor.

Where the bases come from: `svd` is GaLore's (Zhao et al., ICML 2024, https://arxiv.org/abs/2403.03507).  `power` needs
no decomposition: the bases of the last refresh are almost right, so one step of the block power method on the new
gradient, made orthonormal by Cholesky-QR, follows them at a small part of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lilliput.optim.basis import Dense, haar_basis, orthonormal_rows, singular

Side = Literal["left", "right", "full"]


class Projection(NamedTuple):
    """The bases of a projection: A (r, m) on the left, B (r, n) on the right; None where that side is whole."""

    left: Dense | None
    right: Dense | None


def side(proj_type: str, m: int, n: int) -> Side:
    """Which side of an m x n matrix a projection compresses: `std` and its kin the smaller dimension."""
    if proj_type in ("left", "right", "full"):
        return proj_type  # type: ignore[return-value]
    tall = m >= n
    return "right" if tall != (proj_type == "reverse_std") else "left"


def low_rank_shape(shape: Sequence[int], rank: int, where: Side) -> tuple[int, int]:
    """The shape of R."""
    m, n = shape
    return (rank if where != "right" else m, rank if where != "left" else n)


# The state keeps A as columns (m, r), as GaLore does.


def factor_shapes(shape: Sequence[int], rank: int, where: Side) -> dict[str, tuple[int, int]]:
    """State names and shapes of a projection's factors: P, and P2 for the second one of `full`."""
    m, n = shape
    if where == "full":
        return {"P": (m, rank), "P2": (rank, n)}
    return {"P": (m, rank) if where == "left" else (rank, n)}


def from_factors(P: Tensor, P2: Tensor | None, where: Side) -> Projection:
    """The projection whose factors are stored as P and P2; it shares their memory."""
    left = None if where == "right" else Dense(P.mT)
    right = P if where == "right" else P2
    return Projection(left, None if right is None else Dense(right))


def factors(projection: Projection) -> dict[str, Tensor]:
    """The inverse of `from_factors`."""
    left, right = projection
    stored = [] if left is None else [left.matrix.mT.contiguous()]
    stored += [] if right is None else [right.matrix]
    return dict(zip(("P", "P2"), stored, strict=False))


def _in_columns(rows: Tensor) -> Dense:
    """A basis on the left that lies in memory as the state keeps it, so that products have the same bits from there."""
    return Dense(rows.mT.contiguous().mT)


def svd(G_mn: Tensor, rank: int, where: Side) -> Projection:
    """The leading singular vectors, signs as torch gives them."""
    U_mr, V_rn = singular(G_mn, rank)
    return Projection(
        None if where == "right" else Dense(U_mr.contiguous().mT), None if where == "left" else Dense(V_rn.contiguous())
    )


def gram(G_mn: Tensor, rank: int, where: Side) -> Projection:
    """The same subspace as `svd` from the eigenvectors of the smaller Gram matrix: a fraction of the time."""
    tall = G_mn if G_mn.shape[0] >= G_mn.shape[1] else G_mn.mT
    vectors = torch.linalg.eigh(tall.mT @ tall)[1]
    small_rn = vectors[:, -rank:].flip(1).mT  # eigenvalues ascend
    large = None if where != "full" and (where == "right") == (tall is G_mn) else orthonormal_rows(small_rn @ tall.mT)
    right, left = (small_rn, large) if tall is G_mn else (large, small_rn)
    return Projection(
        None if where == "right" or left is None else _in_columns(left),
        None if where == "left" or right is None else Dense(right.contiguous()),
    )


def power(G_mn: Tensor, old: Projection) -> Projection:
    """One block power step from `old`: its span goes to that of B G^T G (right) or A G G^T (left), both for full."""
    if old.right is None:
        assert old.left is not None
        return Projection(_in_columns(orthonormal_rows((old.left.matrix @ G_mn) @ G_mn.mT)), None)
    Y_mr = old.right.compress(G_mn)
    if old.left is None:
        return Projection(None, Dense(orthonormal_rows(Y_mr.mT @ G_mn)))
    left = orthonormal_rows(Y_mr.mT)
    return Projection(_in_columns(left), Dense(orthonormal_rows(left @ G_mn)))


def haar(shape: Sequence[int], rank: int, where: Side, g: torch.Generator, like: Tensor) -> Projection:
    """A uniformly random subspace, the same on every device for the same generator."""
    m, n = shape
    left = None if where == "right" else _in_columns(haar_basis(rank, m, g, like).matrix)
    return Projection(left, None if where == "left" else haar_basis(rank, n, g, like))


def project(G_mn: Tensor, projection: Projection, dtype: torch.dtype | None = None) -> Tensor:
    """R, in the bases' dtype; the products run in `dtype` (G's own by default) and accumulate in float32 or better."""
    R = G_mn.to(dtype or G_mn.dtype)
    if projection.left is not None:
        R = projection.left.matrix.to(R.dtype) @ R
    if projection.right is not None:
        R = projection.right.to(R).compress(R)
    return R.to(_dtype(projection))


def back(U: Tensor, projection: Projection, dtype: torch.dtype | None = None) -> Tensor:
    """A^T U B, in `dtype` (U's own by default)."""
    U = U.to(dtype or U.dtype)
    if projection.left is not None:
        U = projection.left.matrix.mT.to(U.dtype) @ U
    return U if projection.right is None else projection.right.to(U).expand(U)


def add_back_(
    W_mn: Tensor, U: Tensor, projection: Projection, beta: float, alpha: float, dtype: torch.dtype | None = None
) -> None:
    """W = beta W + alpha A^T U B, in place, without a second m x n tensor when the products run in W's dtype."""
    if dtype not in (None, W_mn.dtype):
        shrink_(W_mn, beta).add_(back(U, projection, dtype), alpha=alpha)
        return
    left, right = projection
    if left is None:
        assert right is not None
        first, second = U, right.matrix
    elif right is None:
        first, second = left.matrix.mT, U
    else:
        first, second = left.matrix.mT.to(U.dtype) @ U, right.matrix
    W_mn.addmm_(first.to(W_mn.dtype), second.to(W_mn.dtype), beta=beta, alpha=alpha)


def shrink_(W: Tensor, keep: float) -> Tensor:
    """W times keep, in place; without a pass over memory for 1."""
    return W if keep == 1.0 else W.mul_(keep)


def turn(new: Projection, old: Projection) -> Projection:
    """The change of coordinates: `project(R, turn(new, old))` is what R, written in `old`, reads in `new`.

    The r x r factors are made, and not R lifted and compressed, because second moments change by their squares.
    """
    left = None if new.left is None or old.left is None else new.left.compress(old.left.matrix).mT
    right = None if new.right is None or old.right is None else old.right.compress(new.right.matrix)
    return Projection(*(None if x is None else Dense(x, orthonormal=False) for x in (left, right)))


def squared(change: Projection) -> Projection:
    """Entry-wise squares: how variances of independent coordinates change under a turn."""
    return Projection(*(None if x is None else Dense(x.matrix.square(), orthonormal=False) for x in change))


def overlap(new: Projection, old: Projection) -> float:
    """The share of `new` that lies in `old`: the mean squared cosine of their principal angles, in [0, 1]."""
    parts = [x.matrix.square().sum() / x.rank for x in turn(new, old) if x is not None]
    return float(torch.stack(parts).mean())


def _dtype(projection: Projection) -> torch.dtype:
    return next(x.matrix.dtype for x in projection if x is not None)
