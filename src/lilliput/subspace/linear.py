"""A linear layer whose weight is W = x + b P: x is frozen, b [out, rank] is trained.

dL/db = (dL/dy)^T (input P^T), so that of the input only `input P^T` is kept for the backward pass, and nothing where
the input can be made again (`lean`).  W is never kept: x + b P is made anew in each direction where that is less work
than adding a low-rank product to the one with x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lilliput.lean.remake import Recipe, autocast_dtype, recipe_of
from lilliput.optim.basis import Basis, Columns
from lilliput.subspace.form import Form
from lilliput.subspace.layer import SubspaceLayer

PRODUCT = 8  # numbers of compressed input per column of W up to which a product is faster than a copy (CPU, one core)


class _Linear(torch.autograd.Function):
    """y = input (x + b P)^T + bias: x [out, in], b [out, rank], P [rank, in]; a recipe makes the input of `sources`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, x: Tensor, b: Tensor, bias: Tensor | None, basis: Basis, recipe: Recipe | None,
        *sources: Tensor,
    ) -> Tensor:  # fmt: skip
        input = input.to(autocast_dtype(input) or input.dtype)
        low = basis.to(input)
        z = low.compress(input)
        ctx.save_for_backward(x, b, *(sources or (z,)))
        ctx.basis, ctx.low, ctx.bias = basis, low, bias is not None
        ctx.formula, ctx.options = (None, ()) if recipe is None else (recipe.formula, recipe.options)
        bias = None if bias is None else bias.to(input.dtype)
        if _made(basis, z.numel(), input.numel() >= x.shape[1] ** 2):
            # Added in the weight's own precision, and rounded once.
            return F.linear(input, basis.added(x, b).to(input.dtype), bias)
        return F.linear(input, x.to(input.dtype), bias) + z @ b.to(input.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, b, *saved = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        for_input = for_b = for_bias = None
        if ctx.needs_input_grad[0]:
            if _made(ctx.basis, len(rows) * b.shape[1], len(rows) * sum(x.shape) >= x.numel()):
                for_input = grad @ ctx.basis.added(x, b).to(grad.dtype)
            else:
                for_input = ctx.low.added(grad @ x.to(grad.dtype), grad @ b.to(grad.dtype))
        if ctx.needs_input_grad[2]:
            again = None if ctx.formula is None else ctx.formula.make(*saved, *ctx.options)
            z = saved[0] if again is None else ctx.low.compress(again.to(grad.dtype))
            for_b = (rows.T @ z.reshape(-1, z.shape[-1])).to(b.dtype)
        if ctx.bias and ctx.needs_input_grad[3]:
            for_bias = rows.sum(0)
        return for_input, None, for_b, for_bias, None, None, *(None for _ in ctx.needs_input_grad[6:])


def _made(basis: Basis, numbers: int, many: bool) -> bool:
    """Whether to make W: a scatter into a copy of x is soon less than a product, one of matrices only for `many` rows.

    numbers: of the compressed input [..., rank], which is what a product with b works on.
    """
    return numbers > PRODUCT * basis.width if isinstance(basis, Columns) else many


class SubspaceLinear(SubspaceLayer):
    """y = input W^T + bias with W = x + b P: input [..., in], b [out, rank].

    `transposed` says that the layer stores its weight as [in, out], as GPT-2's do.
    """

    def __init__(self, layer: nn.Module, basis: Basis, transposed: bool = False):
        weight: Any = layer.weight
        super().__init__(layer, basis, Form(tuple(weight.shape), "transposed" if transposed else "linear"))

    def forward(self, input: Tensor) -> Tensor:
        recipe = recipe_of(input)
        parts = self.form.matrix(self.weight), self.b, self.bias, self.basis
        return _Linear.apply(input, *parts, recipe, *(recipe.sources if recipe is not None else ()))
