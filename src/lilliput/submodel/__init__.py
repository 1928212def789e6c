"""Sub-models: the part of the model that a client holds, and how the parts are combined again."""

from lilliput.submodel.combine import COMBINES, Combine, Mean, Sum, reduce, uniform_mean, weighted_mean
from lilliput.submodel.slices import SLICES, Slice, SliceRule, full

__all__ = [
    "COMBINES",
    "SLICES",
    "Combine",
    "Mean",
    "Slice",
    "SliceRule",
    "Sum",
    "full",
    "reduce",
    "uniform_mean",
    "weighted_mean",
]
