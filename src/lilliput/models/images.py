"""What the image models share: the memory layout of a batch, and the check of an example's shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """The same images (N, C, H, W) with the channel innermost in memory, a view where that needs no copy.

    On a CPU max-pooling is an order of magnitude faster this way, and a convolution follows the layout of its input.
    """
    if x.shape[1] == 1:  # one channel fits both layouts: strides must say which, and only this view's do
        return x[:, 0].contiguous().unsqueeze(-1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def image_shape(model: str, shape: Sequence[int], least: int = 1) -> tuple[int, int, int]:
    """`shape` as (channels, height, width), each side at least `least` pixels; ValueError otherwise."""
    if len(shape) != 3:
        raise ValueError(f"{model} takes images (channels, height, width), not shape {tuple(shape)}; try mlp")
    channels, height, width = shape
    if min(height, width) < least:
        raise ValueError(f"{model} needs images of at least {least} x {least} pixels, not {height} x {width}; try mlp")
    return channels, height, width
