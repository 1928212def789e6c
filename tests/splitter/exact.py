"""How far two parts are from their model, found independently of the check that `split` itself makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lilliput import models
from lilliput.splitter.names import tensors

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def convolutional() -> nn.Module:
    return models.build("resnet10", shape=(3, 8, 8), classes=5, width=4)


def apply(module: nn.Module, batch: Any) -> Any:
    return module(**batch) if isinstance(batch, dict) else module(batch)


def logits(out: Any) -> Tensor:
    found = tensors(out)
    return found.get("logits", next(iter(found.values())))


def difference(model: nn.Module, parts: tuple[nn.Module, ...], batch: Any, training: bool = True) -> float:
    """The largest difference of outputs and of gradients; a tied tensor's gradient is the sum over its names."""
    for module in (model, *parts):
        module.train(training).zero_grad()
    torch.manual_seed(0)
    whole = logits(apply(model, batch))
    torch.manual_seed(0)
    out = apply(parts[0], batch)
    for part in parts[1:]:
        out = part(out)
    cut = logits(out)
    pull = torch.randn_like(whole)
    whole.backward(pull), cut.backward(pull)
    held: dict[str, Tensor] = {}
    for part in parts:
        held |= {name: p.grad for name, p in part.named_parameters() if p.grad is not None}
    errors = [(whole - cut).abs().max()]
    named = list(model.named_parameters(remove_duplicate=False))
    for p in model.parameters():
        own = [held[name] for name, q in named if q is p and name in held]
        if p.grad is None:
            assert not own
        else:
            errors.append((p.grad - sum(own)).abs().max())
    return max(x.item() for x in errors)


def states_are_divided(model: nn.Module, parts: tuple[nn.Module, ...]) -> None:
    """Every entry of the model's state is in exactly one part, with its value."""
    held = [part.state_dict() for part in parts]
    assert sorted(name for state in held for name in state) == sorted(model.state_dict())
    for name, x in model.state_dict().items():
        assert torch.equal(next(state[name] for state in held if name in state), x), name
