"""Bodies as bytes: encodes a body to a safetensors image, computes its size without encoding, and decodes views of it.

A tensor's name in the image is its path: the keys joined by "/", with "~" and "/" inside a key escaped as in RFC 6901
("~0", "~1").  The header (header.py) lists the leaves in the order of the body.  A safetensors file of another program
decodes to a flat body with its names unchanged.
"""

from __future__ import annotations

import ctypes
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lilliput.core.tree import Body, size
from lilliput.wire import header
from lilliput.wire.header import Leaf, Row, Span, show

if sys.byteorder != "little":
    raise ImportError("lilliput.wire maps little-endian images onto memory, and this machine is big-endian")

DEPTH_LIMIT = 64  # keys on a path
DICT_LIMIT = 1 << 16  # nested dicts in a body; they take 16 MB of memory, and a short image could ask for more


class WireError(ValueError):
    """Bytes that are not a well-formed body; the message is one line."""


class Size(NamedTuple):
    """Bytes of an image: `payload` in tensors; `overhead` in length, header and padding."""

    payload: int
    overhead: int


def nbytes(body: Body) -> Size:
    """The exact size of `encode(body)`.  It needs no values of tensors, which may be on the meta device."""
    _, layout, head = _plan(body)
    return Size(layout.size, len(head))


def kinds(body: Body) -> dict[str, int]:
    """Payload bytes under each top-level key; they sum to `nbytes(body).payload`."""
    return {name: size(value) for name, value in body.items()}


def encode(body: Body, buffer: bytearray | memoryview | None = None) -> memoryview:
    """The image of a body, at the start of `buffer` if that is large enough, else in new memory.

    Tensors may be on any device and have any strides.  Encoding into a buffer overwrites the tensors that were decoded
    from it without a copy.  Raises ValueError if the body holds something that a body cannot hold.
    """
    values, layout, head = _plan(body)
    if any(x.is_meta for x in values):
        raise ValueError("tensors on the meta device have no values to encode; nbytes() gives their size")
    image = _room(len(head) + layout.size, buffer)
    image[: len(head)] = head
    if layout.size:
        flat = torch.frombuffer(image, dtype=torch.uint8, offset=len(head))
        for x, begin in zip(values, layout.begins, strict=True):
            _write(x.detach(), flat, begin)
    return image


def decode(data: bytes | bytearray | memoryview, copy: bool = False) -> Body:
    """The body of an image.  Raises WireError if it is not well-formed.

    The tensors share one storage: `data` itself, or a copy with `copy` or if `data` is not aligned in memory.
    Write to a view only if `data` is yours to change.
    """
    view = memoryview(data).cast("B")
    try:
        spans, rows, start = header.read(view)
        named = [(span.path, x) for span, x in zip(spans, _views(spans, _flat(view, start, copy)), strict=True)]
        return dict(named) if rows is None else _nest(_merge(named, rows))
    except (ValueError, RecursionError) as error:
        raise WireError(f"not a body: {error}") from None


def _plan(body: Body) -> tuple[list[Tensor], header.Layout, bytes]:
    """The tensors of a body, their layout, and the image before its buffer."""
    leaves = _Leaves()
    leaves.collect(body, "", 1)
    layout = header.layout(tuple(leaves.signature))
    return leaves.tensors, layout, header.write(layout.entries, leaves.rows)


