"""The header of a wire image: JSON that says where each tensor lies in the buffer, and holds all other values.

The format is safetensors': the header's length (8 bytes, little-endian), then an object {name: {dtype, shape,
data_offsets}} padded with spaces so that the buffer starts at a multiple of 64 bytes.  We add to its metadata
"lilliput", the version, and "values", JSON rows of [tensors before it, path, value] for every value that is not a
tensor.  https://github.com/huggingface/safetensors#format

Reading trusts nothing: any fault raises ValueError (or RecursionError, for deep JSON) before a tensor is made.
"""

from __future__ import annotations

import json
import re
import reprlib
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch

VERSION = "1"
ALIGNMENT = 64  # bytes; torch allocates at multiples of it
HEADER_LIMIT = 8 << 20  # bytes; parsed JSON can take 25 times its text
DIMENSION_LIMIT = 64  # torch's own, for most kernels
FLOAT_WIDTH = len(repr(-2.2250738585072014e-308))  # characters; no float takes more

_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)}
CODES = {dtype: code for code, dtype in DTYPES.items()}

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
show = _repr.repr  # shortens values from outside to one line for errors
_json = json.JSONEncoder(separators=(",", ":")).encode

Leaf = tuple[str, torch.dtype, tuple[int, ...]]  # path, dtype, shape
Row = tuple[int, str, Any]  # tensors before it, path, value


class Layout(NamedTuple):
    """The places of tensors: first those that fill multiples of 64 bytes, then the others by descending item size.

    This order leaves no holes and aligns every tensor, nearly all as torch would.
    """

    entries: str  # the tensors' part of the header, each after a comma
    begins: tuple[int, ...]  # offsets in the buffer, in the order of the leaves
    size: int  # bytes of the buffer


class Span(NamedTuple):
    """A tensor of an image: the bytes from begin to end of the buffer."""

    begin: int
    end: int
    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@lru_cache(maxsize=64)
def layout(leaves: tuple[Leaf, ...]) -> Layout:
    """The layout of these tensors; cached, because a method sends few structures many times."""
    counts = [_count(*leaf) for leaf in leaves]
    begins, end = [0] * len(leaves), 0
    for i in sorted(range(len(leaves)), key=lambda i: (counts[i] % ALIGNMENT > 0, -leaves[i][1].itemsize)):
        begins[i], end = end, end + counts[i]
    entries = [
        f',{_json(path)}:{{"dtype":"{CODES[dtype]}","shape":{_json(shape)},"data_offsets":[{begin},{begin + count}]}}'
        for (path, dtype, shape), begin, count in zip(leaves, begins, counts, strict=True)
    ]
    return Layout("".join(entries), tuple(begins), end)


def write(entries: str, rows: list[Row]) -> bytes:
    """The bytes of an image before its buffer.  Raises ValueError if the header is too long or has invalid text."""
    for _, path, value in rows:
        _check_text(path, value)
    metadata = {"lilliput": VERSION} | ({"values": _json(rows)} if rows else {})
    text = f'{{"__metadata__":{_json(metadata)}{entries}}}'
    # Every float takes the room of the longest.  So only strings and integers change the size of a body, and the
    # size is known before there are values.
    text += " " * sum(FLOAT_WIDTH - len(_json(value)) for _, _, value in rows if isinstance(value, float))
    text += " " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"the header takes {len(text)} bytes, over {HEADER_LIMIT}; send long strings as uint8 tensors")
    return len(text).to_bytes(8, "little") + text.encode("ascii")


def read(data: memoryview) -> tuple[list[Span], list[Row] | None, int]:
    """(the tensors in the header's order, the values or None for a file of another program, the buffer's offset).

    Raises ValueError if the header is malformed.
    """
    if len(data) < 8:
        raise ValueError(f"{len(data)} bytes do not hold the 8 bytes of the header's length")
    size = int.from_bytes(data[:8], "little")
    if size > HEADER_LIMIT:
        raise ValueError(f"its header claims {size} bytes, over the limit of {HEADER_LIMIT}")
    if size > len(data) - 8:
        raise ValueError(f"its header claims {size} bytes, and {len(data) - 8} follow")
    if data[8:9] != b"{":
        raise ValueError("its header does not begin with '{'")
    entries = _parse(str(data[8 : 8 + size], "utf-8"))
    metadata = entries.pop("__metadata__", {})
    spans = [_span(path, entry) for path, entry in entries.items()]
    _check_cover(spans, len(data) - 8 - size)
    return spans, _rows(metadata, len(spans)), 8 + size


