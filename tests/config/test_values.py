"""The grammar of settings, and values by the type of their field."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lilliput.cli.folder import as_yaml
from lilliput.cli.sweep import TYPED, _for_hydra, combinations
from lilliput.config import flat, from_file, words
from lilliput.config.values import convert, describe, parse, show

WRITTEN = {
    "1": 1,
    "-3": -3,
    "1_000": 1000,
    "1e-3": 0.001,
    ".5": 0.5,
    "2.": 2.0,
    "inf": math.inf,
    "null": None,
    "true": True,
    "False": False,
    "fedavg": "fedavg",
    "1.2.3": "1.2.3",
    "mine.py:MyMethod": "mine.py:MyMethod",
    r"mine.py\:MyMethod": "mine.py:MyMethod",
    "accuracy>=0.9": "accuracy>=0.9",
    "'a, b'": "a, b",
    '"1"': "1",
    "[1, [2, x], 'y z']": [1, [2, "x"], "y z"],
    "{a: 1, b: {c: [2]}}": {"a": 1, "b": {"c": [2]}},
    "{betas:[0.9,0.99]}": {"betas": [0.9, 0.99]},
    "007": "007",
    "~/data": "~/data",
    "[~/a, x=1, 'ö']": ["~/a", "x=1", "ö"],
    "Straße 1": "Straße 1",
    "cuda:0,1": "cuda:0,1",
    r"'it\'s'": "it's",
    r"'a\b'": r"a\b",
    "'${x}'": "${x}",
    "{1: 2}": {1: 2},
    "[]": [],
    "{}": {},
    "": "",
    "'a\x85b: \u2028c'": "a\x85b: \u2028c",
}


@pytest.mark.parametrize("text", WRITTEN, ids=repr)
def test_text_stands_for_a_value(text: str) -> None:
    value = parse(text)
    assert value == WRITTEN[text] and type(value) is type(WRITTEN[text])


texts = (
    st.text(st.characters(codec="ascii"))
    | st.text()
    | st.sampled_from(["${x}", r"a\\", r"\'", "1e3", "cuda:0,1", "~/x"])
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]*", fullmatch=True), inner)
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values)
def test_what_is_shown_is_read_back(value: Any) -> None:
    assert parse(show(value)) == value


def in_a_sweep(word: str) -> dict[str, Any]:
    """What the job of a sweep over one word reads."""
    ((job,),) = combinations([_for_hydra(word)])
    return words([job.removeprefix("+").removeprefix(TYPED)])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values | st.sampled_from([*WRITTEN]).map(parse))
def test_a_value_is_the_same_in_a_run_in_a_sweep_and_in_a_file(tmp_path_factory: Any, value: Any) -> None:
    pytest.importorskip("hydra")
    word = f"name={show(value)}"
    assert words([word]) == in_a_sweep(word) == {"name": value}
    file = tmp_path_factory.mktemp("config") / "c.yaml"
    assume("${" not in str(value))  # which a file may not have
    file.write_text(as_yaml(SimpleNamespace(as_dict=lambda: {"name": value})), encoding="utf-8")
    assert from_file(file) == flat({"name": value})


@pytest.mark.parametrize("text", WRITTEN, ids=repr)
def test_text_means_the_same_with_and_without_m(text: str) -> None:
    pytest.importorskip("hydra")
    assert in_a_sweep(f"name={text}") == words([f"name={text}"])


@pytest.mark.parametrize("text", ["1,2", "[1, 2", "{a: 1", "]", "'open", "[1]x", "{a}", "[1 [2]]", "[1,]", "${x}"])
def test_broken_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="add -m" if text == "1,2" else "close brackets and quotes"):
        parse(text)


@settings(deadline=None)
@given(st.text())
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        parse(text)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, 1.0),
        (1e3, int, 1000),
        ("1e-3", float, 0.001),
        (0, bool, False),
        ("yes", bool, True),
        (7, str, "7"),
        ("x", Path, Path("x")),
        (None, int | None, None),
        ("none", int | None, None),
        ("Both", Literal["server", "both"], "both"),
        ("none", Literal["none", "all"], "none"),
        ([1, 2], tuple[int, ...], (1, 2)),
        (["1", 2], list[float], [1.0, 2.0]),
        ("007", int, 7),
        ("1e3", int, 1000),
        ({"a": 1}, dict[str, Any], {"a": 1}),
        ({1: 2}, dict[str, Any], {"1": 2}),
        (0.5, int | float | None, 0.5),
        (5, int | float | None, 5),
        ("auto", str | list[str] | None, "auto"),
        (["crop:4"], str | list[str] | None, ["crop:4"]),
    ],
)
def test_a_field_takes_what_its_type_says(value: Any, hint: Any, expected: Any) -> None:
    taken = convert(value, hint, "key")
    assert taken == expected and type(taken) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        ("fast", float, "lr=fast must be a number"),
        (0.5, int, "lr=0.5 must be a whole number"),
        (math.inf, int, "lr=inf must be a whole number"),
        (True, int, "lr=true must be a whole number"),
        ("maybe", bool, "lr=maybe must be true or false"),
        (None, int, "lr=null must be a whole number"),
        ("servr", Literal["server", "both"], "lr=servr must be one of server, both"),
        ([1], str | None, r"lr=\[1\] must be text or null"),
        (3, dict[str, Any], "lr=3 must be {key: value}"),
        ("ab", list[int], r"lr=ab must be a \[list\]"),
    ],
)
def test_a_field_refuses_the_rest_in_words(value: Any, hint: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        convert(value, hint, "lr")


def test_types_are_described_once() -> None:
    assert describe(int | float | None) == "a number or null"
