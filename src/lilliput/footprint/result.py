"""The memory that training needs, in bytes, by kind of tensor."""

from __future__ import annotations

from dataclasses import dataclass

from lilliput.splitter.budget import parsed

KINDS = ("weights", "gradients", "states", "projections", "activations", "scratch")


@dataclass(frozen=True)
class Footprint:
    """Bytes of each kind when it is largest during a step; these moments differ, so that `peak` is below `total`.

    weights:     parameters and buffers.
    gradients:   of the trained weights; with per-layer updates only one of these exists at a time.
    states:      what the optimizer keeps from step to step, except for projections.
    projections: the bases of the subspaces.
    activations: what the forward pass keeps for the backward pass, the batch, and temporary tensors of both passes.
    scratch:     what the optimizer's update allocates and releases again.
    at_peak:     bytes of each kind at the moment when most memory is needed.
    parameters:  how many numbers the weights are.
    certified:   whether a step on fake tensors was counted, instead of formulas evaluated.
    """

    weights: int
    gradients: int
    states: int
    projections: int
    activations: int
    scratch: int
    at_peak: dict[str, int]
    parameters: int
    certified: bool

    @property
    def total(self) -> int:
        """The sum of all kinds at their largest, an upper bound of the peak."""
        return sum(getattr(self, kind) for kind in KINDS)

    @property
    def peak(self) -> int:
        """The most that is needed at any moment."""
        return sum(self.at_peak.values())

    def fits(self, memory: int | str) -> bool:
        """Whether the peak fits into this memory: bytes, or a text such as "24GB" or "16GiB"."""
        return self.peak <= parsed(memory)
