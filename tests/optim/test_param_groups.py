"""Which weights a model's owner gets projected without naming them."""

import pytest
import torch
from torch import nn

from lilliput import optim
from lilliput.tasks import Supervised


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.attn = nn.Linear(16, 16)
        self.mlp = nn.Linear(16, 40, bias=False)
        self.conv = nn.Conv2d(8, 16, 3)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 50, bias=False)

    def get_output_embeddings(self):
        return self.head


def names(groups):
    return [set(group["names"]) for group in groups]


def test_linear_layers_but_not_the_head_are_projected():
    projected, ordinary = names(optim.param_groups(Tiny(), rank=4))
    assert projected == {"attn.weight", "mlp.weight"}
    assert ordinary == {
        "embed.weight",
        "attn.bias",
        "conv.weight",
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "head.weight",
    }


def test_all_adds_convolutions_and_the_head():
    projected, _ = names(optim.param_groups(Tiny(), rank=4, targets="all"))
    assert projected == {"attn.weight", "mlp.weight", "conv.weight", "head.weight"}


def test_targets_are_parts_of_module_names():
    projected, _ = names(optim.param_groups(Tiny(), rank=4, targets=["mlp", "conv"]))
    assert projected == {"mlp.weight", "conv.weight"}


def test_matrices_not_above_the_rank_stay_ordinary():
    with pytest.raises(ValueError, match="both sides longer than rank 16"):
        optim.param_groups(Tiny(), rank=16)


def test_frozen_and_tied_weights_appear_at_most_once():
    model = Tiny()
    model.head.weight = model.embed.weight
    model.attn.weight.requires_grad_(False)
    groups = optim.param_groups(model, rank=4)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == sum(p.requires_grad for p in model.parameters())
    assert names(groups)[0] == {"mlp.weight"}


def test_options_reach_the_projected_group():
    optimizer = optim.GaLoreAdamW(optim.param_groups(Tiny(), rank=4, proj_type="continuous", scale=1.0), lr=1e-3)
    assert optimizer.param_groups[0]["proj_type"] == "continuous" and optimizer.param_groups[0]["scale"] == 1.0
    assert optimizer.param_groups[0]["update_proj_gap"] == 200 and "rank" not in optimizer.param_groups[1]


@pytest.mark.parametrize(
    ("family", "projected"),
    [("Mixtral", "qkvo"), ("Qwen3Moe", "qkvo"), ("Qwen2Moe", ["q", "k", "v", "o", "gate", "up", "down"])],
)
def test_stacks_of_experts_are_said_to_stay_whole(family, projected):
    """4 experts of 3 matrices 16 x 24; Qwen2's model has one more for all tokens, of linear layers."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=16, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts=4, num_experts_per_tok=2,
        shared_expert_intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    share = 4 * 3 * 16 * 24 / sum(p.numel() for p in model.parameters())
    with pytest.warns(UserWarning, match=rf"2 stacks of matrices, such as .*gate_up_proj .* are {share:.0%} of"):
        groups = optim.param_groups(model, rank=4)
    assert [name.split(".")[-2] for name in groups[0]["names"]] == [f"{kind}_proj" for kind in projected]


@pytest.mark.parametrize("lean", [True, False])
def test_gpt2_is_linear_to_everyone_whether_lean_or_not(lean):
    transformers = pytest.importorskip("transformers")
    from lilliput import lean as lean_
    from lilliput.models.adapters import lora
    from lilliput.subspace import replace_with_subspace

    def gpt2():
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
        return lean_.patch(model) if lean else model

    names = ["c_attn", "c_proj", "c_fc", "c_proj"]
    found = [name.split(".")[-2] for name in optim.param_groups(gpt2(), rank=4)[0]["names"]]
    assert found == names
    assert [n.split(".")[-1] for n in replace_with_subspace(gpt2(), rank=4).layers] == names
    pytest.importorskip("peft")
    assert lora(gpt2(), 2, targets=["c_fc"]) is not None


def test_a_transposed_linear_layer_takes_a_slice():
    """What a module says of its own shape follows its weight: (in, out) in GPT-2's Conv1D."""
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    task = Supervised(nn.Sequential(conv1d(8, 6), nn.ReLU(), conv1d(5, 8)))
    w, b, v, c = task.init()["params"].values()
    narrow = {"0.weight": w[:, :3], "0.bias": b[:3], "2.weight": v[:3], "2.bias": c}
    x = torch.randn(4, 6)
    torch.testing.assert_close(task.resident(narrow)(x), (x @ w[:, :3] + b[:3]).relu() @ v[:3] + c)


def test_a_rank_for_plain_parameters_projects_what_exceeds_it():
    model = Tiny()
    optimizer = optim.GaLoreAdamW(model.parameters(), lr=1e-3, rank=4, proj_type="left")
    high, low = optimizer.param_groups
    assert {tuple(p.shape) for p in high["params"]} == {(50, 16), (16, 16), (40, 16), (16, 8, 3, 3)}
    assert all(p.dim() == 1 for p in low["params"]) and high["proj_type"] == "left"


def test_compiled_models_have_the_same_groups():
    plain, compiled = Tiny(), torch.compile(Tiny(), backend="eager")
    strip = [{n.removeprefix("_orig_mod.") for n in part} for part in names(optim.param_groups(compiled, rank=4))]
    assert strip == names(optim.param_groups(plain, rank=4))
