"""Shared by the image models: the memory layout of a batch, and the check of an example's shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """Images (N, C, H, W) with the channel innermost in memory; a view if no copy is needed.

    On a CPU this layout makes max-pooling ten times as fast, and a convolution keeps the layout of its input.
    """
    if x.shape[1] == 1:  # one channel fits both layouts, and only the strides of this view mean channels_last
        return x[:, 0].contiguous().unsqueeze(-1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def image_shape(model: str, shape: Sequence[int], least: int = 1) -> tuple[int, int, int]:
    """`shape` as (channels, height, width).  Raises ValueError unless each side has at least `least` pixels."""
    if len(shape) != 3:
        raise ValueError(f"{model} takes images (channels, height, width), not shape {tuple(shape)}; try mlp")
    channels, height, width = shape
    if min(height, width) < least:
        raise ValueError(f"{model} needs images of at least {least} x {least} pixels, not {height} x {width}; try mlp")
    return channels, height, width
