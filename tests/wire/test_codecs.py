import pickle
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bodies import bits, bodies
from lilliput import wire
from lilliput.core import random
from lilliput.core.tree import tensors
from lilliput.wire.codecs import CODECS, PREFIX, bf16, build, chain, int8, is_built

KEY = (0, 1, 2, 3, "up")


@dataclass(frozen=True)
class Affine:
    """Sends factor * x + shift for one top-level tensor x, with a shift that depends on the key."""

    kind: str
    factor: float

    def encode(self, body, key):
        shift = random.key(*key) % 7
        return {**body, self.kind: self.factor * body[self.kind] + shift, f"{PREFIX}affine{self.factor}": shift}

    def decode(self, body):
        body = dict(body)
        shift = body.pop(f"{PREFIX}affine{self.factor}")
        return {**body, self.kind: (body[self.kind] - shift) / self.factor}


def structure(x):
    """Names in order, shapes, dtypes; values of what is no tensor."""
    if isinstance(x, Tensor):
        return tuple(x.shape), x.dtype
    return [(name, structure(value)) for name, value in x.items()] if isinstance(x, dict) else bits(x)


@pytest.mark.parametrize("name", [*CODECS, "bf16+none", "none+bf16", "int8+bf16", "int8:a/b+bf16:params"])
@given(body=bodies)
@settings(deadline=None, max_examples=50)
def test_decoding_returns_names_shapes_dtypes_and_values_that_are_no_tensors(name, body):
    codec = build(name)
    sent = codec.encode(body, KEY)
    assert list(sent)[: len(body)] == list(body)
    assert all(extra.startswith(PREFIX) for extra in list(sent)[len(body) :])
    assert structure(codec.decode(wire.decode(wire.encode(sent)))) == structure(body)


@given(bodies)
@settings(deadline=None, max_examples=50)
def test_bf16_rounds_float32_and_float64_and_nothing_else(body):
    body = {name: value for name, value in body.items() if not name.startswith(PREFIX)}
    for before, after in zip(tensors(body), tensors(bf16().decode(bf16().encode(body))), strict=True):
        rounded = before.dtype in (torch.float32, torch.float64)
        assert bits(after) == bits(before.to(torch.bfloat16).to(before.dtype) if rounded else before)


def test_bf16_shifts_the_payload_within_one_part_in_256():
    body = {"params": {"w": torch.randn(1000, generator=random.generator("bf16"))}, "step": torch.tensor([7])}
    sent = bf16().encode(body)
    assert wire.kinds(sent) == {"params": 2000, "step": 8, "codec.bf16": 0}
    back = bf16().decode(sent)["params"]["w"]
    assert ((back - body["params"]["w"]).abs() <= body["params"]["w"].abs() / 256).all()
    assert body["params"]["w"].dtype is torch.float32  # what was sent is left alone


def test_bf16_costs_a_few_bytes_of_header_whatever_the_number_of_float32_tensors():
    body = {"params": {f"w{i}": torch.zeros(4) for i in range(50)}}
    row = len(r',"values":"[[50,\"codec.bf16\",{}]]"')
    size = wire.nbytes(body), wire.nbytes(bf16().encode(body))
    assert size[1].overhead - size[0].overhead <= row + 50 + 64  # "BF16" is a letter longer than "F32"; padding


def test_a_chain_decodes_in_reverse_and_gives_each_codec_its_own_key():
    body = {"delta": torch.arange(4.0), "params": torch.arange(4.0)}
    codec = chain(Affine("delta", 2.0), Affine("delta", 4.0), bf16())
    sent = codec.encode(body, KEY)
    first, second = (random.key(*KEY, place) % 7 for place in (0, 1))
    assert torch.equal(sent["delta"].float(), 4 * (2 * body["delta"] + first) + second)
    back = codec.decode(wire.decode(wire.encode(sent)))
    assert bits(back) == bits(body)
    assert bits(chain().encode(body, KEY)) == bits(chain().decode(body)) == bits(body)


def test_a_codec_may_treat_one_kind_and_leave_the_others():
    body = {"delta": torch.ones(3), "params": torch.ones(3)}
    assert Affine("delta", 2.0).encode(body, KEY)["params"] is body["params"]


def test_codecs_are_values_that_travel_to_workers():
    for name in CODECS:
        assert pickle.loads(pickle.dumps(build(name))) == build(name)
    assert build("bf16+bf16") == chain(bf16(), bf16())
    assert build("int8:activations + bf16") == chain(int8("cut", "gradient"), bf16())
    assert [is_built(x) for x in ("int8", "int8:cut", "int8+bf16", "mine.py:Codec")] == [False, True, True, False]


def test_bf16_twice_and_reserved_keys_are_refused():
    with pytest.raises(ValueError, match=r"'codec.bf16'.*rename it, or apply bf16 once"):
        build("bf16+bf16").encode({"w": torch.ones(1)}, KEY)


@pytest.mark.parametrize(
    ("name", "hint"), [("bf61", "did you mean 'bf16'"), ("", "choose one of bf16, int8, none"), ("bf16+x", "'x'")]
)
def test_an_unknown_codec_is_refused_with_the_nearest(name, hint):
    with pytest.raises(ValueError, match=hint):
        build(name)


@pytest.mark.parametrize(
    "notes",
    [
        *(None, 3, "float32", torch.ones(1), {"b": "float64"}, {"a": "float16"}, {"a": 1}, {"a": {}}, {"c": {}}),
        *({"n": "float64"}, {"f": "float64"}, {"inner": "float64"}, {"inner": {"y": "float64"}}, {"inner": {"x": {}}}),
    ],
)
def test_forged_notes_are_wire_errors(notes):
    body = {
        "a": torch.ones(2, dtype=torch.bfloat16), "f": torch.ones(2), "n": 1,
        "inner": {"x": torch.ones(2, dtype=torch.bfloat16)}, "codec.bf16": notes,
    }  # fmt: skip
    with pytest.raises(wire.WireError, match=r"codec\.bf16"):
        bf16().decode(body)


def test_a_body_that_bf16_did_not_code_is_a_wire_error():
    with pytest.raises(wire.WireError, match="same codec on both sides"):
        bf16().decode({"w": torch.ones(2)})


notes = st.recursive(st.none() | st.integers() | st.text(max_size=9), lambda x: st.dictionaries(st.text(max_size=2), x))


@given(bodies, notes)
@settings(deadline=None)
def test_any_notes_are_refused_or_keep_names_and_shapes(body, notes):
    try:
        back = bf16().decode({**body, "codec.bf16": notes})
    except wire.WireError:
        return
    assert list(back) == list(body)
    assert [x.shape for x in tensors(back)] == [x.shape for x in tensors(body)]
