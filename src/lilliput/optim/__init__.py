"""Optimizers that train in a subspace: GaLore, Online Subspace Descent and what followed, for any PyTorch program."""

from lilliput.optim.averaging import MeanSubspace, assign_projections, projections
from lilliput.optim.driver import SubspaceOptimizer
from lilliput.optim.footprint import Memory, memory
from lilliput.optim.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreLion, Lion
from lilliput.optim.groups import param_groups
from lilliput.optim.layerwise import PerLayer, per_layer
from lilliput.optim.processes import Processes

__all__ = [
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreLion",
    "Lion",
    "MeanSubspace",
    "Memory",
    "PerLayer",
    "Processes",
    "SubspaceOptimizer",
    "assign_projections",
    "memory",
    "param_groups",
    "per_layer",
    "projections",
]
