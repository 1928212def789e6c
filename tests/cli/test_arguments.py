"""Command lines: flags, and settings written key=value or as published commands write them."""

from __future__ import annotations

import difflib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.cli.arguments import Line
from lilliput.config import expanded, words

LINE = Line("-m", "--dry", config="a file")
FLAGS = ("-m", "--dry", "--config")
# A key that is nearly a flag is refused as one misspelt.
KEYS = st.from_regex(r"[a-z]{2}[a-z_.]{0,9}[a-z]", fullmatch=True).filter(
    lambda key: not difflib.get_close_matches(f"--{key}", FLAGS, 1, 0.8)
)
VALUES = st.from_regex(r"-?[a-z0-9.]{1,6}", fullmatch=True)


@given(st.lists(st.tuples(KEYS, VALUES, st.sampled_from(["{}={}", "--{}={}", "--{} {}"]))))
def test_a_setting_means_the_same_however_it_is_written(typed: list[tuple[str, str, str]]) -> None:
    argv = [word for key, value, form in typed for word in form.format(key, value).split(" ")]
    flags, found = LINE.parse([*argv, "--dry"])
    assert found == [f"{key}={value}" for key, value, _ in typed]
    assert flags == {"m": False, "dry": True, "config": None}


def test_a_published_command_can_be_pasted() -> None:
    argv = ["--num_clients", "5", "--partition-alpha=0.3", "--partition", "dirichlet", "--nesterov", "--lr", "1e-2"]
    _, found = LINE.parse(argv)
    settings = expanded(words(found))[0]
    assert (settings["clients"], settings["partition"], settings["lr"]) == (5, "dirichlet", 0.01)
    assert settings.node("partition")["alpha"] == 0.3 and settings["nesterov"] is True


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--config"], "--config needs a file"),
        (["--drry"], "did you mean '--dry'"),
        (["-x"], "no flag '-x'; settings are written key=value, flags are -m, --dry, --config"),
    ],
)
def test_a_flag_that_is_not_there_is_refused(argv: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        LINE.parse(argv)


@pytest.mark.parametrize("text", ["multistep:1,2:0.1", "cuda:0,1"])
def test_numbers_after_a_name_are_one_value(text: str) -> None:
    assert words([f"key={text}"]) == {"key": text}
