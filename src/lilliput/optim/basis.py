"""Where a subspace comes from: the dominant directions of a gradient, or chance.

`svd` is GaLore's (Zhao et al., ICML 2024, https://arxiv.org/abs/2403.03507).  `power` needs no decomposition: the basis
of the last refresh is almost right, so one step of the block power method on the new gradient, made orthonormal by
Cholesky-QR, follows it at a small part of the time.
Everything works on rows: B_rn spans the row space; the left factor is the same thing of the transpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.core import random
from lilliput.optim.project import Basis, Side

ORTHONORMAL = 1e-5  # the largest entry of B B^T - I that passes


def svd(G_mn: Tensor, rank: int, where: Side) -> Basis:
    """The leading singular vectors, signs as the decomposition returns them."""
    U, _, Vh = torch.linalg.svd(G_mn, full_matrices=False)
    return Basis(
        None if where == "right" else U[:, :rank].contiguous(), None if where == "left" else Vh[:rank].contiguous()
    )


def gram(G_mn: Tensor, rank: int, where: Side) -> Basis:
    """The same subspace as `svd` from the eigenvectors of the smaller Gram matrix: a fraction of the time."""
    tall = G_mn if G_mn.shape[0] >= G_mn.shape[1] else G_mn.mT
    vectors = torch.linalg.eigh(tall.mT @ tall)[1]
    small_rn = vectors[:, -rank:].flip(1).mT  # eigenvalues ascend
    large = None if where != "full" and (where == "right") == (tall is G_mn) else orthonormal_rows(small_rn @ tall.mT)
    rows, columns = (small_rn, large) if tall is G_mn else (large, small_rn)
    left = None if where == "right" or columns is None else columns.mT.contiguous()
    return Basis(left, None if where == "left" or rows is None else rows.contiguous())


def power(G_mn: Tensor, old: Basis) -> Basis:
    """One block power step from `old`: its span goes to that of B G^T G (right) or G G^T A (left), both for full."""
    if old.right is None:
        assert old.left is not None
        return Basis(orthonormal_rows((old.left.mT @ G_mn) @ G_mn.mT).mT.contiguous(), None)
    Y_mr = G_mn @ old.right.mT
    if old.left is None:
        return Basis(None, orthonormal_rows(Y_mr.mT @ G_mn))
    left = orthonormal_rows(Y_mr.mT)
    return Basis(left.mT.contiguous(), orthonormal_rows(left @ G_mn))


def haar(shape: tuple[int, int], rank: int, where: Side, seed: int, like: Tensor) -> Basis:
    """A uniformly random subspace, the same on every device for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def rows(size: int) -> Tensor:
        return orthonormal_rows(torch.randn(rank, size, generator=generator, dtype=like.dtype)).to(like.device)

    left = None if where == "right" else rows(shape[0]).mT.contiguous()
    return Basis(left, None if where == "left" else rows(shape[1]))


def seed_of(seed: int, index: int, count: int) -> int:
    """The seed of the count-th basis of an optimizer's index-th matrix."""
    return random.key("projection", seed, index, count)


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
