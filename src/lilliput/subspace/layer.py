"""What all layers in a subspace share: a frozen weight x, a trained b, and the basis P that b lives in."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.optim.basis import Basis, Columns, Dense
from lilliput.subspace.dual import within
from lilliput.subspace.form import Form


class SubspaceLayer(nn.Module):
    """A layer whose weight is x + b P.

    layer: what it replaces; its `weight` becomes the frozen x, under the same name, and its `bias` stays as it is.
    With b = 0, as it begins, this layer is that one.  For loops of a user's own it counts the `epoch` of its basis,
    which comes from a `seed`, and has room for a `dual`, in units of a gradient, and in the shape of b or, in full
    size, of the matrix, and for the sum of the gradients that were `seen` with it in `taken` steps.  All of it, and P,
    is in its state dict, beside x and b.
    """

    weight: Tensor
    bias: Tensor | None
    dual: Tensor | None
    seen: Tensor | None
    taken: Tensor | None
    seed: Tensor
    epoch: Tensor
    _replaced: nn.Module
    origin: tuple[str, str | None] = ("", None)  # of the basis: label, projection

    def __init__(self, layer: nn.Module, basis: Basis, form: Form):
        super().__init__()
        weight: Any = layer.weight
        self.form = form
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = layer.bias  # type: ignore[assignment]
        self.b = nn.Parameter(weight.detach().new_zeros(*form.rows, basis.rank))
        for name in ("dual", "seen", "taken"):
            self.register_buffer(name, None)
        for name in ("seed", "epoch"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=weight.device))
        emptied = copy.copy(layer)
        emptied._parameters = dict.fromkeys(layer._parameters)
        object.__setattr__(self, "_replaced", emptied)  # no submodule: it has no state of its own
        self.use(basis)

    @property
    def basis(self) -> Basis:
        """P, on the layer's device."""
        buffers: Any = self._buffers
        if "index" in buffers:
            return Columns(buffers["index"], buffers["sign"], self.form.width)
        return Dense(buffers["rows"], self.orthonormal)

    def use(self, basis: Basis) -> None:
        """Change P; b keeps its numbers, which now mean something else."""
        if (basis.rank, basis.width) != (self.b.shape[-1], self.form.width):
            raise ValueError(
                f"a basis of {basis.rank} rows of {basis.width} does not fit a layer of rank {self.b.shape[-1]} and "
                f"width {self.form.width}"
            )
        for name in ("index", "sign", "rows"):
            self._buffers.pop(name, None)
        basis = basis.to(self.weight)
        tensors = {"index": basis.index, "sign": basis.sign} if isinstance(basis, Columns) else {"rows": basis.matrix}
        for name, x in tensors.items():
            self.register_buffer(name, x)
        self.orthonormal = isinstance(basis, Columns) or basis.orthonormal

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weight in use, x + b P, in the shape of the layer replaced."""
        return self.form.moved(self.weight, self.b, self.basis)

    @torch.no_grad()
    def offset(self, coordinates: bool = False) -> Tensor:
        """W P^T - b, or the coordinates of W in P less b [like b]: the same where P P^T = I."""
        x = self.form.matrix(self.weight)
        if coordinates or self.orthonormal:
            return self.basis.coordinates(x)
        return self.basis.compress(self.basis.added(x, self.b)).sub_(self.b)

    def correct(self, full: bool) -> None:
        """Begin a dual of zeros; `full`: in full size."""
        like = self.form.matrix(self.weight) if full else self.b
        self.dual = torch.zeros_like(like, requires_grad=False, memory_format=torch.contiguous_format)

    def watch(self) -> None:
        """Begin to keep the sum of the gradients that steps see."""
        if self.seen is None:
            wide = torch.promote_types(self.b.dtype, torch.float32)
            self.seen, self.taken = (
                torch.zeros_like(self.b, requires_grad=False, dtype=wide),
                torch.zeros_like(self.epoch),
            )

    @torch.no_grad()
    def corrected(self, grad: Tensor) -> Tensor:
        """A gradient of b plus the dual, which is kept in mind."""
        assert self.seen is not None and self.taken is not None
        grad = grad + self.own_dual
        self.seen.add_(grad)
        self.taken.add_(1)
        return grad

    @property
    def full(self) -> bool:
        """Whether the dual has the size of the weight."""
        return self.dual is not None and self.dual.shape != self.b.shape

    @property
    def own_dual(self) -> Tensor:
        """The dual in the shape of b."""
        assert self.dual is not None
        return within(self.dual, self.basis) if self.full else self.dual

    def plain(self) -> nn.Module:
        """An ordinary layer, of the class replaced, with the weight in use and this layer's own bias."""
        layer: Any = copy.copy(self._replaced)
        layer._parameters = {**self._replaced._parameters, "weight": nn.Parameter(self.dense()), "bias": self.bias}
        return layer.train(self.training)

    @torch.no_grad()
    def fold(self, b: Tensor | None = None) -> None:
        """x += b P, with the layer's own b by default; the layer's own is zero afterwards."""
        self.weight.copy_(self.form.moved(self.weight, self.b if b is None else b.to(self.b), self.basis))
        self.b.zero_()

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, rank={self.b.shape[-1]}, bias={self.bias is not None}"
