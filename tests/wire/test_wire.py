import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bodies import SAMPLE, SAMPLE_IMAGE, bits, bodies
from lilliput.wire import header, image
from lilliput.wire.image import decode, encode, kinds, nbytes


def one_of_each_dtype() -> dict[str, torch.Tensor]:
    raw = torch.arange(2, 26, dtype=torch.uint8)
    return {
        code: raw[: 3 * dtype.itemsize].clone().view(dtype)
        for code, dtype in header.DTYPES.items()
        if dtype is not torch.bool
    } | {"BOOL": torch.tensor([True, False, True])}


# What goes in comes out.


@given(bodies)
@example({"a": {}, "b": {"": {"": None}}, "a/b": 1, "~1": 2.0, "": torch.zeros(())})
@example({"x": {"__metadata__": torch.ones(2)}, "__metadata__": 3})
@settings(deadline=None, max_examples=300)
def test_any_body_returns_with_its_dtypes_shapes_bits_and_order(body):
    packed = encode(body)
    assert bits(decode(packed)) == bits(decode(bytes(packed), copy=True)) == bits(body)
    assert sum(nbytes(body)) == len(packed)


@given(bodies)
@settings(deadline=None)
def test_payload_is_the_bytes_of_the_tensors_and_the_buffer_is_aligned(body):
    packed, size = encode(body), nbytes(body)
    assert size.overhead == 8 + int.from_bytes(packed[:8], "little")
    assert size.overhead % 64 == 0
    assert size.payload == sum(kinds(body).values())
    assert list(kinds(body)) == list(body)


