"""Bodies for property tests: hypothesis strategies, and the equality that bodies on a wire must keep."""

import math
import struct

import torch
from hypothesis import strategies as st
from torch import Tensor

from lilliput.wire.header import DTYPES
from lilliput.wire.image import encode

keys = st.text(max_size=6) | st.sampled_from(["", "/", "~", "~0", "~1", "a/b", "params", "__proto__", "codec.x"])
floats = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324])
scalars = st.none() | st.booleans() | st.integers() | st.integers(10**30, 10**60) | floats | st.text()
shapes = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def arrays(draw: st.DrawFn) -> Tensor:
    """A tensor of any dtype and any bits, contiguous or not."""
    dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(shapes)
    count = math.prod(shape)
    if dtype is torch.bool:
        raw = bytes(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    else:
        raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if count else torch.empty(0, dtype=dtype)
    x = flat.reshape(shape)
    return x.permute(draw(st.permutations(range(x.dim())))) if draw(st.booleans()) else x


bodies = st.dictionaries(
    keys,  # text that is six long cannot be "__metadata__", which a tensor at the top must not be
    st.recursive(arrays() | scalars, lambda inner: st.dictionaries(keys, inner, max_size=3), max_leaves=8),
    max_size=5,
)


def bits(x: object) -> object:
    """Equal for equal dtypes, shapes and bytes of tensors, NaN and -0.0 of floats, and order of keys."""
    if isinstance(x, Tensor):
        flat = x.detach().contiguous().reshape(-1)
        return str(x.dtype), tuple(x.shape), bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""
    if isinstance(x, dict):
        return [(name, bits(value)) for name, value in x.items()]
    if isinstance(x, float):
        return "float", "nan" if math.isnan(x) else struct.pack("<d", x)
    return type(x), x


SAMPLE = {
    "params": {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.tensor([1, 2, 3], dtype=torch.int16)},
    "lr": 0.1,
    "mask": torch.tensor([True, False]),
    "empty": {},
    "note": "no~thing/é",
    "half": torch.ones(3, dtype=torch.bfloat16),
}
SAMPLE_IMAGE = bytes(encode(SAMPLE))
