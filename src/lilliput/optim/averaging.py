"""Subspaces of many clients as one: the mean of projections, not of matrices that span them.

Two clients may span the same subspace by bases that differ in signs or by a rotation; their entry-wise mean would mean
nothing.  The mean here is the subspace whose projector is nearest to the weighted mean of the clients' projectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.core.tree import Tree
from lilliput.optim.driver import SubspaceOptimizer
from lilliput.optim.states import working_dtype


def projections(optimizer: SubspaceOptimizer) -> Tree:
    """Every stored projection, copied to the CPU: "3.P" is P of the optimizer's parameter 3."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    stored = {f"{i}.{name}": optimizer.state[p].get(name) for i, p in enumerate(params) for name in ("P", "P2")}
    return {name: x.detach().to("cpu", copy=True) for name, x in stored.items() if x is not None}


def assign_projections(optimizer: SubspaceOptimizer, tree: Tree) -> None:
    """Take these projections from the next step on, until their next refresh.

    Raises ValueError for a parameter that the optimizer does not have.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for key, x in tree.items():
        index, name = key.split(".")
        if int(index) >= len(params):
            raise ValueError(
                f"projection {key!r} is of parameter {index}, but this optimizer has {len(params)}: another model"
            )
        optimizer.state[params[int(index)]][name] = x.to(params[int(index)].device, copy=True)


class MeanSubspace:
    """The running mean of trees of projections, in the memory of one projector (the square of its long side) each."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}

    def add(self, tree: Tree, weight: float = 1.0) -> None:
        """Count one client's projections in."""
        for name, P in tree.items():
            rows = _rows(P).to(working_dtype(P.dtype))
            projector = rows.mT @ rows * weight
            if name in self._sums and self._shapes[name] != P.shape:
                raise ValueError(f"{name} is {tuple(P.shape)} here and {tuple(self._shapes[name])} elsewhere: "
                                 "clients must share rank and proj_type to average their subspaces")  # fmt: skip
            self._sums[name] = self._sums[name].add_(projector) if name in self._sums else projector
            self._shapes[name] = P.shape

    def result(self) -> Tree:
        """Orthonormal bases of the mean subspaces, the directions on which clients agree most first."""
        return {name: self._leading(total, self._shapes[name]) for name, total in self._sums.items()}

    @staticmethod
    def _leading(projector: Tensor, shape: torch.Size) -> Tensor:
        vectors = torch.linalg.eigh(projector)[1]
        columns = vectors[:, -min(shape) :].flip(1)
        return (columns.mT if shape[0] <= shape[1] else columns).contiguous()


def _rows(P: Tensor) -> Tensor:
    return P if P.shape[0] <= P.shape[1] else P.mT
