"""A model without values: its shapes on the meta device, for what has to be known before anything is computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lilliput.splitter.blank import NORMS, READS, normalised
from lilliput.splitter.values import mapped


class Undecided(TorchDispatchMode):
    """Tensors on the meta device decide as zeros do where Python asks for their values (is every mask true?)."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # otherwise torch would import its compiler at the first operation
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and args[0].device.type == "meta":
            return READS[func]
        if func is NORMS[0] and args[0].device.type == "meta":
            return normalised(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def decided(model: nn.Module) -> Iterator[None]:
    """Let a model run that may be on the meta device; any other runs as it is."""
    if not any(p.device.type == "meta" for p in model.parameters()):
        yield
        return
    with Undecided():
        yield


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters and buffers are on the meta device: no memory, but for its code."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = b.detach().to("meta")
    return copy.deepcopy(model, memo).to("meta")  # and what is blank in a part


def moved(inputs: Any, device: str = "meta") -> Any:
    """Nested inputs with their tensors on a device."""
    return mapped(inputs, lambda name, x: x.to(device) if isinstance(x, Tensor) else x)
