"""Layers that train in a subspace: b in W = x + b P, with P the same for everyone who has its seed."""

from lilliput.optim.basis import PROJECTIONS, Basis, Columns, Dense, leading, seeded_basis
from lilliput.subspace.conv import SubspaceConv2d
from lilliput.subspace.dual import rotated
from lilliput.subspace.form import Form
from lilliput.subspace.layer import SubspaceLayer
from lilliput.subspace.linear import SubspaceLinear
from lilliput.subspace.outer import outer_update, subspace_layers, subspace_optimizer
from lilliput.subspace.replace import Subspace, dense, matched, replace_with_subspace
from lilliput.subspace.shown import layers_of, shown

__all__ = [
    "PROJECTIONS", "Basis", "Columns", "Dense", "Form", "Subspace", "SubspaceConv2d", "SubspaceLayer", "SubspaceLinear",
    "dense", "layers_of", "leading", "matched", "outer_update", "replace_with_subspace", "rotated", "seeded_basis",
    "shown", "subspace_layers", "subspace_optimizer",
]  # fmt: skip
