"""int8: how far from the truth, on which side of it, and how many bytes."""

import pytest
import torch

from lilliput import wire
from lilliput.core import random
from lilliput.engines.device import joined
from lilliput.wire.codecs import build, int8
from lilliput.wire.codecs.int8 import BLOCK, LEVELS

KEY = (0, 1, 2, 3, "up")


def back(x, key=KEY, codec=None):
    codec = codec or int8()
    return codec.decode(wire.decode(wire.encode(codec.encode({"x": x}, key))))["x"]


def steps(x):
    """Each number's step: the range of its block over 255."""
    rows = x.flatten().double().split(BLOCK)
    return torch.cat([((r.max() - r.min()) / LEVELS).expand(len(r)) for r in rows]).view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, BLOCK), (7, 19), (2, 5, 129)])
def test_no_number_is_off_by_more_than_its_blocks_step(dtype, shape):
    draw = random.generator("int8", *shape)
    x = (torch.randn(shape, generator=draw) * torch.logspace(-3, 3, shape[-1])).to(dtype)
    after = back(x)
    assert after.dtype is dtype and after.shape == x.shape
    rounding = 4 * torch.finfo(dtype).eps * x.abs().max().double()  # of low, of the sum and of the dtype itself
    assert ((after.double() - x.double()).abs() <= steps(x) + rounding).all()


def test_rounding_is_right_on_average():
    x = torch.rand(BLOCK, generator=random.generator("int8"))
    runs = 4000
    mean = sum(back(x, (seed,)) for seed in range(runs)) / runs
    # A code's standard deviation is at most half a step: 512 means lie within 4.5 standard errors.
    assert ((mean - x).abs() <= 4.5 * 0.5 * steps(x) / runs**0.5).all()
    assert len({tuple(back(x[:30], (seed,)).tolist()) for seed in range(5)}) == 5


def test_the_same_key_rounds_alike():
    x = torch.randn(1000, generator=random.generator("int8"))
    assert torch.equal(back(x), back(x)) and not torch.equal(back(x), back(x, (*KEY, 1)))


def test_bytes_are_those_of_the_codes_and_of_a_range_per_block():
    body = {
        "cut": torch.rand(4, 2048),
        "params": torch.rand(BLOCK + 1),
        "labels": torch.arange(4),
        "tiny": torch.ones(3),
    }
    sent = int8().encode(body, KEY)
    ranges = 8 * (4 * 2048 // BLOCK + 2) + 8 * 1
    sizes = {"cut": 4 * 2048, "params": BLOCK + 1, "labels": 32, "tiny": 3, "codec.int8": ranges}
    assert wire.kinds(sent) == wire.kinds(wire.decode(wire.encode(sent))) == sizes
    meta = {name: x.to("meta") for name, x in body.items()}
    assert wire.kinds(int8().encode(meta, KEY)) == sizes and wire.nbytes(int8().encode(meta, KEY)) == wire.nbytes(sent)


def test_equal_numbers_are_exact_and_what_would_not_shrink_goes_as_it_is():
    for x in (torch.full((700,), 0.1), torch.randn(2), torch.randn(8).bfloat16(), torch.arange(999), torch.empty(0)):
        assert torch.equal(back(x), x)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bad):
    x = torch.randn(2 * BLOCK)
    x[3] = bad
    after = back(x)
    assert not after[3].isfinite() and after[BLOCK:].isfinite().all()


def test_int8_activations_and_bf16_models_are_one_setting():
    body = {"cut": {"0": torch.rand(2, 512)}, "delta": {"w": torch.rand(100)}, "labels": {"0": torch.arange(2)}}
    codec = build("int8:activations+bf16")
    sent = codec.encode(body, KEY)
    assert wire.kinds(sent) == {"cut": 1024, "delta": 200, "labels": 16, "codec.int8": 16, "codec.bf16": 0}
    after = codec.decode(sent)
    assert torch.equal(after["cut"]["0"], int8("cut").decode(int8("cut").encode(body, (*KEY, 0)))["cut"]["0"])
    assert torch.equal(after["delta"]["w"], body["delta"]["w"].bfloat16().float())


def test_the_notes_of_both_halves_of_a_message_are_kept():
    common, own = {"params": {"w": torch.rand(50)}}, {"gradient": {"0": torch.rand(60)}}
    message = joined(int8().encode(common, (1,)), int8().encode(own, (2,)))
    assert wire.kinds(message) == {"params": 50, "codec.int8": 16, "gradient": 60}
    after = int8().decode(message)
    assert after["params"]["w"].shape == (50,) and after["gradient"]["0"].dtype is torch.float32


@pytest.mark.parametrize(
    "note",
    [
        *(1, "float32", {}, {"float32": 1}, {"int8": torch.ones(1, 2)}, {"float32": torch.ones(2, 2)}),
        *({"float32": torch.ones(1, 2), "float16": torch.ones(1, 2)}, {"float32": torch.ones(1, 2).double()}),
    ],
)
def test_forged_notes_are_wire_errors(note):
    with pytest.raises(wire.WireError, match=r"codec\.int8"):
        int8().decode({"x": torch.zeros(5, dtype=torch.uint8), "codec.int8": {"x": note}})
    with pytest.raises(wire.WireError, match=r"codec\.int8"):
        int8().decode({"x": torch.zeros(5), "codec.int8": {"x": {"float32": torch.ones(1, 2)}}})
