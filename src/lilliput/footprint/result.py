"""What training needs, by kind of tensor, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from lilliput.splitter.budget import parsed

KINDS = ("weights", "gradients", "states", "projections", "activations", "scratch")


@dataclass(frozen=True)
class Footprint:
    """Bytes of each kind at its own largest during a step; not all are at once, so that `peak` is below `total`.

    weights:     parameters and buffers.
    gradients:   of the trained weights; with per-layer updates only the largest of these is there at a time.
    states:      what the optimizer keeps from step to step, but for
    projections: the bases of the subspaces.
    activations: what the backward pass needs of the forward pass, the batch, and what passes through between them.
    scratch:     what the optimizer's update allocates for its own duration.
    at_peak:     of each kind, the bytes at the moment when most is needed.
    parameters:  how many numbers the weights are.
    certified:   by a step on fake tensors, not by formulas.
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
        """All kinds at their largest: what no order of events can exceed."""
        return sum(getattr(self, kind) for kind in KINDS)

    @property
    def peak(self) -> int:
        """The most that is needed at one moment."""
        return sum(self.at_peak.values())

    def fits(self, memory: int | str) -> bool:
        """Whether the peak fits into this memory: bytes, or a text such as "24GB" or "16GiB"."""
        return self.peak <= parsed(memory)
