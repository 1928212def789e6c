"""A weight seen as a matrix [..., width] whose last dimension a basis compresses."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import Size, Tensor

from lilliput.optim.basis import Basis


@dataclass(frozen=True)
class Form:
    """How a weight of this shape becomes a matrix.

    linear:     [out, in] as it is.
    transposed: stored as [in, out], as GPT-2's layers are.
    filter:     a convolution's [out, in / groups, kh, kw], flattened to [out, in / groups * kh * kw].
    width:      a convolution's as it is, compressed along its kernel's width (the published program's way).
    """

    shape: tuple[int, ...]
    kind: Literal["linear", "transposed", "filter", "width"] = "linear"

    @property
    def rows(self) -> Size:
        """The matrix's shape but for its width."""
        return Size({"transposed": self.shape[1:], "width": self.shape[:-1]}.get(self.kind, self.shape[:1]))

    @property
    def width(self) -> int:
        """The dimension that a basis compresses."""
        return {"transposed": self.shape[0], "filter": prod(self.shape[1:])}.get(self.kind, self.shape[-1])

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix; it may share the weight's memory."""
        if self.kind == "transposed":
            return weight.T
        return weight.flatten(1) if self.kind == "filter" else weight

    def weight(self, matrix: Tensor) -> Tensor:
        """The weight that a matrix stands for, contiguous."""
        return (matrix.T if self.kind == "transposed" else matrix.reshape(Size(self.shape))).contiguous()

    def moved(self, weight: Tensor, b: Tensor, basis: Basis) -> Tensor:
        """weight + b P, as a new tensor: b [*rows, rank].  The same bits wherever it is called."""
        return self.weight(basis.added(self.matrix(weight), b))
