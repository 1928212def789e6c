"""Forward passes in reduced precision, and the convolutions that torch gets wrong there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context of a forward pass: autocast for bf16 and fp16, none for float32."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, _DTYPES[precision])


def exact_convolutions(model: nn.Module, device: torch.device, precision: str) -> AbstractContextManager:
    """Compute in float32 the convolutions whose bf16 gradients torch leaves uninitialised on a CPU.

    Those are the ones whose input is smaller than their stride, such as the last stages of a ResNet on 8 x 8 images
    (seen with torch 2.13, for every kernel size and memory format).  For a whole step, as recomputed blocks run in the
    backward pass.
    """
    if precision != "bf16" or device.type != "cpu":
        return nullcontext()
    strided = [m for m in model.modules() if isinstance(m, _ConvNd) and not isinstance(m, _ConvTransposeNd)]
    return _all_exact([m for m in strided if max(m.stride) > 1])


@contextmanager
def _all_exact(strided: list[nn.Module]) -> Iterator[None]:
    before = [m.__dict__.get("forward") for m in strided]
    for m in strided:
        m.forward = _exact(m, m.forward)
    try:
        yield
    finally:
        for m, forward in zip(strided, before, strict=True):
            if forward is None:
                del m.forward
            else:
                m.forward = forward


def _exact(m: Any, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        if all(extent >= stride for extent, stride in zip(x.shape[-len(m.stride) :], m.stride, strict=True)):
            return forward(x)
        with torch.autocast("cpu", enabled=False):
            return forward(x.to(m.weight.dtype))

    return run
