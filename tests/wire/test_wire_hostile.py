"""Whatever bytes arrive, they are a body or a WireError of one line, at no more memory than their size warrants."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bodies import SAMPLE_IMAGE, bits, bodies
from lilliput.wire import header
from lilliput.wire.image import WireError, decode, encode


def image(entries: object, buffer: bytes = b"", size: int | None = None) -> bytes:
    """An image with any header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + buffer


def entry(dtype: object = "U8", shape: object = (), offsets: object = (0, 1)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def ours(values: object, buffer: bytes = b"", **entries: object) -> bytes:
    text = values if isinstance(values, str) else json.dumps(values)
    return image({"__metadata__": {"lilliput": header.VERSION, "values": text}, **entries}, buffer)


HOSTILE = {
    "no length": (b"", "0 bytes do not hold"),
    "short length": (b"\x01\x00", "2 bytes do not hold"),
    "header over the limit": (image({}, size=header.HEADER_LIMIT + 1), "over the limit"),
    "length of 2**64 - 1": (b"\xff" * 8, "over the limit"),
    "truncated header": (image({}, size=3), "claims 3 bytes, and 2 follow"),
    "empty header": (image(b""), "begin with '{'"),
    "array": (image(b"[]"), "begin with '{'"),
    "leading space": (image(b" {}"), "begin with '{'"),
    "not JSON": (image(b"{nope}"), "property name"),
    "text after JSON": (image(b"{}{}"), "Extra data"),
    "not UTF-8": (image(b'{"\xff":1}'), "utf-8"),
    "UTF-16": (image("{}".encode("utf-16-le")), "property name"),
    "deep JSON": (image(b'{"a":' + b"[" * 100_000), "recursion"),
    "endless integer": (image(b'{"a":' + b"9" * 5000 + b"}"), "4300 digits"),
    "key twice": (image(b'{"a":{},"a":{}}'), "twice"),
    "key twice in an entry": (image(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "twice"),
    "entry a list": (image({"a": []}), "entry of 'a'"),
    "entry lacking a key": (image({"a": {"dtype": "U8", "shape": []}}), "entry of 'a'"),
    "entry with another key": (image({"a": entry() | {"run": "rm"}}, b"x"), "entry of 'a'"),
    "unknown dtype": (image({"a": entry("F33")}, b"x"), "dtype 'F33'"),
    "dtype a list": (image({"a": entry(["U8"])}, b"x"), "dtype"),
    "dtype null": (image({"a": entry(None)}, b"x"), "dtype"),
    "shape null": (image({"a": entry(shape=None)}, b"x"), "shape None"),
    "shape negative": (image({"a": entry(shape=[-1, -1])}, b"x"), "shape"),
    "shape bool": (image({"a": entry(shape=[True])}, b"x"), "shape"),
    "shape float": (image({"a": entry(shape=[1.0])}, b"x"), "shape"),
    "shape nested": (image({"a": entry(shape=[[1]])}, b"x"), "shape"),
    "shape of 2**70": (image({"a": entry(shape=[2**70])}, b"x"), "shape"),
    "shape whose product is huge": (image({"a": entry(shape=[2**40, 2**40])}, b"x"), "memory can address"),
    "shape whose product wraps to 0": (image({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}), "memory can address"),
    "shape huge but for a 0": (image({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}), "memory can address"),
    "too many dimensions": (image({"a": entry(shape=[1] * 100_000)}, b"x"), "100000 dimensions"),
    "shape larger than the bytes": (image({"a": entry(shape=[2])}, b"x"), "does not fill"),
    "terabytes claimed": (image({"a": entry("F64", [2**40], [0, 2**43])}, b"x"), "take 8796093022208 bytes"),
    "one offset": (image({"a": entry(offsets=[0])}, b"x"), "two offsets"),
    "offset bool": (image({"a": entry(offsets=[False, True])}, b"x"), "two offsets"),
    "offset negative": (image({"a": entry(offsets=[-1, 0])}, b"x"), "two offsets"),
    "offsets reversed": (image({"a": entry(shape=[0], offsets=[1, 0])}, b"x"), "does not fill"),
    "overlap": (image({"a": entry(), "b": entry()}, b"xx"), "overlaps"),
    "hole": (image({"a": entry(), "b": entry(offsets=[2, 3])}, b"xxx"), "hole"),
    "hole at the start": (image({"a": entry(offsets=[1, 2])}, b"xx"), "hole"),
    "unaligned": (image({"a": entry(), "b": entry("F32", [], [1, 5])}, bytes(5)), "unaligned"),
    "truncated buffer": (SAMPLE_IMAGE[:-1], "follow the header"),
    "trailing bytes": (SAMPLE_IMAGE + b"x", "follow the header"),
    "a boolean of 2": (image({"a": entry("BOOL")}, b"\x02"), "booleans"),
    "metadata a list": (image({"__metadata__": []}), "__metadata__"),
    "metadata of numbers": (image({"__metadata__": {"lilliput": 1}}), "__metadata__"),
    "another version": (image({"__metadata__": {"lilliput": "2"}}), "wire format is '2'"),
    "values not JSON": (ours("nope"), "Expecting value"),
    "values an object": (ours({}), "not a list"),
    "deep values": (ours("[" * 100_000), "recursion"),
    "value of two fields": (ours([[0, "a"]]), "place, path and value"),
    "value without a name": (ours([[0, None, 1]]), "place, path and value"),
    "value a list": (ours([[0, "a", [1]]]), "not a number"),
    "value an object": (ours([[0, "a", {"b": 1}]]), "not a number"),
    "place too far": (ours([[1, "a", 1]]), "place 1"),
    "place negative": (ours([[-1, "a", 1]]), "place -1"),
    "place bool": (ours([[True, "a", 1]], b"x", t=entry()), "place True"),
    "places not in order": (ours([[1, "a", 1], [0, "b", 1]], b"x", t=entry()), "place 0"),
    "path twice": (ours([[0, "a", 1], [0, "a", 2]]), "taken"),
    "path of a tensor taken": (ours([[0, "t", 1]], b"x", t=entry()), "taken"),
    "path under a value": (ours([[0, "a", 1], [0, "a/b", 2]]), "leads through a value"),
    "path under a tensor": (ours([[1, "t/b", 2]], b"x", t=entry()), "leads through a value"),
    "path under an empty dict": (ours([[0, "a", {}], [0, "a/b", 2]]), "leads through a value"),
    "path above others": (ours([[0, "a/b", 1], [0, "a", 2]]), "taken"),
    "empty dict above others": (ours([[0, "a/b", 1], [0, "a", {}]]), "taken"),
    "tensor above others": (ours([], b"xx", **{"a/b": entry(), "a": entry(offsets=[1, 2])}), "taken"),
    "bad escape": (ours([[0, "a~2", 1]]), "'~0' nor '~1'"),
    "bare tilde": (ours([[0, "a~", 1]]), "'~0' nor '~1'"),
    "lone surrogate in a value": (ours('[[0,"a","\\ud800"]]'), "lone surrogate"),
    "lone surrogate": (image(b'{"\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x"), "lone surrogate"),
    "deep path": (ours([[0, "/" * 1_000_000, 1]]), "64 keys"),
    "many lists": (image(b'{"a":[' + b"[]," * 100_000 + b"[]]}"), "entry of"),
    "many objects": (image(b'{"a":[' + b"{}," * 100_000 + b"{}]}"), "entry of"),
    "many keys": (image(b"{" + b",".join(b'"%x":0' % i for i in range(100_000)) + b"}"), "entry of"),
    "a long line of lines": (image({"a\n" * 100_000: 1}), "entry of"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_raise_one_line_that_says_what_is_wrong(data, message):
    for copy in (False, True):
        with pytest.raises(WireError, match="not a body: ") as error:
            decode(data, copy)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_cost_memory_in_proportion_to_their_header_only(data):
    tracemalloc.start()
    with pytest.raises(WireError):
        decode(data[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * len(data[0]) + 100_000


def test_short_paths_cannot_ask_for_dicts_without_end():
    rows = [[0, f"{i:x}" + "/" * 60, 1] for i in range(5000)]  # 61 dicts each: 305,000, or 70 MB, for 0.4 MB
    with pytest.raises(WireError, match="65536 dicts"):
        decode(ours(rows))


def check_well_formed(data: bytes) -> None:
    """Either WireError, or a body that survives another trip."""
    try:
        body = decode(data)
    except WireError as error:
        assert "\n" not in str(error)
    else:
        assert bits(decode(encode(body))) == bits(body)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_arbitrary_bytes_are_refused_or_a_body(data):
    check_well_formed(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "a/b", "dtype"]), inner),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*header.DTYPES, "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 4) | st.sampled_from([2**31, 2**62]), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 16), min_size=2, max_size=2) | json_values,
    }
)
paths = st.sampled_from(["a", "a/b", "b", "~1", "~", "c//"])
rows = st.lists(st.tuples(st.integers(-1, 3), paths, json_values), max_size=4)
metadata = st.fixed_dictionaries(
    {}, optional={"lilliput": st.just("1") | json_values, "values": rows.map(json.dumps) | json_values, "x": st.text()}
)


@given(
    st.dictionaries(st.sampled_from(["a", "a/b", "b", "c/d", "~", ""]), entries | json_values, max_size=3),
    metadata | json_values,
    st.binary(max_size=24),
)
@settings(deadline=None, max_examples=500)
def test_arbitrary_headers_are_refused_or_a_body(named, extra, buffer):
    check_well_formed(image({**named, "__metadata__": extra}, buffer))


@given(bodies, st.data())
@settings(deadline=None, max_examples=300)
def test_damaged_images_are_refused_or_a_body(body, data):
    packed = bytearray(encode(body))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    check_well_formed(bytes(packed))


def test_every_truncation_of_an_image_is_refused():
    for size in range(len(SAMPLE_IMAGE)):
        with pytest.raises(WireError):
            decode(SAMPLE_IMAGE[:size])


def test_every_flipped_bit_of_an_image_is_refused_or_a_body():
    for place in range(len(SAMPLE_IMAGE)):
        for bit in range(8):
            damaged = bytearray(SAMPLE_IMAGE)
            damaged[place] ^= 1 << bit
            check_well_formed(bytes(damaged))
