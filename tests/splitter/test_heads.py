"""Auxiliary heads: of the published size, fresh or copied, differentiable twice; a wrong width is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from exact import IMAGES, apply, convolutional, logits
from tiny import HIDDEN, LAYERS, MODELS, WORDS, batch, gpt2
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lilliput
from lilliput import models, splitter
from lilliput.splitter import Split, check_auxiliary

pytestmark = pytest.mark.filterwarnings("ignore:.*are one tensor of:UserWarning")


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_of_resnet18_it_has_the_published_bytes() -> None:
    model = models.build("resnet18", shape=(3, 32, 32), classes=10)
    client, server = lilliput.split(model, "layer3")
    head = lilliput.auxiliary(server)
    nbytes = lambda m: sum(x.nbytes for x in (*m.parameters(), *m.buffers()))  # noqa: E731
    assert [nbytes(m) for m in (client, server, head)] == [2_740_048, 42_025_080, 8_419_408]
    assert size(head) == 2_102_282 and head(client(torch.randn(2, 3, 32, 32))).shape == (2, 10)


@pytest.mark.parametrize("depth, kept", [(0, []), (1, ["layer3"]), (2, ["layer3", "layer4"])])
def test_stages_of_a_convolutional_server(depth: int, kept: list[str]) -> None:
    client, server = lilliput.split(convolutional(), "layer3", example=IMAGES)
    head = lilliput.auxiliary(server, depth)
    width = {0: 8, 1: 16, 2: 32}[depth]
    assert size(head) == sum(size(server.get_submodule(name)) for name in kept) + 5 * width + 5
    assert head(client(IMAGES)).shape == (4, 5)
    assert size(lilliput.auxiliary(server, 9)) == size(server)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "t5"])
def test_blocks_of_a_transformer_keep_its_norm_and_head_and_differentiate_twice(name: str) -> None:
    client, server = lilliput.split(MODELS[name](), 1)
    head = lilliput.auxiliary(server)
    payload = apply(client, batch(name))
    floats = (
        {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in payload.items()}
        if isinstance(payload, dict)
        else payload.detach().requires_grad_()
    )
    with splitter.calls(head) as order, sdpa_kernel(SDPBackend.MATH):
        out = logits(head(floats))
        leaf = floats["hidden_states"] if isinstance(floats, dict) else floats
        (first,) = torch.autograd.grad(out.logsumexp(-1).sum(), leaf, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), list(head.parameters()), allow_unused=True)
    assert out.shape == logits(server(payload)).shape
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in second) > 5
    block = server.at.rpartition(".")[0]
    assert [n for n in order if n.rpartition(".")[0] == block] == [f"{block}.1"]


def test_deeper_heads_run_more_blocks() -> None:
    _, server = lilliput.split(gpt2(layers=4), 1)
    head = lilliput.auxiliary(server, 2)
    assert sum(name.endswith("ln_1.weight") for name, _ in head.named_parameters()) == 2


@pytest.mark.parametrize("make, at", [(convolutional, "layer3"), (gpt2, 1)])
def test_weights_are_fresh_or_the_servers(make: Any, at: Any) -> None:
    _, server = lilliput.split(make(), at)
    torch.manual_seed(1)
    fresh = lilliput.auxiliary(server)
    torch.manual_seed(1)
    again = lilliput.auxiliary(server)
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), again.parameters(), strict=True))
    copied = lilliput.auxiliary(server, weights="server")
    held = [p for p in server.parameters() if p.dim() > 1]

    def same(head: nn.Module) -> int:
        return sum(
            any(p.shape == q.shape and torch.equal(p, q) for q in held) for p in head.parameters() if p.dim() > 1
        )

    assert same(fresh) == 0 and same(copied) >= sum(p.dim() > 1 for p in copied.parameters()) - 1
    assert all(p.requires_grad for p in fresh.parameters())


def test_fresh_weights_of_transformers_follow_their_own_rule() -> None:
    _, server = lilliput.split(gpt2(initializer_range=0.3), 1)
    head = lilliput.auxiliary(server)
    assert head.get_parameter("lm_head.weight").std().item() == pytest.approx(0.3, rel=0.1)
    assert (head.get_parameter("transformer.h.1.attn.c_attn.bias") == 0).all()


def test_heads_for_large_vocabularies() -> None:
    _, server = lilliput.split(gpt2(), 1)
    full, low = lilliput.auxiliary(server), lilliput.auxiliary(server, head="low_rank", rank=3)
    assert size(full) - size(low) == WORDS * HIDDEN - 3 * (WORDS + HIDDEN)
    frozen = lilliput.auxiliary(server, head="frozen")
    table = frozen.get_parameter("lm_head.weight")
    assert not table.requires_grad and torch.equal(table, server.get_parameter("lm_head.weight"))
    assert all(p.requires_grad for n, p in frozen.named_parameters() if n != "lm_head.weight")


def test_a_large_head_is_told_with_its_bytes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 80), nn.Linear(80, 40_000))
    _, server = lilliput.split(model, "1")
    with pytest.warns(UserWarning, match=r"last layer has 12,800,000 of its .* head='low_rank' has 10,260,480"):
        lilliput.auxiliary(server, weights="server")


def test_another_number_of_classes() -> None:
    client, server = lilliput.split(convolutional(), "layer3", example=IMAGES)
    assert lilliput.auxiliary(server, classes=7)(client(IMAGES)).shape == (4, 7)


def test_a_last_layer_with_a_transposed_weight_is_linear_too() -> None:
    """GPT-2's Conv1D: (in, out)."""
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    assert tuple(splitter.probes.guess(nn.Sequential(conv1d(7, 6))).shape) == (2, 6)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = conv1d(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).tanh()

    model = nn.Sequential(nn.Sequential(Block(), Block(), Block()), conv1d(5, 6))
    client, server = lilliput.split(model, "0.1", example=torch.randn(4, 6))
    payload = client(torch.randn(4, 6))
    assert lilliput.auxiliary(server, classes=7)(payload).shape == (4, 7)
    low, frozen = (lilliput.auxiliary(server, head=kind, rank=2) for kind in ("low_rank", "frozen"))
    assert low(payload).shape == frozen(payload).shape == (4, 5)
    assert {tuple(p.shape) for p in frozen.parameters() if not p.requires_grad} == {(6, 5), (5,)}


