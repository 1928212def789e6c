"""The patch beside what else is done to a model: checkpointing, adapters, wrappers, derivatives, fakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from causal import LAYERS, example, furthest, make, results, stock_loss
from torch import nn
from torch._subclasses import FakeTensorMode

from lilliput import lean
from lilliput.tasks.recompute import checkpointed


@pytest.mark.parametrize("how", ["transformers", "lilliput"])
def test_activation_checkpointing(how: str) -> None:
    model, batch = make(), example()
    value, grads = results(model, batch, stock_loss)
    lean.patch(model)
    kept = lean.activations(model, batch)
    if how == "transformers":
        model.gradient_checkpointing_enable()
        found, ours = results(model, batch, lean.loss)
    else:
        with checkpointed(model):
            assert lean.activations(model, batch) < 0.4 * kept
            found, ours = results(model, batch, lean.loss)
    assert abs(found - value) <= 1e-6 * value and furthest(ours, grads) < 1e-5


def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(2)
    model, batch = peft.get_peft_model(make(), config), example()
    value, grads = results(model, batch, stock_loss)
    found, ours = results(lean.patch(model), batch, lean.loss)
    assert lean.patched(model)
    assert abs(found - value) <= 1e-6 * value and furthest(ours, grads) < 1e-5


def test_adapters_added_to_a_patched_model() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model, batch = peft.get_peft_model(lean.patch(make()), config), example()
    value, grads = results(model, batch, lean.loss)
    expected, theirs = results(lean.unpatch(model), batch, stock_loss)
    assert abs(expected - value) <= 1e-6 * value and furthest(grads, theirs) < 1e-5


def test_distributed_data_parallel(tmp_path: Path) -> None:
    model, batch = make(), example()
    _, grads = results(model, batch, stock_loss)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(lean.patch(model))
        lean.loss(wrapped, batch).backward()
        assert furthest([p.grad for p in model.parameters()], grads) < 1e-5
    finally:
        dist.destroy_process_group()


def test_second_derivatives_are_the_stock_models() -> None:
    """The gradient of half the squared norm of the gradient: a Hessian-vector product."""
    model, batch = make(attn_implementation="eager"), example()

    def curvature(loss):
        params = list(model.parameters())
        grads = torch.autograd.grad(loss(model, batch), params, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads) / 2, params))

    expected = curvature(stock_loss)
    lean.patch(model)
    assert furthest(curvature(lean.loss), expected) < 1e-4


def test_without_gradients_nothing_is_kept_and_the_loss_is_the_same() -> None:
    model, batch = lean.patch(make()), example()
    with torch.no_grad():
        value = lean.loss(model, batch)
    assert not value.requires_grad and value == lean.loss(model, batch)


def test_fake_tensors_have_the_bytes_of_real_ones() -> None:
    batch = example()
    rows, tokens = batch["labels"].shape
    kept = lean.activations(lean.patch(make()), batch)
    # transformers drops a mask that hides nothing, which it cannot tell of a fake: each layer has one in float32.
    masks = LAYERS * 4 * rows * tokens**2
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(x) for name, x in batch.items()}
        assert lean.activations(lean.patch(make()), fake) == kept + masks


def test_meta_tensors_have_gradients() -> None:
    with torch.device("meta"):
        model = lean.patch(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
        labels = torch.zeros(2, 3, dtype=torch.long)
        lean.cross_entropy(model(torch.randn(2, 3, 8)), model[1].weight, labels).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


class Whole(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return lean.loss(self.model, batch)


def test_function_transforms_take_the_plain_operations() -> None:
    whole, batch = Whole(lean.patch(make())), example()
    _, expected = results(whole.model, batch, lean.loss)
    params = {name: p.detach() for name, p in whole.named_parameters()}
    found = torch.func.grad(lambda params: torch.func.functional_call(whole, params, (batch,)))(params)
    assert furthest(list(found.values()), expected) < 1e-5
