"""A convolution whose weight is W = x + b P: x is frozen, b is trained.

Flattened, P [rank, in / groups * kh * kw] is itself a bank of filters, and what the backward pass needs of the input is
its convolution with them.  That is kept where it is smaller than the input, and the input itself elsewhere.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lilliput.lean.remake import autocast_dtype
from lilliput.optim.basis import Basis
from lilliput.subspace.form import Form
from lilliput.subspace.layer import SubspaceLayer


class _Conv2d(torch.autograd.Function):
    """y = conv(input, x + b P) + bias, by the geometry (stride, padding, dilation, groups)."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, x: Tensor, b: Tensor, bias: Tensor | None, basis: Basis, form: Form, how: tuple
    ) -> Tensor:
        input = input.to(autocast_dtype(input) or input.dtype)
        bias = None if bias is None else bias.to(input.dtype)
        y = F.conv2d(input, form.moved(x, b, basis).to(input.dtype), bias, *how)
        groups, seen = how[-1], basis.rank * how[-1] * y[0, 0].numel()
        compressed = form.kind == "filter" and seen < input[0].numel()
        if compressed:
            filters = basis.dense().to(input.dtype).view(basis.rank, *form.shape[1:]).repeat(groups, 1, 1, 1)
            saved = F.conv2d(input, filters, None, *how)
        else:
            saved = input
        ctx.save_for_backward(saved, x, b)
        ctx.about = basis, form, how, compressed, input.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, x, b = ctx.saved_tensors
        basis, form, how, compressed, shape = ctx.about
        for_input = for_b = for_bias = None
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2] and not compressed, False]
        if any(wanted):
            weight = form.moved(x, b, basis).to(grad.dtype)
            if grad.is_contiguous(memory_format=torch.channels_last):  # or the gradient would come in another layout
                weight = weight.contiguous(memory_format=torch.channels_last)
            input = grad.new_empty(1).expand(shape) if compressed else saved
            stride, padding, dilation, groups = how
            for_input, for_weight, _ = torch.ops.aten.convolution_backward(
                grad, input, weight, None, stride, padding, dilation, False, (0, 0), groups, wanted
            )
            del weight  # before the gradient is laid out anew
            if for_weight is not None:
                for_b = basis.compress(form.matrix(for_weight.contiguous()).to(b.dtype))
        if ctx.needs_input_grad[2] and compressed:
            g, z = (t.unflatten(1, (how[-1], -1)).flatten(3) for t in (grad, saved))  # [examples, groups, channels, hw]
            for_b = torch.einsum("ngop,ngrp->gor", g, z).reshape(b.shape).to(b.dtype)
        if ctx.needs_input_grad[3]:
            for_bias = grad.sum((0, 2, 3))
        return for_input, None, for_b, for_bias, None, None, None


class SubspaceConv2d(SubspaceLayer):
    """conv2d with W = x + b P: any kernel, stride, padding, dilation and groups; b [out, rank].

    along: `filter` compresses whole filters; `width` compresses the kernel's width alone, with b [out, in / groups, kh,
           rank], as the published program does.
    """

    def __init__(self, layer: nn.Conv2d, basis: Basis, along: Literal["filter", "width"] = "filter"):
        super().__init__(layer, basis, Form(tuple(layer.weight.shape), along))
        # Padding of another mode than zeros, or of sides that differ, is laid on before the convolution.
        sides = tuple(layer._reversed_padding_repeated_twice)
        plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        self.border = None if plain else (sides, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        self.how = (layer.stride, layer.padding if plain else (0, 0), layer.dilation, layer.groups)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:  # one example
            return self.forward(input[None])[0]
        if self.border is not None:
            input = F.pad(input, self.border[0], self.border[1])
        return _Conv2d.apply(input, self.weight, self.b, self.bias, self.basis, self.form, self.how)