def test_heads_are_copied_and_pickled() -> None:
    client, server = lilliput.split(gpt2().eval(), 1)
    head = lilliput.auxiliary(server).eval()
    payload = client(**batch("gpt2"))
    for again in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(again(payload).logits, head(payload).logits)


def test_a_head_that_does_not_fit_is_refused() -> None:
    client, server = lilliput.split(convolutional(), "layer3", example=IMAGES)
    narrow = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5))
    for given in (server, client, client(IMAGES)):
        with pytest.raises(ValueError, match=r"cannot take what the device sends, \(\d, 8, 1, 1\)"):
            check_auxiliary(given, narrow)
    wide = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))
    with pytest.raises(ValueError, match="gives 6 outputs where 5 are needed; change"):
        check_auxiliary(server, wide)
    with pytest.raises(ValueError, match="gives 6 outputs where 5 are needed; change"):
        check_auxiliary(client(IMAGES), wide, server)
    check_auxiliary(client, wide, classes=6)
    with pytest.raises(ValueError, match="gives 6 outputs where 5 are needed"):
        Split.of(convolutional(), "layer3", auxiliary=wide, example=IMAGES)


def test_what_no_head_is_derived_from() -> None:
    with pytest.raises(ValueError, match="the last part that"):
        lilliput.auxiliary(nn.Linear(3, 3))
    _, middle, _ = lilliput.split(gpt2(), (1, LAYERS))
    with pytest.raises(ValueError, match="the last part that"):
        lilliput.auxiliary(middle)
    _, server = lilliput.split(gpt2(), 1)
    for wrong in ({"depth": -1}, {"weights": "random"}, {"head": "big"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            lilliput.auxiliary(server, **wrong)  # type: ignore[arg-type]
