"""From a data set to the batches of each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.core.random import generator
from lilliput.data.augment import Augment
from lilliput.data.batches import ArrayBatches, Batches, Transform
from lilliput.data.datasets import Dataset, digest
from lilliput.data.partition import split
from lilliput.data.token_batches import TokenBatches

EVALUATION_BATCH = 512
EVALUATION_TEXTS, EVALUATION_LOGITS = 32, 1 << 27  # at most, because logits over a vocabulary at every token are large


@dataclass(frozen=True, eq=False)
class Federated:
    """A data set on its clients.

    train: the batches that each client trains on
    test: the test examples of the data set
    client_test: the examples that each client keeps for testing, or the test examples of its owners; lacks clients that
        have none
    partition: the indices of all training examples of each client
    """

    train: dict[int, Batches]
    test: Batches
    client_test: dict[int, Batches] | None
    partition: dict[int, Tensor]
    fingerprint: str


def federate(
    dataset: Dataset, partition: str | Mapping[int, Any] = "iid", clients: int | None = None, batch_size: int = 32,
    seed: int = 0, augment: str | Sequence[str] | None = "auto", test_fraction: float = 0.0, **partition_options: Any,
) -> Federated:  # fmt: skip
    """Assign every training example to a client, and cut each client's examples into batches.

    partition: a name, `auto` (the data set's own clients, else iid), or the indices themselves, {client: indices}
    clients: how many; by default 10, or for the partition `natural` all of the data set's own clients
    augment: `auto` is the data set's own, None is none, else steps such as `("crop:4", "flip", "cutout:16")`
    test_fraction: share of its examples that each client keeps for testing
    Raises ValueError for a partition that leaves a client empty or an example out.
    """
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}; it must be at least 0 and less than 1")
    if partition == "auto":
        partition = "iid" if dataset.owners is None else "natural"
    if clients is None:
        clients = int(dataset.owners.max()) + 1 if partition == "natural" and dataset.owners is not None else 10
    parts = split(dataset, partition, clients, seed, **partition_options)
    test_part = {c: _drawn(c, index, test_fraction, seed) for c, index in parts.items()}
    train_part = {c: index[~torch.isin(index, test_part[c])] for c, index in parts.items()}
    client_test = _batches(dataset, dataset.train, test_part) if test_fraction else _owned(dataset, parts)
    return Federated(
        _batches(dataset, dataset.train, train_part, batch_size, _transform(dataset, augment)),
        _cut(dataset, dataset.test),
        client_test or None,
        parts,
        digest([*parts.values(), *train_part.values()], dataset.fingerprint()),
    )


def _transform(dataset: Dataset, augment: str | Sequence[str] | None) -> Transform | None:
    if dataset.kind != "image":
        if augment not in ("auto", None, (), []):
            raise ValueError(f"augment={augment!r} is for images, and {dataset.name} is {dataset.kind}; leave it out")
        return None
    steps = dataset.augment if augment == "auto" else (augment,) if isinstance(augment, str) else tuple(augment or ())
    return Augment(steps, dataset.mean, dataset.std)


def _drawn(client: int, index: Tensor, fraction: float, seed: int) -> Tensor:
    """The examples that a client keeps for testing: at least one, but never all; none if it has only one."""
    count = min(max(round(fraction * len(index)), 1), len(index) - 1) if fraction else 0
    return index[torch.randperm(len(index), generator=generator("client test", seed, client))[:count]].sort().values


def _batches(
    dataset: Dataset, columns: Sequence[Tensor], parts: Mapping[int, Tensor], size: int | None = None,
    transform: Transform | None = None,
) -> dict[int, Batches]:  # fmt: skip
    return {c: _cut(dataset, columns, size, transform, index) for c, index in parts.items() if len(index)}


def _cut(
    dataset: Dataset, columns: Sequence[Tensor], size: int | None = None, transform: Transform | None = None,
    index: Tensor | None = None,
) -> Batches:  # fmt: skip
    """Rows of columns as batches: of `size` for training; without `size`, batches for evaluation."""
    tokens = dataset.kind == "tokens"
    if size is None:
        size, transform = _texts(dataset) if tokens else EVALUATION_BATCH, _transform(dataset, None)
    if tokens:
        return TokenBatches(columns, size, index=index, bucket=dataset.bucket)
    return ArrayBatches(columns, size, index=index, transform=transform)


def _texts(dataset: Dataset) -> int:
    """The number of token sequences in an evaluation batch."""
    return max(1, min(EVALUATION_TEXTS, EVALUATION_LOGITS // (dataset.shape[0] * dataset.classes)))


def _owned(dataset: Dataset, parts: Mapping[int, Tensor]) -> dict[int, Batches] | None:
    """The test examples of each client's owners, or None unless each owner's training examples are on one client."""
    if dataset.owners is None or dataset.test_owners is None:
        return None
    owners_of = {c: dataset.owners[index].unique() for c, index in parts.items()}
    if sum(map(len, owners_of.values())) > len(dataset.owners.unique()):
        return None
    test = {c: torch.isin(dataset.test_owners, owners).nonzero().flatten() for c, owners in owners_of.items()}
    return _batches(dataset, dataset.test, test)
