"""Which layers go into subspaces, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import lilliput
from lilliput.subspace import Dense, SubspaceConv2d, SubspaceLinear, subspace_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.v_proj(self.q_proj(x).tanh()))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(2).mean(1)[:, :8]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("targets", "skip", "expected"),
    [
        (None, (), ["conv", "layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]),
        (["q_proj"], (), ["layers.0.q_proj", "layers.1.q_proj"]),
        ("q_proj, head", ["1"], ["layers.0.q_proj", "head"]),
        (["layers.1.v_proj"], (), ["layers.1.v_proj"]),
        (
            ["q_proj", "v_proj"],
            0,
            ["layers.1.q_proj", "layers.1.v_proj"],
        ),  # a layer's number, as a shell's word is read
        (["layers.*_proj"], ["*.q_proj"], ["layers.0.v_proj", "layers.1.v_proj"]),
    ],
)
def test_targets(targets: Any, skip: Any, expected: list[str]) -> None:
    model = Net()
    subspace = lilliput.replace_with_subspace(model, targets, skip, rank=2)
    assert sorted(subspace.layers) == sorted(expected) == sorted(subspace_layers(model))
    assert subspace.layers.keys() == subspace.duals.keys() == subspace.projections.keys()
    for name, layer in subspace.layers.items():
        assert isinstance(layer, SubspaceConv2d if name == "conv" else SubspaceLinear)
        assert layer.b.shape[-1] == 2


def test_the_model_is_what_it_was_and_trains_fewer_numbers() -> None:
    model, x = Net(), torch.randn(2, 1, 6, 6)
    before, names = model(x), set(model.state_dict())
    subspace = lilliput.replace_with_subspace(model, ["q_proj", "v_proj"], rank=2)
    torch.testing.assert_close(model(x), before)
    assert names <= set(model.state_dict())
    # conv 2 * 9 + 2, head 8 * 3 + 3, norms 2 * 16, biases of q 2 * 8, and four b of 8 * 2.
    assert subspace.parameters == 20 + 27 + 32 + 16 + 4 * 16


@pytest.mark.parametrize(("rank", "expected"), [(3, 3), (0.25, 2), (0.01, 1), (1.0, 8), ({"q_proj": 5}, 5)])
def test_rank(rank: Any, expected: int) -> None:
    layers = lilliput.replace_with_subspace(Net(), ["q_proj"], rank=rank).layers
    assert {layer.b.shape[-1] for layer in layers.values()} == {expected}


def test_a_basis_of_ones_own() -> None:
    basis = Dense(torch.eye(8)[:3])
    layers = lilliput.replace_with_subspace(Net(), ["q_proj"], rank=3, projection=lambda *_: basis).layers
    assert all(torch.equal(layer.basis.dense(), basis.matrix) for layer in layers.values())


def test_the_layers_of_gpt2_and_other_families() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=11, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(6)[None]
    before = model(ids).logits
    layers = lilliput.replace_with_subspace(model, ["c_attn", "c_fc", "c_proj"], rank=4).layers
    assert len(layers) == 2 * 4  # c_proj is in attention and in the MLP
    torch.testing.assert_close(model(ids).logits, before)
    layers["transformer.h.0.attn.c_attn"].b.data.normal_()
    layers["transformer.h.0.attn.c_attn"].fold()
    assert not torch.equal(model(ids).logits, before)


def test_dense_gives_a_plain_model_with_what_b_has_learnt() -> None:
    model, x = Net(), torch.randn(2, 1, 6, 6)
    names = list(model.state_dict())
    subspace = lilliput.replace_with_subspace(model, rank=2, projection="ss")
    for layer in subspace.layers.values():
        nn.init.normal_(layer.b)
    held = {n: t.clone() for n, t in model.state_dict().items()}
    plain = lilliput.dense(model)
    assert list(plain.state_dict()) == names
    torch.testing.assert_close(plain(x), model(x))
    assert type(plain.conv) is nn.Conv2d and type(plain.layers[0].q_proj) is nn.Linear
    assert all(p.requires_grad for p in plain.parameters())
    again = Net()
    again.load_state_dict(plain.state_dict())
    torch.testing.assert_close(again(x), model(x))
    plain.conv.weight.data.add_(1), plain.conv.bias.data.add_(1)
    assert all(torch.equal(t, held[n]) for n, t in model.state_dict().items())
    assert list(lilliput.dense(Net()).state_dict()) == names


def test_dense_gives_gpt2_its_own_layers_back() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11, n_positions=8)
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.arange(6)[None]
    names, kind = list(model.state_dict()), type(model.transformer.h[0].attn.c_attn)
    for layer in lilliput.replace_with_subspace(model, ["c_attn", "c_fc"], rank=4).layers.values():
        nn.init.normal_(layer.b)
    plain = lilliput.dense(model)
    assert list(plain.state_dict()) == names and type(plain.transformer.h[0].attn.c_attn) is kind
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)


def tied() -> nn.Module:
    model = Net()
    model.layers[0].q_proj.weight = model.layers[1].q_proj.weight  # type: ignore[union-attr, assignment]
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["k_proj"]}, "no layer of Net is called 'k_proj'; did you mean"),
        ({"targets": ["norm"]}, "layers.0.norm is a LayerNorm; only linear layers and 2-d convolutions"),
        ({"targets": ["q_proj"], "skip": ["layers"]}, "no linear or convolutional layer of Net is left"),
        ({"targets": ["q_proj"], "skip": ["layer"]}, "skip: nothing of Net is called 'layer'"),
        ({"targets": ["q_proj"], "rank": 9}, "rank=9 does not fit layers.0.q_proj, whose width is 8"),
        ({"targets": ["q_proj"], "rank": 0}, "rank=0 does not fit layers.0.q_proj"),
        ({"targets": ["q_proj"], "rank": 1.5}, "rank=1.5 does not fit layers.0.q_proj"),
        ({"targets": ["q_proj"], "rank": {"v_proj": 2}}, "rank names no target that means layers.0.q_proj"),
        ({"targets": ["q_proj"], "projection": "qr"}, "projection='qr' is not one of cd, rd, ss, idx, svd"),
        ({"targets": ["q_proj"], "projection": "idx"}, "projection=idx is the identity: it needs rank=8"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=re.escape(message)):
        lilliput.replace_with_subspace(model, **settings)
    assert not any(isinstance(m, SubspaceLinear) for m in model.modules())  # all or nothing


def test_a_layer_in_several_places_is_replaced_in_all_of_them_and_comes_back() -> None:
    layer = nn.Linear(8, 8)
    model, x = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(8, 3)), torch.randn(4, 8)
    names = list(model.state_dict())
    own = lilliput.replace_with_subspace(model, rank=2).layers
    assert list(own) == ["0"] and model[0] is model[2]
    nn.init.normal_(own["0"].b)
    plain = lilliput.dense(model)
    assert list(plain.state_dict()) == names and plain[0] is plain[2] and type(plain[0]) is nn.Linear
    torch.testing.assert_close(plain(x), model(x))


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_a_weight_that_is_made_of_others_stays_ordinary_and_is_not_made_by_asking(norm: Any) -> None:
    model = nn.Sequential(norm(nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 3))
    before = {n: x.clone() for n, x in model.state_dict().items()}
    with pytest.raises(ValueError, match="0 has a weight that is made of others"):
        lilliput.replace_with_subspace(model, ["0"], rank=2)
    assert list(lilliput.replace_with_subspace(model, rank=2).layers) == ["1"]
    assert lilliput.optim.param_groups(model, rank=2)
    assert all(model.state_dict()[n].equal(x) for n, x in before.items())


def test_by_default_layers_whose_weight_is_anothers_stay_ordinary() -> None:
    assert not {"layers.0.q_proj", "layers.1.q_proj"} & lilliput.replace_with_subspace(tied(), rank=2).layers.keys()


def test_shared_weights_and_second_replacements_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers.0.q_proj shares its weight with layers.1.q_proj.weight"):
        lilliput.replace_with_subspace(tied(), ["q_proj"])
    model = Net()
    lilliput.replace_with_subspace(model, ["q_proj"])
    with pytest.raises(ValueError, match="is in a subspace already"):
        lilliput.replace_with_subspace(model, ["q_proj"])
