"""The server's memory of a client: its newest activations and their labels, first in, first out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.core import tree
from lilliput.core.labels import IGNORED
from lilliput.core.tree import Body


def remembered(memory: Body, cuts: Sequence[Any], labels: Sequence[Tensor], limit: int) -> Body:
    """`cut` and `labels` of a memory after appending these, cut to the newest `limit` examples in order.

    Sequences are padded on the right to the longest: activations and masks with 0, labels with -100.
    """
    old = [memory["cut"]] if "cut" in memory else [], [memory["labels"]] if "labels" in memory else []
    joined = {"cut": _joined([*old[0], *cuts]), "labels": _padded([*old[1], *labels], IGNORED)}
    return tree.mapped(joined, lambda x: x[-limit:].clone())


def _joined(cuts: Sequence[Any]) -> Any:
    if isinstance(cuts[0], Mapping):
        return {name: _padded([cut[name] for cut in cuts], 0) for name in cuts[0]}
    return _padded(cuts, 0)


def _padded(xs: Sequence[Tensor], value: int) -> Tensor:
    """Concatenate tensors; pads every dimension but the first to the longest."""
    if len({x.shape[1:] for x in xs}) == 1:
        return torch.cat(list(xs))
    longest = [max(sizes) for sizes in zip(*(x.shape[1:] for x in xs), strict=True)]
    short = [[n for size, most in zip(x.shape[1:], longest, strict=True) for n in (most - size, 0)] for x in xs]
    return torch.cat([F.pad(x, missing[::-1], value=value) for x, missing in zip(xs, short, strict=True)])
