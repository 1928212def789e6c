"""Randomness that depends on names, never on the order in which things happen.

Every draw of a run comes from a generator keyed by labels such as (run seed, round, client, purpose), so that the
engine, the number of workers and the order of arrival cannot change a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def key(*labels: object) -> int:
    """A 63-bit seed for these labels, the same in every process and on every machine."""
    text = "\x1f".join(f"{type(label).__name__}:{label}" for label in labels)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*labels: object) -> torch.Generator:
    """A CPU generator seeded by `key(*labels)`."""
    return torch.Generator().manual_seed(key(*labels))


@contextmanager
def seeded(*labels: object) -> Iterator[None]:
    """Seed torch's global CPU generator, which dropout uses, by the labels for a block; restores it afterwards."""
    before = torch.random.get_rng_state()
    torch.default_generator.manual_seed(key(*labels))
    try:
        yield
    finally:
        torch.random.set_rng_state(before)
