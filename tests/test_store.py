"""The store: what is put is what is got, in memory or not."""

from pathlib import Path

import pytest
import torch

from lilliput.store import Store


def body(c: int, size: int = 256) -> dict:
    return {"x": {"w": torch.full((size,), float(c))}, "n": c}


def test_a_store_beyond_its_memory_gives_back_what_was_put(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=4 * 1024)  # four bodies of 1 KiB
    for c in range(20):
        store.put(f"client/{c}", body(c))
    assert len(list(tmp_path.iterdir())) == 16
    for c in range(20):
        got = store.get(f"client/{c}")
        assert got["n"] == c and torch.equal(got["x"]["w"], torch.full((256,), float(c)))


def test_a_newer_body_hides_an_older_one_on_disk(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=1024)
    for c in (1, 2, 1):
        store.put("client/1" if c == 1 else "client/2", body(c))
    store.put("client/1", body(7))
    store.get("client/2")
    assert store.get("client/1")["n"] == 7


def test_flushing_writes_only_what_changed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for c in range(3):
        store.put(f"client/{c}", body(c))
    first = store.flush("a")
    store.put("client/1", body(9))
    second = store.flush("b")
    assert {k for k in first if first[k] != second[k]} == {"client/1"}
    fresh = Store(tmp_path)
    fresh.restore(second)
    assert [fresh.get(f"client/{c}")["n"] for c in range(3)] == [0, 9, 2]


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("client/0", body(0))
    (file,) = store.flush("a").values()
    data = bytearray((tmp_path / file.name).read_bytes())
    data[-1] ^= 1
    (tmp_path / file.name).write_bytes(data)
    fresh = Store(tmp_path)
    fresh.restore({"client/0": file})
    with pytest.raises(ValueError, match=file.name):
        fresh.get("client/0")


def test_an_unknown_key_has_an_empty_body() -> None:
    assert Store().get("client/5") == {}