def test_size_of_one_message_by_hand():
    body = {"params": {"w": torch.zeros(10, 10), "steps": torch.zeros((), dtype=torch.int64)}, "lr": 0.5}
    text = (
        '{"__metadata__":{"lilliput":"1","values":"[[2,\\"lr\\",0.5]]"},'
        '"params/w":{"dtype":"F32","shape":[10,10],"data_offsets":[8,408]},'
        '"params/steps":{"dtype":"I64","shape":[],"data_offsets":[0,8]}}'
    )
    room = 24 - len("0.5")  # every float takes that of the longest
    padded = text.ljust(-(-(8 + len(text) + room) // 64) * 64 - 8).encode()
    assert bytes(encode(body)) == len(padded).to_bytes(8, "little") + padded + bytes(408)
    assert nbytes(body) == (4 * 100 + 8, 8 + len(padded))
    assert kinds(body) == {"params": 408, "lr": 0}


def test_size_needs_no_values():
    body = {"w": torch.zeros(3, 5, dtype=torch.bfloat16)}
    assert nbytes({"w": torch.empty(3, 5, dtype=torch.bfloat16, device="meta")}) == nbytes(body)


@given(st.lists(st.floats(), min_size=9, max_size=9))
def test_size_does_not_depend_on_the_values_of_floats(values):
    sizes = [nbytes({str(i): x for i, x in enumerate(xs)}) for xs in (values, [1.0] * 9)]
    assert sizes[0] == sizes[1]


def test_official_safetensors_reads_ours():
    body = {code: x for code, x in one_of_each_dtype().items() if code in safetensors.torch._TYPES}
    body |= {"zero": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "lr": 0.1, "deep": {"er": {}}}
    read = safetensors.torch.load(bytes(encode(body)))
    assert len(body) - len(read) == 2
    assert all(bits(x) == bits(body[name]) for name, x in read.items())


def test_we_read_official_safetensors_as_a_flat_body():
    tensors = {code: x for code, x in one_of_each_dtype().items() if code in safetensors.torch._TYPES}
    tensors |= {"layer/1~weight": torch.rand(3, 3), "zero": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    for metadata in (None, {"format": "pt"}):
        read = decode(safetensors.torch.save(tensors, metadata))
        assert read.keys() == tensors.keys()
        assert all(bits(read[name]) == bits(tensors[name]) for name in tensors)


def test_tensors_of_any_strides_and_graphs_encode_their_values():
    x = torch.rand(4, 6, requires_grad=True)
    body = {
        "transposed": x.t(), "strided": x[::2, 1:], "expanded": torch.rand(1, 3).expand(5, 3), "parameter": x,
        "channels_last": torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
    }  # fmt: skip
    read = decode(encode(body))
    assert all(torch.equal(read[name], x) and read[name].is_contiguous() for name, x in body.items())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_encode_as_their_cpu_copies():
    body = {"w": torch.rand(5, 3), "n": torch.arange(4)}
    assert encode({name: x.t().cuda() for name, x in body.items()}) == encode({name: x.t() for name, x in body.items()})


# Memory.


def test_decoding_copies_nothing_unless_asked():
    buffer = bytearray(SAMPLE_IMAGE)
    seen, copied = decode(buffer), decode(buffer, copy=True)
    buffer[nbytes(SAMPLE).overhead :] = bytes(nbytes(SAMPLE).payload)
    assert seen["params"]["a.weight"].abs().sum() == 0
    assert torch.equal(copied["params"]["a.weight"], SAMPLE["params"]["a.weight"])


def test_bytes_that_lie_unaligned_in_memory_decode_to_aligned_tensors():
    for shift in range(8):
        body = decode(memoryview(bytearray(bytes(shift) + SAMPLE_IMAGE))[shift:])
        assert bits(body) == bits(SAMPLE)
        assert body["params"]["a.weight"].data_ptr() % 4 == 0


def test_read_only_bytes_decode_without_a_warning():
    code = f"from lilliput.wire.image import decode; print(decode({SAMPLE_IMAGE!r})['half'].tolist())"
    fresh = [sys.executable, "-W", "error:The given buffer is not writable", "-c", code]  # torch warns once per process
    assert subprocess.run(fresh, capture_output=True, text=True, check=True).stdout == "[1.0, 1.0, 1.0]\n"


def test_a_buffer_is_reused_when_it_is_large_enough():
    small, exact, large = (bytearray(b"x" * n) for n in (10, len(SAMPLE_IMAGE), 2 * len(SAMPLE_IMAGE)))
    for buffer in (exact, large, memoryview(large)):
        assert encode(SAMPLE, buffer) == SAMPLE_IMAGE == bytes(buffer[: len(SAMPLE_IMAGE)])
    packed = encode(SAMPLE, small)
    assert packed == SAMPLE_IMAGE
    assert small == b"x" * 10
    assert encode({"w": torch.zeros(2)}, packed).obj is packed.obj


# What a body cannot hold is refused, naming it.


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"a": {"b/c": [1, 2]}}, "'a/b~1c' is a list"),
        ({"a": {3: 1}}, "key 3 under 'a/'"),
        ({"x": torch.zeros(2, dtype=torch.complex128)}, "'x' is torch.complex128"),
        ({"x": torch.eye(2).to_sparse()}, "'x' has layout torch.sparse_coo"),
        ({"x": torch.zeros(2, device="meta")}, "meta device"),
        ({"x": torch.zeros([1] * 65)}, "65 dimensions"),
        ({"__metadata__": torch.zeros(2)}, "'__metadata__'"),
        ({"\ud800": torch.zeros(2)}, "lone surrogate"),
        ({"text": "\ud83d\ude00"}, "lone surrogate"),
        ({"text": "x" * header.HEADER_LIMIT}, "uint8 tensors"),
    ],
)
def test_what_a_body_cannot_hold_is_refused_by_name(body, message):
    with pytest.raises(ValueError, match=message) as error:
        encode(body)
    assert "\n" not in str(error.value)


def test_a_tensor_whose_storage_was_freed_is_refused():
    x = torch.ones(3)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="lost its storage"):
        encode({"x": x})


def nested(depth: int) -> dict:
    body: dict = {"x": torch.ones(())}
    for _ in range(depth - 1):
        body = {"k": body}
    return body


def test_nesting_is_bounded_alike_in_both_directions(monkeypatch):
    deep, wide = nested(image.DEPTH_LIMIT), {str(i): {"x": i} for i in range(7)}
    assert bits(decode(encode(deep))) == bits(deep)
    with pytest.raises(ValueError, match="64 keys"):
        encode(nested(image.DEPTH_LIMIT + 1))
    with pytest.raises(ValueError, match="64 keys"):
        encode(nested(5000))
    packed = encode(wide)
    monkeypatch.setattr(image, "DICT_LIMIT", 8)
    assert bits(decode(packed)) == bits(decode(encode(wide))) == bits(wide)
    monkeypatch.setattr(image, "DICT_LIMIT", 7)
    for refused in (lambda: encode(wide), lambda: decode(packed)):
        with pytest.raises(ValueError, match="more than 7 dicts"):
            refused()