class _Leaves:
    """Collects the leaves of a body, depth first in its order."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.signature: list[Leaf] = []
        self.rows: list[Row] = []
        self.dicts = 0

    def collect(self, body: Mapping[str, Any], prefix: str, depth: int) -> None:
        self.dicts += 1
        _check_nesting(depth, self.dicts)
        for name, value in body.items():
            if not isinstance(name, str):
                raise ValueError(f"the key {name!r} under {prefix!r} is not a string; the keys of a body are strings")
            path = prefix + (name.replace("~", "~0").replace("/", "~1") if "~" in name or "/" in name else name)
            if isinstance(value, Tensor):
                if value.layout is not torch.strided:
                    raise ValueError(f"tensor {path!r} has layout {value.layout}; send it dense, or its parts")
                self.tensors.append(value)
                self.signature.append((path, value.dtype, value.shape))
            elif header.is_value(value):
                self.rows.append((len(self.tensors), path, value))
            elif isinstance(value, Mapping) and value:
                self.collect(value, path + "/", depth + 1)
            elif isinstance(value, Mapping):
                self.rows.append((len(self.tensors), path, {}))
            else:
                kind = type(value).__name__
                raise ValueError(f"{path!r} is a {kind}; a body holds tensors, numbers, strings, None and such dicts")


def _room(size: int, buffer: bytearray | memoryview | None) -> memoryview:
    """`size` writable bytes: the start of `buffer`, or new memory of torch, which it does not fill with zeros."""
    view = memoryview(b"" if buffer is None else buffer).cast("B")
    return view[:size] if len(view) >= size else torch.empty(size, dtype=torch.uint8).numpy().data


def _write(x: Tensor, flat: Tensor, begin: int) -> None:
    if not x.is_cpu or not x.is_contiguous() or x.is_conj() or x.is_neg():
        flat[begin : begin + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
    elif x.nbytes:
        if not (source := x.data_ptr()):
            raise ValueError(f"a tensor of shape {list(x.shape)} has lost its storage; encode before it is freed")
        # torch's copy is a sixth slower over the 62 tensors of a ResNet-18, because each call takes 5 us to start.
        ctypes.memmove(flat.data_ptr() + begin, source, x.nbytes)


def _flat(data: memoryview, start: int, copy: bool) -> Tensor:
    """The buffer of an image as bytes, aligned in memory."""
    if start == len(data):
        return torch.empty(0, dtype=torch.uint8)
    if data.readonly:
        _accept_read_only()
    flat = torch.frombuffer(data, dtype=torch.uint8, offset=start)
    return flat.clone() if copy or flat.data_ptr() % 8 else flat


@cache
def _accept_read_only() -> None:
    """Use up the warning that torch gives once per process for views of read-only bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)


def _views(spans: list[Span], flat: Tensor) -> Iterator[Tensor]:
    whole = {d: flat[: len(flat) // d.itemsize * d.itemsize].view(d) for d in {span.dtype for span in spans}}
    for begin, end, path, dtype, shape in spans:
        if dtype is torch.bool and (flat[begin:end] > 1).any():
            raise ValueError(f"tensor {show(path)} holds booleans, but has a byte other than 0 and 1")
        yield whole[dtype][begin // dtype.itemsize : end // dtype.itemsize].view(shape)


def _merge(named: list[tuple[str, Tensor]], rows: list[Row]) -> Iterator[tuple[str, Any]]:
    """Tensors and values in the body's order."""
    done = 0
    for place, path, value in rows:
        yield from named[done:place]
        yield path, value
        done = place
    yield from named[done:]


def _nest(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The body with leaves at these paths.  Raises ValueError if paths are invalid or conflict."""
    body: dict[str, Any] = {}
    inner = {id(body)}  # the dicts that paths made, without the empty dicts that are leaves
    for path, value in leaves:
        depth = path.count("/") + 1
        _check_nesting(depth, len(inner))
        if re.search("~(?![01])", path):
            raise ValueError(f"the path {show(path)} has a '~' that is neither '~0' nor '~1'")
        *above, name = (key.replace("~1", "/").replace("~0", "~") for key in path.split("/"))
        node = body
        for key in above:
            if key not in node:
                node[key] = {}
                inner.add(id(node[key]))
                _check_nesting(depth, len(inner))
            node = node[key]
            if id(node) not in inner:
                raise ValueError(f"the path {show(path)} leads through a value")
        if name in node:
            raise ValueError(f"the path {show(path)} is taken, or others lead through it")
        node[name] = value
    return body


def _check_nesting(depth: int, dicts: int) -> None:
    if depth > DEPTH_LIMIT:
        raise ValueError(f"a path has more than {DEPTH_LIMIT} keys")
    if dicts > DICT_LIMIT:
        raise ValueError(f"the body nests more than {DICT_LIMIT} dicts")
