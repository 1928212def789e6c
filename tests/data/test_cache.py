"""Arrays that come in parts are kept on disk whole, and read from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lilliput.data.cache import Arrays, streamed


def parts() -> Iterator[Arrays]:
    yield {"a": np.arange(6, dtype=np.int32).reshape(2, 3)}
    yield {"a": np.arange(6, 9, dtype=np.int32).reshape(1, 3), "b": np.array([1.5, 2.5])}
    yield {"b": np.empty(0)}


def never() -> Iterator[Arrays]:
    raise AssertionError("what is kept is not made again")


def check(arrays: Arrays) -> None:
    assert arrays.keys() == {"a", "b"} and arrays["a"].dtype == np.int32
    assert arrays["a"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] and arrays["b"].tolist() == [1.5, 2.5]


def test_parts_are_joined_on_disk_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path))
    check(streamed("rows", "key", parts))
    again = streamed("rows", "key", never)
    check(again)
    assert all(isinstance(array, np.memmap) for array in again.values())
    again["a"][0, 0] = 99  # a copy of the page: the file keeps what it has
    check(streamed("rows", "key", never))


def test_what_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path))

    def failing() -> Iterator[Arrays]:
        yield from parts()
        raise ValueError("the text ends in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        streamed("rows", "key", failing)
    assert not list(tmp_path.iterdir())
    check(streamed("rows", "key", parts))


def test_without_a_cache_they_are_joined_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", "")
    check(streamed("rows", "key", parts))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"rows cannot be kept in .*set LILLIPUT_CACHE"):
        streamed("rows", "key", parts)
