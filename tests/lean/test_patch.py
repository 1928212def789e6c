"""A patched model gives the results of the stock one, keeps less, and behaves as a module should."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from causal import (
    FAMILIES,
    HEADS,
    HIDDEN,
    LAYERS,
    MLP,
    SIZES,
    VOCABULARY,
    example,
    furthest,
    make,
    results,
    stock_loss,
    transformers,
)
from torch import Tensor, nn

from lilliput import lean


@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_the_stock_models(family: str) -> None:
    model, batch = make(family), example()
    logits = model(batch["input_ids"]).logits.detach()
    value, grads = results(model, batch, stock_loss)
    kept = lean.activations(model, batch)
    assert lean.patched(lean.patch(model))
    found, found_grads = results(model, batch, lean.loss)
    assert abs(found - value) <= 1e-6 * value
    assert furthest(found_grads, grads) < 1e-5
    torch.testing.assert_close(model(batch["input_ids"]).logits, logits, rtol=0, atol=1e-6 if family == "gpt2" else 0)
    assert lean.activations(model, batch) < 0.6 * kept


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_bfloat16_is_as_close_to_float32_as_the_stock_models(family: str, mode: str) -> None:
    model, batch = make(family), example()
    _, exact = results(model, batch, stock_loss)
    within = torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext()
    if mode == "weights":
        model.to(torch.bfloat16)
    with within:
        value, stock = results(model, batch, stock_loss)
        kept = lean.activations(model, batch)
        found, ours = results(lean.patch(model), batch, lean.loss)
        assert lean.activations(model, batch) < 0.6 * kept
    assert abs(found - value) < 2e-3 * value
    assert furthest(ours, exact) < 1.2 * furthest(stock, exact)
    assert [g.dtype for g in ours] == [p.dtype for p in model.parameters()]


def test_saved_bytes_are_the_floor_without_another_matrix_product() -> None:
    """Per token and layer: both residual streams, q, k, v, the attention's output and logsumexp, gate and up."""
    batch = example()
    model, tokens = lean.patch(make()), batch["labels"].numel()
    layer = 4 * (2 * HIDDEN + 4 * HIDDEN + HEADS + 2 * MLP)
    rope = 2 * 4 * batch["labels"].shape[1] * SIZES["head_dim"]  # cosines and sines, once for all layers
    ids, last, hidden = 2 * 8, 4 * HIDDEN, 4 * HIDDEN  # tokens and labels; the last norm's input and output
    assert lean.activations(model, batch) == tokens * (LAYERS * layer + ids + last + hidden) + rope


def test_unpatch_restores_every_class() -> None:
    model = make()
    classes = [type(m) for m in model.modules()]
    lean.patch(lean.patch(model))
    assert [type(m) for m in model.modules()] != classes
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    assert [type(m) for m in lean.unpatch(model).modules()] == classes


def test_copies_and_pickles_stay_patched() -> None:
    model, batch = lean.patch(make()), example()
    kept, value = lean.activations(model, batch), lean.loss(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert lean.activations(other, batch) == kept and lean.loss(other, batch) == value
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


def test_models_that_the_patch_does_not_know_have_the_same_loss() -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, VOCABULARY)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
            return transformers.modeling_outputs.CausalLMOutput(logits=self.table(input_ids))

    model, batch = lean.patch(Bigram()), example()
    assert not lean.patched(model)
    expected = F.cross_entropy(model.table(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())
    assert lean.loss(model, batch) == expected


def test_another_gate_is_left_alone() -> None:
    model, batch = make(hidden_act="relu"), example()
    value, grads = results(model, batch, stock_loss)
    found, ours = results(lean.patch(model), batch, lean.loss)
    assert abs(found - value) <= 1e-6 * value and furthest(ours, grads) < 1e-5


def test_the_head_gives_logits_again_after_an_error() -> None:
    model, batch = lean.patch(make()), example()
    with pytest.raises(ValueError, match=r"labels \[3, 15\]"):
        lean.loss(model, {**batch, "labels": batch["labels"][:, 1:]})
    assert model(batch["input_ids"]).logits.shape == (3, 16, VOCABULARY)


def test_to_count_activations_keeps_nothing_alive() -> None:
    model = lean.patch(make())
    lean.activations(model, example())
    weight = weakref.ref(model.lm_head.weight)
    del model
    gc.collect()
    assert weight() is None
