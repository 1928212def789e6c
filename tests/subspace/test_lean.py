"""Layers in a subspace of a model that keeps less: the same results, whichever came first, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lilliput import lean
from lilliput.subspace import replace_with_subspace

pytest.importorskip("transformers")
from lilliput.models.transformers import pretrained

H, F, LAYERS, RANK = 64, 160, 3, 8
SIZES = {"layers": LAYERS, "hidden": H, "mlp": F, "heads": 4, "vocabulary": 100, "positions": 32}
BATCH = {"input_ids": torch.arange(64).view(4, 16), "labels": torch.arange(1, 65).view(4, 16)}


def network(*changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = pretrained("llama_9m", **SIZES)
    for change in changes:
        change(model)
    for name, p in model.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(p, std=0.02)
    return model.train()


def subspaced(projection: str) -> Any:
    return lambda model: replace_with_subspace(model, rank=RANK, projection=projection)


def results(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    value = lean.loss(model, BATCH)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return value.detach(), dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))


@pytest.mark.parametrize("projection", ["cd", "ss"])
@pytest.mark.parametrize("first", ["lean", "subspace"])
def test_losses_and_gradients_are_those_of_the_stock_model(projection: str, first: str) -> None:
    changes = [lean.patch, subspaced(projection)]
    model = network(*(changes if first == "lean" else reversed(changes)))
    assert lean.patched(model)
    value, grads = results(model)
    expected, theirs = results(network(subspaced(projection)))
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert grads.keys() == theirs.keys() and sum(name.endswith(".b") for name in grads) == 7 * LAYERS
    for name, grad in grads.items():
        assert (grad - theirs[name]).norm() <= 1e-6 * theirs[name].norm(), name


def test_what_is_kept_is_the_compressed_inputs_or_nothing() -> None:
    """A layer's linear layers keep RANK numbers of each token's input, whatever of it another operation keeps.

    Stock, q, k and v share an input that nobody else keeps, gate and up another, and down has its own; that of o is
    attention's output, which attention keeps too.  Lean, all of them but o's are made again.
    """
    each = 4 * BATCH["labels"].numel() * LAYERS  # bytes of a number of every token and layer
    stock, ours = (lean.activations(network(*c), BATCH) for c in ([], [subspaced("cd")]))
    assert stock - ours == each * (2 * H + F - 7 * RANK)
    patched, both = (lean.activations(network(*c), BATCH) for c in ([lean.patch], [lean.patch, subspaced("cd")]))
    assert both - patched == each * RANK
