"""Checkpointing changes no number, whatever its blocks' forwards move and however often a block is used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from moving_toys import LAYERS
from torch import Tensor, nn

from lilliput.tasks.moving import Movable
from lilliput.tasks.recompute import checkpointed


def stepped(model: nn.Module, checkpointing: bool, steps: int = 3) -> dict[str, Any]:
    """All state after some steps of SGD, and the losses."""
    model = copy.deepcopy(model)
    opt, rng, seen = torch.optim.SGD(model.parameters(), 0.1), torch.Generator().manual_seed(1), []
    for _ in range(steps):
        x = torch.randn(5, 8, generator=rng)
        if checkpointing:
            with checkpointed(model):
                loss = model(x).square().mean()
                loss.backward()
        else:
            loss = model(x).square().mean()
            loss.backward()
        opt.step()
        opt.zero_grad()
        seen.append(loss.detach())
    rest = Movable(model).held()
    return {**dict(model.named_parameters()), **rest.buffers, **rest.marks, "losses": torch.stack(seen)}


def assert_alike(model: nn.Module) -> None:
    plain, again = stepped(model, False), stepped(model, True)
    assert plain.keys() == again.keys()
    for name, x in plain.items():
        assert torch.equal(x, again[name]) if isinstance(x, Tensor) else x == again[name], name


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("twice", [False, True])
def test_what_a_block_moves_is_moved_once(kind: str, twice: bool) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), LAYERS[kind](), nn.Tanh())
    assert_alike(nn.Sequential(block, block, nn.Linear(8, 8)) if twice else nn.Sequential(block, nn.Linear(8, 8)))


def test_a_layer_that_is_used_twice() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    assert_alike(nn.Sequential(layer, nn.Tanh(), layer))


def test_a_forward_that_was_there_before_is_there_afterwards() -> None:
    block = nn.Linear(8, 8)
    own = block.forward = lambda x: 2 * x  # type: ignore[assignment]
    model = nn.Sequential(block)
    with checkpointed(model):
        assert block.forward is not own
    assert block.forward is own
