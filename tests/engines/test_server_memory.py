"""What the server remembers of clients: staged over what there was, spilled like it, kept of clients that are in."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lilliput.engines.base import ServerMemory
from lilliput.wire.store import Store

CLIENT = st.integers(0, 3)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), CLIENT, st.integers(0, 99)),
        st.tuples(st.just("delete"), CLIENT, st.just(0)),
        st.tuples(st.just("commit"), CLIENT, st.just(0)),
        st.tuples(st.just("abandon"), CLIENT, st.just(0)),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, limit=st.sampled_from([0, 40, 1 << 20]))
def test_it_is_a_dict_that_a_round_ends_or_drops(steps: list[Any], limit: int) -> None:
    """`commit` leaves out one client; an abandoned round leaves everything as it was.  A body has 16 bytes."""
    store = Store(limit_bytes=limit)
    memory, kept, now = ServerMemory(store), dict[int, float](), dict[int, float]()
    for kind, c, value in steps:
        if kind == "set":
            memory[c], now[c] = {"x": torch.full((4,), float(value))}, float(value)
        elif kind == "delete":
            del memory[c]
            now.pop(c, None)
        elif kind == "commit":
            memory.commit({c})
            now = {n: x for n, x in now.items() if n != c} | ({c: kept[c]} if c in kept else {})
            kept = dict(now)
        else:
            memory, now = ServerMemory(store), dict(kept)
        assert {n: float(memory[n]["x"][0]) for n in memory} == now and len(memory) == len(now)
