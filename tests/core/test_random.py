import hashlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lilliput.core import random

labels = st.lists(st.none() | st.booleans() | st.integers() | st.text(max_size=5), max_size=5)


@given(labels)
def test_a_key_is_a_seed_that_torch_takes(labels):
    assert 0 <= random.key(*labels) < 2**63
    assert random.key(*labels) == random.key(*labels)


names = st.lists(st.integers(0, 12) | st.text("ab12 ", max_size=3), max_size=4)


@given(names, names)
def test_different_labels_have_different_keys(a, b):
    assert (random.key(*a) == random.key(*b)) == (a == b)


def test_a_key_tells_types_places_and_boundaries_apart():
    keys = [random.key(*labels) for labels in [(1,), ("1",), (True,), (1, 2), (2, 1), (12,), ("1", "2"), ("12",), ()]]
    assert len(set(keys)) == len(keys)


def test_a_key_is_its_closed_form():
    digest = hashlib.blake2b(b"int:3\x1fstr:shuffle", digest_size=8).digest()
    assert random.key(3, "shuffle") == int.from_bytes(digest, "little") >> 1


def test_a_key_is_the_same_in_every_process():
    code = "from lilliput.core.random import key; print(key(0, 'round', 7, None))"
    for seed in ("0", "1"):  # Python's own hash of a string changes with it
        out = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert int(out.stdout) == random.key(0, "round", 7, None)


def test_generators_draw_by_their_labels_alone():
    first = torch.rand(5, generator=random.generator("a", 1))
    torch.rand(3)
    assert torch.equal(torch.rand(5, generator=random.generator("a", 1)), first)
    assert not torch.equal(torch.rand(5, generator=random.generator("a", 2)), first)


def test_a_seeded_block_draws_by_its_labels_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    draws = []
    for _ in range(2):
        with random.seeded("dropout", 3):
            draws.append(torch.nn.functional.dropout(torch.ones(50)))
    assert torch.equal(*draws)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="inside"), random.seeded(1):
        torch.rand(1)
        raise RuntimeError("inside")
    assert torch.equal(torch.random.get_rng_state(), before)
