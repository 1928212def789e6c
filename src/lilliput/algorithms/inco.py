"""InCo Aggregation as a function: `mix` of the changes of a model.  As a part of any method it is `combine=inco`."""

from lilliput.submodel.inco import mix

__all__ = ["mix"]
