"""How gradients and weights lie in memory decides nothing, and what has no gradient is left alone."""

import pytest
import torch
from torch import nn

from lilliput import optim

OPTIMIZERS = [optim.GaLoreAdamW, optim.GaLoreAdamW8bit, optim.GaLoreAdafactor, optim.GaLoreLion]
LAID = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "every second": lambda x: torch.stack([x, -x], -1)[..., 0],
}
everywhere = pytest.mark.parametrize("make", OPTIMIZERS)
with_rank = pytest.mark.parametrize("rank", [None, 3])
of_shape = pytest.mark.parametrize("shape", [(9, 8), (70, 80), (8, 6, 3, 3)], ids=str)


def draw(seed, shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(make, rank, shape, weight, gradient):
    p = nn.Parameter(weight(draw(9, shape)))
    projected = {"rank": rank, "update_proj_gap": 2, "scale": 1.0} if rank else {}
    optimizer = make([{"params": [p], **projected}], lr=0.01)
    for step in range(4):
        optimizer.update([p], [gradient(draw(step, shape))], optimizer.param_groups[0])
    return p.detach()


@everywhere
@with_rank
@of_shape
@pytest.mark.parametrize("laid", LAID)
def test_gradients_of_another_layout_give_the_same_step(make, rank, shape, laid):
    if rank and laid == "expanded":  # a matrix of rank one: further directions are made of its rounding errors
        rank = 1
    other = trained(make, rank, shape, torch.clone, LAID[laid])
    same = trained(make, rank, shape, torch.clone, lambda g: LAID[laid](g).contiguous())
    torch.testing.assert_close(other, same, rtol=0, atol=1e-6)


@everywhere
@with_rank
@of_shape
@pytest.mark.parametrize("laid", ["transposed", "channels_last"])
def test_weights_of_another_layout_take_the_same_step(make, rank, shape, laid):
    other = trained(make, rank, shape, LAID[laid], torch.clone)
    same = trained(make, rank, shape, torch.clone, torch.clone)
    both = trained(make, rank, shape, LAID[laid], LAID[laid])
    # Codes of 8 bits are made of blocks in the order of memory, and an 80 x 70 state is a block of others.
    torch.testing.assert_close(other, same, rtol=0, atol=1e-2 if make is optim.GaLoreAdamW8bit else 1e-6)
    torch.testing.assert_close(both, other, rtol=0, atol=1e-6)


@everywhere
@with_rank
def test_what_has_no_gradient_is_left_alone(make, rank):
    used, unused = (nn.Parameter(draw(n, (9, 8))) for n in range(2))
    projected = {"rank": rank} if rank else {}
    optimizer = make([{"params": [used, unused], **projected}], lr=0.01, weight_decay=0.1)
    before = unused.detach().clone()
    for step in range(3):
        used.grad = draw(step, (9, 8))
        unused.grad = draw(step, (9, 8)) if step == 1 else None
        kept = {k: torch.clone(x) if torch.is_tensor(x) else x for k, x in optimizer.state.get(unused, {}).items()}
        weight = unused.detach().clone()
        optimizer.step()
        if step != 1:
            assert torch.equal(unused, weight) and optimizer.state.get(unused, {}).keys() == kept.keys()
            assert all(torch.equal(x, kept[k]) if torch.is_tensor(x) else x == kept[k]
                       for k, x in optimizer.state.get(unused, {}).items())  # fmt: skip
    assert not torch.equal(unused, before) and optimizer.state[unused]["step"] == 1