def is_value(value: Any) -> bool:
    """Whether a value survives JSON unchanged (Python's JSON also keeps NaN, infinities and long integers)."""
    return value is None or isinstance(value, (bool, int, float, str))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a key occurs twice in one JSON object")
    return unique


_parse = json.JSONDecoder(object_pairs_hook=_unique).decode


def _span(path: str, entry: Any) -> Span:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {show(path)} is {show(entry)}, not dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"tensor {show(path)} has dtype {show(code)}, which is unknown")
    if not _is_naturals(shape):
        raise ValueError(f"tensor {show(path)} has shape {show(shape)}, which is not a list of sizes")
    if not _is_naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {show(path)} has data_offsets {show(offsets)}, which are not two offsets")
    span = Span(offsets[0], offsets[1], path, DTYPES[code], tuple(shape))
    if span.end - span.begin != _count(path, span.dtype, span.shape):
        raise ValueError(f"tensor {show(path)} of {code} {show(shape)} does not fill its data_offsets {offsets}")
    return span


def _is_naturals(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _count(path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor.  Raises ValueError if the format or torch does not allow such a tensor."""
    if dtype not in CODES:
        raise ValueError(f"tensor {show(path)} is {dtype}, which the format lacks; it has {', '.join(DTYPES)}")
    if len(shape) > DIMENSION_LIMIT:
        raise ValueError(f"tensor {show(path)} has {len(shape)} dimensions, over {DIMENSION_LIMIT}")
    if prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"tensor {show(path)} has shape {show(shape)}, more than memory can address")
    if path == "__metadata__":
        raise ValueError(f"a safetensors header has no room for a tensor named {path!r}; rename it")
    _check_text(path)
    return prod(shape) * dtype.itemsize


def _check_text(path: str, value: Any = "") -> None:
    for text in (path, value):
        if isinstance(text, str) and not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{show(path)} has a lone surrogate in {show(text)}, which is not a character; replace it")


def _check_cover(spans: list[Span], size: int) -> None:
    """Raise ValueError unless the tensors cover each byte of the buffer once, aligned to their item sizes."""
    due = 0
    for span in sorted(spans, key=lambda span: (span.begin, span.end)):
        if span.begin != due:
            fault = "overlaps the one before" if span.begin < due else "leaves a hole before it"
            raise ValueError(f"tensor {show(span.path)} begins at {span.begin}, not {due}: it {fault}")
        if span.begin % span.dtype.itemsize:
            raise ValueError(f"tensor {show(span.path)} is unaligned: {span.begin} is not a multiple of its item size")
        due = span.end
    if due != size:
        raise ValueError(f"its tensors take {due} bytes, and {size} follow the header")


def _rows(metadata: Any, tensors: int) -> list[Row] | None:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("__metadata__ is not a map from names to strings")
    if "lilliput" not in metadata:
        return None
    if metadata["lilliput"] != VERSION:
        theirs = show(metadata["lilliput"])
        raise ValueError(f"its wire format is {theirs}, and ours is {VERSION!r}; run one version on both sides")
    rows, least = _parse(metadata.get("values", "[]")), 0
    if not isinstance(rows, list):
        raise ValueError("its values are not a list")
    for row in rows:
        if not (isinstance(row, list) and len(row) == 3 and isinstance(row[1], str)):
            raise ValueError(f"{show(row)} is not a place, path and value")
        place, path, value = row
        if type(place) is not int or not least <= place <= tensors:
            raise ValueError(f"the value {show(path)} has place {show(place)}, which is not from {least} to {tensors}")
        if not is_value(value) and value != {}:
            raise ValueError(f"the value {show(path)} is {show(value)}, not a number, string, null or empty object")
        _check_text(path, value)
        least = place
    return rows
