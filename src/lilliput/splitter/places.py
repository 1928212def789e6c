"""Where a model can be cut: names, numbers of blocks, and the nearest valid place to one that is not."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from lilliput.core.registry import nearest as similar
from lilliput.fake import Fake, like
from lilliput.splitter.dividing import divide_or_none
from lilliput.splitter.names import mapped_tensors
from lilliput.splitter.parts import on_meta
from lilliput.splitter.probes import SHARED, Inputs, call, probes
from lilliput.splitter.trace import events, untouched

TRIED = 8  # places around an invalid one


def place(model: nn.Module, at: Any, batch: Inputs) -> str:
    """The module that a cut named `at` comes before: a name or a unique ending of one, or a number of blocks."""
    if isinstance(at, bool | float):
        raise ValueError(f"at is {at!r}; name a module, say how many blocks stay with the client, or give a budget")
    if isinstance(at, int):
        where = boundaries(model, batch)
        if not 0 <= at < len(where):
            last = len(where) - 1
            raise ValueError(f"at={at} blocks is not within the {last} of the model; choose 0 to {last}")
        return where[at]
    everything = [name for name, _ in model.named_modules() if name]
    names = [n for n in everything if n == at] or [n for n in everything if n.endswith(f".{at}")]
    if not names:
        raise ValueError(f"at={at!r} names no module; {similar(at, everything)}")
    if len(names) > 1:
        raise ValueError(f"at={at!r} is the ending of {', '.join(names[:4])}; say which")
    return names[0]


def boundaries(model: nn.Module, batch: Inputs) -> list[str]:
    """The modules that a cut at a block's boundary can come before: each block in turn, and what follows the last.

    Blocks are the members of lists (ModuleList, Sequential) that are of the class that the longest list is made of.
    Raises ValueError for a model that has none.
    """
    seen = run(model, batch)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    kinds = Counter({type(child): 0 for m in lists for child in m})
    for m in lists:
        for kind, count in Counter(type(child) for child in m).items():
            kinds[kind] = max(kinds[kind], count)
    members = {id(child) for m in lists for child in m if kinds and type(child) is kinds.most_common(1)[0][0]}
    returned = {name for name, entered in seen if not entered}  # a part ends in the middle of things
    order = dict.fromkeys(name for name, entered in seen if entered and name in returned)
    blocks = [name for name in order if id(model.get_submodule(name)) in members]
    if not blocks:
        raise ValueError("the model has no list of blocks to count; name the module to cut before")
    last = max(i for i, event in enumerate(seen) if event == (blocks[-1], False))
    after = next((name for name, entered in seen[last:] if entered), None)
    return [*blocks, after] if after else blocks


def candidates(model: nn.Module, batch: Inputs) -> list[str]:
    """Where to look for a cut, in the order of calls: at boundaries of blocks, or without blocks before any module."""
    try:
        return boundaries(model, batch)
    except ValueError:
        counts = Counter(name for name, entered in run(model, batch) if entered and name)
        return [name for name, count in counts.items() if count == 1]


def run(model: nn.Module, batch: Inputs) -> list[tuple[str, bool]]:
    """What a forward calls, and where it returns."""
    with untouched(model), events(model) as seen:
        call(model.train(), batch)
    return seen


def nearest(model: nn.Module, at: str, batches: tuple[Inputs, Inputs], shared: tuple[str, ...]) -> str | None:
    """The valid place to cut that is called soonest before or after this one; None if there is none around."""
    with Fake(value=0):
        bare, (first, second) = on_meta(model), (mapped_tensors(b, like) for b in batches)
        around = by_distance(bare, at, first)[:TRIED]
        return next((name for name in around if divide_or_none(bare, name, (first, second), shared)), None)


def by_distance(model: nn.Module, at: str, batch: Inputs) -> list[str]:
    """Candidates other than `at`, sorted by how soon they are called before or after it."""
    order = list(dict.fromkeys(name for name, entered in run(model, batch) if entered))
    here = next((i for i, name in enumerate(order) if name == at or name.startswith(f"{at}.")), 0)
    others = [name for name in candidates(model, batch) if name != at]
    return sorted(others, key=lambda name: abs(order.index(name) - here))


def middle(model: nn.Module, example: Any = None) -> str:
    """The module in the middle of those that a model can be cut before."""
    where = candidates(model, probes(model, example, SHARED)[0])
    return where[len(where) // 2]
