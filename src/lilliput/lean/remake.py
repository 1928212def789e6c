"""Results that are made again in the backward pass instead of being kept: those that cost no matrix product.

A cheap result (a norm, an activation) is made from tensors that are kept anyway.  `remade` keeps nothing else for its
gradient, and labels the result with its recipe, by which the product that reads it (`product`) need not keep it either.
Both differentiate any number of times.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.lean.formulas import Formula


class Recipe(NamedTuple):
    """The formula gives the tensor again, if it has not been written to since: its `version` then was this."""

    formula: Formula
    sources: tuple[Tensor, ...]
    options: tuple[Any, ...]
    version: int


def remade(formula: Formula, *sources: Tensor, options: tuple[Any, ...] = ()) -> Tensor:
    """What the formula gives, keeping only the sources for its gradient; labelled with its recipe."""
    if not _recording() or not any(x.requires_grad for x in sources):
        return formula.make(*sources, *options)
    out = _Remade.apply(formula, options, *sources)
    out.recipe = Recipe(formula, sources, options, out._version)
    return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor | None:
    """x [..., in] times weight [out, in] ([in, out] if transposed) plus bias [out], not keeping x.

    None if x has no recipe, or nothing would be gained because the weight is frozen.
    """
    recipe = recipe_of(x) if weight.requires_grad else None
    if recipe is None:
        return None
    return _Product.apply(x, weight, bias, transposed, autocast_dtype(x), recipe, *recipe.sources)


def recipe_of(x: Tensor) -> Recipe | None:
    """What makes x again in the backward pass, so that it need not be kept; None if it must be."""
    recipe: Recipe | None = getattr(x, "recipe", None)
    return recipe if recipe is not None and recipe.version == x._version and _recording() else None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would multiply x in, None where it is off; doubles are left alone, as autocast does."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def no_autocast(x: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """The products of this dtype are cast by hand: `autocast_dtype(x)`."""
    return nullcontext() if dtype is None else torch.autocast(x.device.type, enabled=False)


def transformed() -> bool:
    """Whether vmap, jvp or a compiler is at work, which take the plain operations alone."""
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()


def _recording() -> bool:
    return torch.is_grad_enabled() and not transformed()


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: Formula, options: tuple[Any, ...], *sources: Tensor) -> Tensor:
        ctx.formula, ctx.options = formula, options
        ctx.save_for_backward(*sources)
        return formula.make(*sources, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        if ctx.formula.slope is not None and not torch.is_grad_enabled():
            grads = ctx.formula.slope(grad, *ctx.saved_tensors, *ctx.options)
            return None, None, *(g if want else None for g, want in zip(grads, wanted, strict=True))
        return None, None, *_by_autograd(ctx.formula, ctx.options, ctx.saved_tensors, grad, wanted)


def _by_autograd(
    formula: Formula, options: tuple[Any, ...], sources: tuple[Tensor, ...], grad: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    again = torch.is_grad_enabled()  # the gradient will be differentiated: it must belong to the sources' own graph
    if not again:
        sources = tuple(x.detach().requires_grad_(want) for x, want in zip(sources, wanted, strict=True))
    with torch.enable_grad():
        out = formula.make(*sources, *options)
    chosen = [x for x, want in zip(sources, wanted, strict=True) if want]
    grads = iter(torch.autograd.grad(out, chosen, grad, create_graph=again))
    return [next(grads) if want else None for want in wanted]


class _Product(torch.autograd.Function):
    """x passes its gradient on to the sources; here they have none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, dtype: torch.dtype | None,
        recipe: Recipe, *sources: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.transposed, ctx.dtype, ctx.wide = transposed, dtype or x.dtype, x.dtype
        ctx.formula, ctx.options = recipe.formula, recipe.options
        ctx.save_for_backward(weight, bias, *sources)
        W = weight.to(ctx.dtype)
        with no_autocast(x, dtype):
            return F.linear(x.to(ctx.dtype), W.mT if transposed else W, None if bias is None else bias.to(ctx.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, *sources = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gx = gw = gb = None
        if needs_x:
            W = weight.to(ctx.dtype)
            gx = (grad @ (W.mT if ctx.transposed else W)).to(ctx.wide)
        if needs_weight:
            x = ctx.formula.make(*sources, *ctx.options).to(ctx.dtype).flatten(0, -2)
            g = grad.flatten(0, -2)
            gw = (x.mT @ g if ctx.transposed else g.mT @ x).to(weight.dtype)
        if needs_bias:
            gb = grad.flatten(0, -2).sum(0).to(bias.dtype)
        return gx, gw, gb, None, None, None, *(None for _ in sources)
