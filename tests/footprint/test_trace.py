"""A step on fake tensors needs what the allocator says that the same step really takes."""

import pytest
import torch
from torch import nn

from allocator import materialised, peak, trained
from lilliput import footprint, models
from lilliput.footprint import Setting, Steps, trace
from lilliput.optim import lowbit
from lilliput.tasks.supervised import Supervised
from lilliput.training.settings import Training

pytest.importorskip("transformers")

LLAMA = {
    "model": "llama_9m", "model_options": {"layers": 3, "hidden": 64, "mlp": 160, "vocabulary": 600},
    "batch_size": 4, "max_length": 64,
}  # fmt: skip
REFRESHED = {"rank": 16, "update_proj_gap": 2}  # in the third step, when all state is there
CONFIGURATIONS = {
    "AdamW": {"lean": False},
    "GaLore": {"optimizer": "galore_adamw", "optimizer_options": REFRESHED, "lean": False},
    "8-bit, per layer": {"optimizer": "galore_adamw8bit", "optimizer_options": REFRESHED, "per_layer": True},
    "bf16, checkpointing": {"dtype": "bf16", "checkpointing": True, "lean": False},
    "autocast, lean": {"precision": "bf16"},
    "PCA, bf16, accumulation, lean": {
        "optimizer": "online_subspace_adamw", "optimizer_options": {"rank": 16}, "dtype": "bf16", "accumulate": 2,
    },
    "APOLLO": {"optimizer": "apollo", "optimizer_options": REFRESHED},
    "LoRA": {"lora": 4},
    "subspace": {"subspace": 16, "lean": False},
    "subspace, autocast, lean": {"subspace": 16, "precision": "bf16", "optimizer": "sgd"},
    "padding": {"padded": True},
    "torch's SGD": {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}},
}  # fmt: skip


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_the_peak_is_the_allocators(changes):
    setting = Setting(**{**LLAMA, "device": "cpu", **changes})
    estimate = footprint.measured(setting, certify=True)
    measured = peak(lambda: trained(setting, setting.module()))
    assert estimate.certified
    assert estimate.peak == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(model="resnet20", batch_size=8, optimizer="sgd", device="cpu"),
        Setting(model="char_lm", classes=40, batch_size=4, max_length=32, device="cpu"),
        Setting(model="mlp", shape=(1, 8, 8), optimizer="lion", batch_size=64, device="cpu"),
    ],
    ids=lambda s: s.model,
)
def test_so_it_is_for_models_of_other_kinds(setting):
    estimate = footprint.measured(setting)
    assert estimate.peak == pytest.approx(peak(lambda: trained(setting, setting.module())), rel=0.05)


@pytest.mark.parametrize("changes", [{}, {"per_layer": True}, {"accumulate": 2}, {"clip": 1.0}], ids=str)
def test_so_it_is_for_a_federated_clients_step(changes):
    model = models.build("char_lm", shape=(32,), classes=40, hidden=64)
    config = Training(lr=0.1, momentum=0.9, **changes)
    batch = (torch.randint(40, (4, 32)), torch.randint(40, (4, 32)))

    def make(module: nn.Module) -> Steps:
        return Steps(module, config, Supervised(module).loss)

    def train() -> None:
        training = make(materialised(Setting(model=model, lean=False).module()))
        for _ in range(3):
            training.step(tuple(x.clone() for x in batch))

    assert trace(model, make, batch, "cpu").peak == pytest.approx(peak(train), rel=0.05)


def test_kinds_are_counted_to_the_byte():
    setting = Setting(**{**LLAMA, "optimizer": "galore_adamw", "optimizer_options": {"rank": 16}})
    model, found = setting.module(), footprint.measured(setting, certify=True)
    parameters = sum(p.numel() for p in model.parameters())
    square, tall = 4 * (2 * 64 * 16), 3 * (2 * 160 * 16)  # moments in the subspace of a layer's matrices
    rest = parameters - 3 * (4 * 64 * 64 + 3 * 64 * 160)
    assert found.weights == 4 * parameters + sum(b.nbytes for b in model.buffers())
    assert found.gradients == 4 * parameters
    assert found.states == 4 * (3 * (square + tall) + 2 * rest)
    assert found.projections == 4 * 3 * 7 * 64 * 16
    assert found.peak <= found.total and sum(found.at_peak.values()) == found.peak


def test_a_client_in_a_subspace_counts_its_b_duals_and_bases():
    found = footprint.measured(Setting(**{**LLAMA, "subspace": 16, "optimizer": "adam"}))
    b = 3 * 16 * (4 * 64 + 2 * 160 + 64)  # of three layers: q, k, v, o, gate, up, down
    rest = 2 * 600 * 64 + 7 * 64  # embedding, head and norms
    assert found.gradients == 4 * (b + rest)
    # Duals, the sums of gradients that they learn from, Adam's moments, its step of each of 30 parameters.
    assert found.states == 4 * (2 * b + 2 * (b + rest) + 30)
    assert found.projections == 3 * 7 * 16 * (8 + 4)  # columns and signs
    plain = footprint.measured(Setting(**{**LLAMA, "subspace": 16, "optimizer": "sgd"}))
    assert plain.states == 4 * b  # SGD weighs every gradient alike, so that the change of b tells their sum


def test_updates_in_the_backward_pass_hold_one_gradient():
    setting = Setting(**{**LLAMA, "per_layer": True})
    assert footprint.measured(setting, certify=True).gradients == 4 * 600 * 64  # the largest: a vocabulary's


def test_nothing_is_changed_or_left_behind():
    model = models.build("mlp", shape=(8,), classes=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    footprint.estimate(model, shape=(8,), optimizer="adamw8bit", batch_size=2)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    assert float(lowbit.codebook(True).max()) == 1.0  # a table of numbers, not a fake one
    assert float(torch.nn.functional.cross_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))) > 0.69


def test_adapters_and_a_subspace_exclude_each_other():
    with pytest.raises(ValueError, match="lora and subspace are two ways"):
        Setting(**LLAMA, lora=4, subspace=4)


def test_what_is_tied_counts_once():
    options = {"layers": 1, "hidden": 32, "heads": 2, "vocabulary": 500, "positions": 16}
    model = Setting(model="gpt2", model_options=options).module()
    found = footprint.estimate(model, batch_size=2, max_length=16, lean=False)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.gradients == 4 * found.parameters


def test_in_a_subspace_a_lean_client_needs_two_thirds_of_fedavgs_memory():
    """LLaMA-60M, batch 4 x 256, SGD: b of rank 64 on lean layers beside all weights on transformers' own."""
    given = {"optimizer": "sgd", "batch_size": 4, "max_length": 256, "device": "cpu"}
    ours = footprint.estimate("llama_60m", subspace=64, **given).peak
    assert ours <= 0.65 * footprint.estimate("llama_60m", lean=False, **given).peak
