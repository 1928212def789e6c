"""Where a model can be cut: names, numbers of blocks, and the nearest valid place to one that is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from lilliput.registry import nearest as similar
from lilliput.splitter.probes import Inputs, call
from lilliput.splitter.trace import events
from lilliput.splitter.verify import untouched


def place(model: nn.Module, at: Any, batches: tuple[Inputs, Inputs]) -> str:
    """The module that a cut named `at` comes before: a name or a unique ending of one, or a number of blocks."""
    if isinstance(at, bool) or not isinstance(at, int | str):
        raise ValueError(f"at is {at!r}; name a module, or say how many blocks stay with the client")
    if isinstance(at, int):
        where = boundaries(model, batches[0])
        if not 0 <= at < len(where):
            last = len(where) - 1
            raise ValueError(f"at={at} blocks is not within the {last} of {type(model).__name__}; choose 0 to {last}")
        return where[at]
    names = [name for name, _ in model.named_modules() if name == at or name.endswith(f".{at}")]
    exact = [name for name in names if name == at] or names
    if len(exact) == 1:
        return exact[0]
    if names:
        raise ValueError(f"at={at!r} is the ending of {', '.join(names[:4])}; say which")
    raise ValueError(f"at={at!r} names no module; {similar(at, [n for n, _ in model.named_modules()])}")


def boundaries(model: nn.Module, batch: Inputs) -> list[str]:
    """The modules that a cut at a block's boundary can come before: each block in turn, and what follows the last.

    Blocks are the members of lists (ModuleList, Sequential) that are of the class that the longest list is made of.
    Raises ValueError for a model that has none.
    """
    with untouched(model), events(model) as seen:
        call(model.train(), batch)
    order = list(dict.fromkeys(name for name, entered in seen if entered))
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    counts = [Counter(type(child) for child in m) for m in lists]
    if not any(counts):
        raise ValueError(f"{type(model).__name__} has no list of blocks to count; name the module to cut before")
    kind = max((c.most_common(1)[0] for c in counts if c), key=lambda pair: pair[1])[0]
    members = {id(child) for m in lists for child in m if type(child) is kind}
    blocks = [name for name in order if id(model.get_submodule(name)) in members]
    last = next(i for i, (name, entered) in enumerate(seen) if name == blocks[-1] and not entered)
    after = next((name for name, entered in seen[last:] if entered), None)
    return [*blocks, after] if after else blocks


def nearest(model: nn.Module, at: str, batches: tuple[Inputs, Inputs], shared: Sequence[str]) -> str:
    return ""
