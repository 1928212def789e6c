"""Sub-models: the part of the model that a client holds, and how the parts are combined again."""

from collections.abc import Callable

from lilliput.submodel.combine import Combine, Mean, Sum, reduce, uniform_mean, weighted_mean
from lilliput.submodel.depth import Stages
from lilliput.submodel.inco import InCo
from lilliput.submodel.slices import Slice, SliceRule, Tiered, full

COMBINES: dict[str, Callable[..., Combine]] = {
    "weighted_mean": weighted_mean, "uniform_mean": uniform_mean, "inco": InCo,
}  # fmt: skip

SLICES: dict[str, Callable[..., SliceRule]] = {"full": full, "stage": Stages}

__all__ = [
    "COMBINES",
    "SLICES",
    "Combine",
    "InCo",
    "Mean",
    "Slice",
    "SliceRule",
    "Stages",
    "Sum",
    "Tiered",
    "full",
    "reduce",
    "uniform_mean",
    "weighted_mean",
]
