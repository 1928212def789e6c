"""The store: what is put is what is got, in memory or not."""

from pathlib import Path

import pytest
import torch

from lilliput.wire.store import Store


def body(c: int, size: int = 256) -> dict:
    return {"x": {"w": torch.full((size,), float(c))}, "n": c}


def test_a_store_beyond_its_memory_gives_back_what_was_put(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=4 * 1024)  # four bodies of 1 KiB
    for c in range(20):
        store.put(f"client/{c}", body(c))
    assert sum(len(file.read_bytes()) for file in tmp_path.iterdir()) >= 16 * 1024
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
    fresh.restore(second, store.sizes)
    assert [fresh.get(f"client/{c}")["n"] for c in range(3)] == [0, 9, 2]


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("client/0", body(0))
    (file,) = store.flush("a").values()
    data = bytearray((tmp_path / file.name).read_bytes())
    data[-1] ^= 1
    (tmp_path / file.name).write_bytes(data)
    fresh = Store(tmp_path)
    fresh.restore({"client/0": file}, store.sizes)
    with pytest.raises(ValueError, match=file.name):
        fresh.get("client/0")


def test_an_unknown_key_has_an_empty_body() -> None:
    assert Store().get("client/5") == {}


def test_two_stores_of_one_process_id_never_write_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed and resumed in a container has the id that it had: what it spills must not overwrite."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    first = Store(tmp_path, limit_bytes=1024)
    for c in range(4):
        first.put(f"client/{c}", body(c))
    counted, before = first.flush("round-1-0"), {file: file.read_bytes() for file in tmp_path.iterdir()}
    second = Store(tmp_path, limit_bytes=1024)
    second.restore(counted, first.sizes)
    for c in range(4):
        second.put(f"client/{c}", body(c + 10))
    second.flush("round-1-0")  # the same round, run again and killed before its manifest is written
    assert all(file.read_bytes() == data for file, data in before.items())
    third = Store(tmp_path)
    third.restore(counted, first.sizes)
    assert [third.get(f"client/{c}")["n"] for c in range(4)] == [0, 1, 2, 3]


def test_what_is_superseded_goes_from_the_disk_unless_a_checkpoint_counts_on_it(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=4 * 1024)
    for turn in range(50):
        for c in range(8):
            store.put(f"client/{c}", body(100 * turn + c))
    held = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert held < 3 * 8 * 1400  # eight bodies of 1 KiB and their headers, not four hundred
    counted = {file.name for file in store.flush("a").values()}
    for c in range(8):
        store.put(f"client/{c}", body(c))
    assert counted <= {file.name for file in tmp_path.iterdir()}


def test_a_file_of_which_less_than_half_counts_is_given_up(tmp_path: Path) -> None:
    """However long a run is, the disk holds less than twice its states and what the last checkpoint wrote."""
    store = Store(tmp_path)
    for c in range(100):
        store.put(f"client/{c}", body(c))
    size = sum(file.bytes for file in store.flush("a").values())
    for turn in range(60):
        for c in range(turn, turn + 10):
            store.put(f"client/{c % 100}", body(c % 100))
        files = store.flush("b")
        store.settle()
        assert sum(store.sizes.values()) <= 2 * size and len(files) == 100
    fresh = Store(tmp_path)
    fresh.restore(files, store.sizes)
    assert [fresh.get(f"client/{c}")["n"] for c in range(100)] == list(range(100))


def test_a_checkpoint_writes_one_file_however_many_states_are_new(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for c in range(300):
        store.put(f"client/{c}", body(c, 8))
    store.flush("a")
    assert len(list(tmp_path.iterdir())) == 1
