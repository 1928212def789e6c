"""Models of `transformers`: every boundary of blocks, to the bit; adapters; tied weights; models without weights."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from exact import apply, difference, logits, states_are_divided
from tiny import HIDDEN, LAYERS, MODELS, WORDS, batch, gpt2, t5, vit
from torch import nn

import lilliput
from lilliput import splitter

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*are one tensor of:UserWarning")


@pytest.mark.parametrize("name", MODELS)
def test_every_boundary_of_blocks_to_the_bit(name: str) -> None:
    model = MODELS[name]()
    for at in range(LAYERS + 1):
        parts = lilliput.split(model, at)
        states_are_divided(model, parts)
        assert difference(model, parts, batch(name)) == 0.0, at
        assert difference(model, parts, batch(name, 1, 5), training=False) == 0.0, at


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "distilbert", "vit", "t5"])
def test_only_activations_and_the_mask_travel(name: str) -> None:
    client, _ = lilliput.split(MODELS[name](), 1)
    given = batch(name, 3, 7)
    payload = client(**given)
    if name == "vit":
        assert payload.shape == (3, 5, HIDDEN)
        return
    assert set(payload) == {"hidden_states", "attention_mask"} | ({"position_bias"} if name == "t5" else set())
    assert payload["hidden_states"].shape == (3, 7, HIDDEN)
    assert torch.equal(payload["attention_mask"], given["attention_mask"])
    assert all(x.shape[0] == 3 for x in payload.values())
    last, _ = lilliput.split(MODELS[name](), LAYERS)
    assert isinstance(last(**given), torch.Tensor)  # no mask is needed after the last block


def test_what_reaches_the_server_does_not_depend_on_ids_but_through_the_payload() -> None:
    client, server = lilliput.split(gpt2().eval(), 1)
    payload = client(**batch("gpt2"))
    server.eval()
    first = server(payload).logits
    client(**batch("gpt2"))  # other private inputs go by
    assert torch.equal(server({n: x.clone() for n, x in payload.items()}).logits, first)
    assert [name for name, x in payload.items() if not x.is_floating_point()] == ["attention_mask"]


def test_t5_sends_its_one_bias_once_per_example() -> None:
    model = t5()
    parts = lilliput.split(model, 2)
    payload = parts[0](**batch("t5"))
    assert payload["position_bias"].shape[0] == 4 and payload["position_bias"].stride(0) == 0
    model.eval(), parts[0].eval(), parts[1].eval()
    given = batch("t5")
    payload = parts[0](**given)
    dense = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in payload.items()}  # off a wire
    assert torch.equal(logits(parts[1](payload)), logits(model(**given)))
    assert torch.allclose(logits(parts[1](dense)), logits(model(**given)), atol=1e-6)  # summed in another order


def test_inputs_that_the_cut_has_not_seen_are_refused() -> None:
    given = batch("gpt2")
    client, _ = lilliput.split(gpt2(), 1, example={"input_ids": given["input_ids"]})
    assert client(given["input_ids"]).shape == (4, 9, HIDDEN)
    with pytest.raises(ValueError, match="cut without an input 'attention_mask'"):
        client(**given)


def test_an_incomplete_payload_is_refused() -> None:
    client, server = lilliput.split(t5(), 2)
    payload = client(**batch("t5"))
    with pytest.raises(ValueError, match="payload has no 'position_bias'"):
        server({name: x for name, x in payload.items() if name != "position_bias"})


@pytest.mark.parametrize("tied, trained", [("untie", True), ("sync", True), ("frozen", False)])
def test_tied_weights_become_two(tied: Any, trained: bool) -> None:
    model = gpt2()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        client, server = lilliput.split(model, 1, tied=tied)
    told = [str(w.message) for w in caught if "one tensor of" in str(w.message)]
    table, head = client.transformer.wte.weight, server.lm_head.weight
    assert len(told) == (tied == "untie") and all(f"{WORDS * HIDDEN * 4:,} bytes" in text for text in told)
    assert torch.equal(table, head) and table.data_ptr() != head.data_ptr()
    assert table.requires_grad is head.requires_grad is trained
    assert server.tied == ({} if tied == "untie" else {"lm_head.weight": "transformer.wte.weight"})
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(client) + count(server) == count(model) + WORDS * HIDDEN


def test_gradients_of_a_tied_table_add_up_exactly() -> None:
    model = gpt2()
    client, server = lilliput.split(model, 1, tied="sync")
    assert difference(model, (client, server), batch("gpt2")) == 0.0
    both = client.transformer.wte.weight.grad + server.lm_head.weight.grad
    assert torch.equal(both, model.transformer.wte.weight.grad)


def test_an_unknown_option_for_tied_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="choose untie, frozen or sync"):
        lilliput.split(gpt2(), 1, tied="share")  # type: ignore[arg-type]


def test_adapters_are_kept_and_only_they_are_trained() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(gpt2(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a frozen table is tied without a word
        parts = lilliput.split(model, "h.1")
    states_are_divided(model, parts)
    trained = [[n for n, p in part.named_parameters() if p.requires_grad] for part in parts]
    assert [len(names) for names in trained] == [2, 2 * (LAYERS - 1)] and all(
        "lora" in n for names in trained for n in names
    )
    assert sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad) == LAYERS * 2 * 4 * HIDDEN
    assert difference(model, parts, batch("gpt2")) == 0.0


@pytest.mark.parametrize("how", ["meta", "init_empty_weights"])
def test_a_device_builds_its_part_without_the_servers_weights(how: str) -> None:
    if how == "meta":
        context: Any = torch.device("meta")
    else:
        context = pytest.importorskip("accelerate").init_empty_weights()
    with context:
        bare = gpt2()
    whole = gpt2().eval()
    client, server = lilliput.split(bare, 1)
    assert all(p.device.type == "meta" for part in (client, server) for p in part.parameters())
    for part in (client, server):
        part.load_state_dict({name: whole.state_dict()[name] for name in part.state_dict()}, assign=True)
        part.eval()
    given = batch("gpt2")
    assert torch.equal(server(client(**given)).logits, whole(**given).logits)


def test_a_u_shape_keeps_ids_labels_and_head_on_the_device() -> None:
    model = gpt2()
    parts = lilliput.split(model, ("h.1", "ln_f"))
    states_are_divided(model, parts)
    assert set(parts[2].state_dict()) == {"transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"}
    assert difference(model, parts, batch("gpt2")) == 0.0
    deep = lilliput.split(model, (1, 2))
    middle = deep[1](deep[0](**batch("gpt2")))
    assert {name: tuple(x.shape) for name, x in middle.items()} == {
        "hidden_states": (4, 9, HIDDEN),
        "attention_mask": (4, 9),
    }
    assert difference(model, deep, batch("gpt2")) == 0.0


def test_an_encoder_and_decoder_is_cut_when_its_decoders_ids_may_travel() -> None:
    import transformers

    config = transformers.T5Config(vocab_size=WORDS, d_model=HIDDEN, d_kv=4, d_ff=20, num_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config)
    given = {**batch("t5"), "decoder_input_ids": torch.randint(1, WORDS, (4, 6))}
    with pytest.raises(ValueError, match="depends on the input decoder_input_ids"):
        lilliput.split(model, 1, example=given)
    parts = lilliput.split(model, 1, example=given, shared=("attention_mask", "decoder_input_ids"))
    assert difference(model, parts, given) == 0.0


def test_blocks_that_run_are_those_configured() -> None:
    client, server = lilliput.split(gpt2(layers=5), 2)
    given = batch("gpt2")
    with splitter.calls(client) as first:
        payload = client(**given)
    with splitter.calls(server) as second:
        server(payload)
    blocks = lambda order: [n for n in order if n in {f"transformer.h.{i}" for i in range(5)}]  # noqa: E731
    assert blocks(first) == ["transformer.h.0", "transformer.h.1"]
    assert blocks(second) == ["transformer.h.2", "transformer.h.3", "transformer.h.4"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_full_size(name: str) -> None:
    import transformers

    if name == "gpt2":
        model: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        given = {**batch("gpt2", 2, 16)}
        assert sum(p.numel() for p in model.parameters()) == 124_439_808
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig())
        given = {"pixel_values": torch.randn(2, 3, 224, 224)}
    parts = lilliput.split(model, 6, example=given)
    assert difference(model, parts, given) == 0.0


def test_images_need_no_mask() -> None:
    model = vit().eval()
    client, server = lilliput.split(model, 1)
    given = batch("vit", 3)
    assert torch.equal(server(client(given["pixel_values"])).logits, apply(model, given).logits)
