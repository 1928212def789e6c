"""FedSub's dual variable, as functions on tensors (Zhang, Xu, Yuan, 2025, https://arxiv.org/abs/2509.05213).

A client's dual mu is a term of the gradient of b.  With u minus the mean of the gradients that the client's steps saw
in a round, mu among them, and ubar the mean of u over the clients,

    mu+ = mu + u - ubar

`outer_update` drives this in a loop of one's own, and `algorithms.fedsub` over messages.

A dual is kept in the shape of b [*rows, rank], in one basis, or in full size [*rows, width], in none.  As published
(`of_b`) it has the units of b and not of a gradient: the coordinates of a gradient are its products with the rows of P,
those of a change of W are the b of the nearest b P.
"""

from __future__ import annotations

from torch import Tensor

from lilliput.optim.basis import Basis


def learnt(mean_gradient: Tensor | None, dual: Tensor) -> Tensor:
    """u of a client; one that took no step (None) counts as if its own gradient were zero, so that it saw its dual."""
    return -(dual if mean_gradient is None else mean_gradient)


def move_(dual: Tensor, u: Tensor, mean: Tensor, basis: Basis | None = None, of_b: bool = False) -> Tensor:
    """mu + u - ubar, in place; returns the dual.

    u, mean: [*rows, rank], of the dual's type or wider.  basis: what they are in, for a dual in full size.
    """
    apart = (u - mean).to(dual)
    return dual.add_(apart if basis is None else whole(apart, basis, of_b))


def within(dual: Tensor, basis: Basis, of_b: bool = False) -> Tensor:
    """A dual in full size as one in the shape of b: [*rows, width] -> [*rows, rank]."""
    return basis.coordinates(dual) if of_b else basis.compress(dual)


def whole(dual: Tensor, basis: Basis, of_b: bool = False) -> Tensor:
    """A dual in the shape of b as one in full size, from which `within` gives it back."""
    return basis.expand(dual) if of_b else basis.lift(dual)


def rotated(dual: Tensor, old: Basis, new: Basis, of_b: bool = False) -> Tensor:
    """A dual in the shape of b, taken from one basis to another; what `new` does not span is lost.

    For an orthonormal P it is mu P P'^T.
    """
    return within(whole(dual, old, of_b), new, of_b)
