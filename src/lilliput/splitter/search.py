"""Looking for a place to cut: the latest one within a budget, and the nearest valid one to one that is not.

Both try cuts on a copy of the model on the meta device, where nothing is allocated or computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lilliput.splitter.budget import Budget
from lilliput.splitter.dividing import divide
from lilliput.splitter.parts import Client
from lilliput.splitter.places import by_distance, candidates
from lilliput.splitter.probes import Inputs, named
from lilliput.splitter.valueless import Undecided, moved, on_meta

TRIED = 8  # places around an invalid one


def latest_within(
    model: nn.Module, budget: Budget, example: Any, batches: tuple[Inputs, Inputs], shared: tuple[str, ...]
) -> str:
    """The latest module to cut before whose client part costs no more than the budget.

    Raises ValueError if there is none, saying what the cheapest costs.
    """
    costs = {}
    with Undecided():
        bare, pair = on_meta(model), (moved(batches[0]), moved(batches[1]))
        batch = moved(named(model, example))
        for name in reversed(candidates(bare, pair[0])):
            client = _client(bare, name, pair, shared)
            if client is None:
                continue
            costs[name] = budget.cost(client, batch)
            if costs[name] <= budget.limit:
                return name
    if not costs:
        raise ValueError("there is no valid place to cut at; name a module")
    name = min(costs, key=lambda name: costs[name])
    raise ValueError(f"no cut costs {budget.limit:,} bytes or less; the cheapest, at {name!r}, costs {costs[name]:,}")


def nearest(model: nn.Module, at: str, batches: tuple[Inputs, Inputs], shared: tuple[str, ...]) -> str | None:
    """The valid place to cut that is called soonest before or after this one; None if there is none around."""
    with Undecided():
        bare, pair = on_meta(model), (moved(batches[0]), moved(batches[1]))
        places: Sequence[str] = by_distance(bare, at, pair[0])[:TRIED]
        return next((name for name in places if _client(bare, name, pair, shared) is not None), None)


def _client(model: nn.Module, at: str, batches: tuple[Inputs, Inputs], shared: tuple[str, ...]) -> Client | None:
    try:
        return divide(model, at, batches, shared)[0]
    except ValueError:
        return None
