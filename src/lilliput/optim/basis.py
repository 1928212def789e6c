"""The rows of P (rank x width) that span a subspace, and where they come from.

A layer in a subspace trains b in W = x + b P; an optimizer keeps the moments of G P^T.  A basis comes from a seed
(`seeded_basis`, `haar_basis`), so that it costs nothing on the wire, or from a gradient (`leading`, and for optimizers
`projection.svd`, `gram` and `power`).  Coordinates (`cd`, `idx`) are columns and signs: their products gather and
scatter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.core.random import generator

ORTHONORMAL = 1e-5  # the largest entry of P P^T - I that `orthonormal_rows` lets pass


@dataclass(frozen=True, eq=False)
class Columns:
    """Signed rows of the identity.

    index: distinct columns, int64 [rank]; sign: +1 or -1, [rank]; width: columns in all.
    """

    index: Tensor
    sign: Tensor
    width: int

    @property
    def rank(self) -> int:
        return len(self.index)

    def to(self, like: Tensor) -> Columns:
        """On the device and in the type of a tensor."""
        return Columns(self.index.to(like.device), self.sign.to(like), self.width)

    def dense(self) -> Tensor:
        """P itself [rank, width]."""
        return self.expand(torch.eye(self.rank, dtype=self.sign.dtype, device=self.sign.device))

    def compress(self, x: Tensor) -> Tensor:
        """x P^T: [..., width] -> [..., rank]."""
        return x.index_select(-1, self.index) * self.sign

    def expand(self, z: Tensor) -> Tensor:
        """z P: [..., rank] -> [..., width]."""
        return z.new_zeros(*z.shape[:-1], self.width).index_copy_(-1, self.index, z * self.sign)

    def coordinates(self, x: Tensor) -> Tensor:
        """The z whose z P is nearest to x."""
        return self.compress(x)

    def lift(self, g: Tensor) -> Tensor:
        """The smallest gradient x whose x P^T is g: [..., rank] -> [..., width]."""
        return self.expand(g)

    def added(self, x: Tensor, z: Tensor) -> Tensor:
        """x + z P, new: x [..., width], z [..., rank]."""
        return x.index_add(-1, self.index, (z * self.sign).to(x.dtype))


@dataclass(frozen=True, eq=False)
class Dense:
    """Any rows.

    matrix: P [rank, width]; orthonormal: whether P P^T = I, which saves a solve.
    """

    matrix: Tensor
    orthonormal: bool = True

    @property
    def rank(self) -> int:
        return self.matrix.shape[0]

    @property
    def width(self) -> int:
        return self.matrix.shape[1]

    def to(self, like: Tensor) -> Dense:
        """On the device and in the type of a tensor."""
        return Dense(self.matrix.to(like), self.orthonormal)

    def dense(self) -> Tensor:
        """P itself [rank, width]."""
        return self.matrix

    def compress(self, x: Tensor) -> Tensor:
        """x P^T: [..., width] -> [..., rank]."""
        return x @ self.matrix.T

    def expand(self, z: Tensor) -> Tensor:
        """z P: [..., rank] -> [..., width]."""
        return z @ self.matrix

    def coordinates(self, x: Tensor) -> Tensor:
        """The z whose z P is nearest to x."""
        z = self.compress(x)
        return z if self.orthonormal else self._over_gram(z)

    def lift(self, g: Tensor) -> Tensor:
        """The smallest gradient x whose x P^T is g: [..., rank] -> [..., width]."""
        return self.expand(g if self.orthonormal else self._over_gram(g))

    def _over_gram(self, z: Tensor) -> Tensor:
        """z (P P^T)^-1, solved in float32 or better: torch has no solver for half precision."""
        rows = self.matrix.to(torch.promote_types(self.matrix.dtype, torch.float32))
        return torch.linalg.solve(rows @ rows.T, z.to(rows.dtype), left=False).to(z.dtype)

    def added(self, x: Tensor, z: Tensor) -> Tensor:
        """x + z P, new: x [..., width], z [..., rank]."""
        return torch.addmm(x.reshape(-1, self.width), z.reshape(-1, self.rank), self.matrix).view(x.shape)


Basis = Columns | Dense


# The generators, by name: (rank, width, generator) -> basis.


def _cd(rank: int, width: int, g: torch.Generator) -> Basis:
    sign = torch.randint(0, 2, (rank,), generator=g).mul_(2).sub_(1).float()
    return Columns(torch.randperm(width, generator=g)[:rank].clone(), sign, width)


def _rd(rank: int, width: int, g: torch.Generator) -> Basis:
    return Dense(torch.randn(rank, width, generator=g) / width**0.5, orthonormal=False)


def _ss(rank: int, width: int, g: torch.Generator) -> Basis:
    # The Q of a Gaussian matrix is Haar-distributed once the signs of R's diagonal are fixed.
    q, r = torch.linalg.qr(torch.randn(width, rank, generator=g).double())
    return Dense((q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T.contiguous())


def _idx(rank: int, width: int, g: torch.Generator) -> Basis:
    if rank != width:
        raise ValueError(f"projection=idx is the identity: it needs rank={width}, not {rank}; use rank=1.0 or cd")
    return Columns(torch.arange(width), torch.ones(width), width)


SEEDED: dict[str, Callable[[int, int, torch.Generator], Basis]] = {"cd": _cd, "rd": _rd, "ss": _ss, "idx": _idx}
PROJECTIONS = (*SEEDED, "svd")
OVERSAMPLING = 8  # rows of a sketch beyond the rank (Halko et al., 2011, sec. 4.2)


def seeded_basis(name: str, rank: int, width: int, *labels: object, dtype: torch.dtype = torch.float32) -> Basis:
    """The basis of this name and shape that the labels (seed, layer, epoch) stand for, the same everywhere.

    cd: signed coordinates; rd: Gaussian rows of variance 1/width; ss: uniformly random orthonormal rows; idx: identity.
    """
    if name not in SEEDED:
        raise ValueError(f"projection={name!r} cannot be made from a seed; choose {', '.join(SEEDED)}")
    return SEEDED[name](rank, width, generator("projection", *labels)).to(torch.empty((), dtype=dtype))


def haar_basis(rank: int, width: int, g: torch.Generator, like: Tensor) -> Dense:
    """Uniformly random orthonormal rows, as `ss`, on the device and in the type of a tensor.

    An optimizer may draw them at every step, so that they are made in that type, and by Cholesky-QR.
    """
    return Dense(orthonormal_rows(torch.randn(rank, width, generator=g, dtype=like.dtype)).to(like.device))


def orthonormal_rows(Z_rn: Tensor) -> Tensor:
    """An orthonormal basis of the rows of Z: Cholesky-QR, repeated once if need be; Householder QR where that fails."""
    norms = torch.linalg.vector_norm(Z_rn, dim=1, keepdim=True)
    Q = Z_rn / norms.clamp_min(torch.finfo(Z_rn.dtype).tiny)
    eye = torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
    for _ in range(3):
        gram_rr = Q @ Q.mT
        if bool((gram_rr - eye).abs().amax() < ORTHONORMAL):
            return Q
        L, info = torch.linalg.cholesky_ex(gram_rr)
        if bool(info):
            break
        # An explicit inverse and a product run three times as fast here as a triangular solve of all of Q.
        Q = torch.linalg.solve_triangular(L, eye, upper=False) @ Q
    return torch.linalg.qr(Z_rn.mT)[0].mT.contiguous()


def sketch(gradient: Tensor, rank: int, *key: object) -> Tensor:
    """Omega G of a gradient G [rows, width], where `key` decides the Gaussian Omega: [min(rank + 8, rows), width].

    With one key the mean of sketches is the sketch of the mean gradient.
    """
    omega = torch.randn(sketch_rows(rank, len(gradient)), len(gradient), generator=generator(*key))
    return omega.to(gradient) @ gradient


def sketch_rows(rank: int, rows: int) -> int:
    """Rows of the sketch of a gradient of so many rows."""
    return min(rank + OVERSAMPLING, rows)


def leading(sketch: Tensor, rank: int) -> Basis:
    """The top `rank` right singular vectors of a sketch [s, width] of a gradient (Halko et al., 2011, sec. 4)."""
    if rank > min(sketch.shape):
        raise ValueError(f"a sketch of shape {tuple(sketch.shape)} has no {rank} singular vectors; take more rows")
    return Dense(singular(sketch.double(), rank)[1].to(sketch).contiguous())


def singular(G_mn: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Views of the leading singular vectors, left [m, rank] and right [rank, n], signs as torch gives them."""
    U, _, Vh = torch.linalg.svd(G_mn, full_matrices=False)
    return U[:, :rank], Vh[:rank]
