"""How the examples of a data set are spread over the clients.

A partition is a function `(dataset, clients, seed, ...) -> {client: indices}` that assigns every training example to
exactly one client, and does the same for the same seed on every machine.

flwr-datasets has partitioners too, which work offline and are fixed by a seed.  Ours exist because flwr-datasets takes
2.6 s to import and 0.5 to 6 s to spread 50,000 labels over 10 to 1,000 clients (ours take 3 to 30 ms on one core), and
because its shards and pathological clients leave examples out.  The partition `flwr` offers all of its partitioners.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lilliput.core.random import key
from lilliput.core.registry import nearest, resolve
from lilliput.data.datasets import Dataset

Parts = Mapping[int, Any] | Sequence[Any]
TRIES = 1000


def iid(dataset: Dataset, clients: int, seed: int) -> Parts:
    """Deals examples at random, so that clients have similar data; sizes differ by at most one."""
    return np.array_split(_rng(seed, "iid").permutation(len(dataset.train[0])), clients)


def dirichlet(dataset: Dataset, clients: int, seed: int, alpha: float = 0.5, min_size: int = 10) -> Parts:
    """Splits each class among clients by Dirichlet proportions, so sizes differ too (NIID-Bench, Li et al., 2022).

    alpha: small is skewed, large is even
    min_size: examples that every client must have; if no draw reaches it, the best draw is used
    A client that already has its even share gets nothing of the classes that follow.
    """
    _positive("alpha", alpha)
    rng, counts = _rng(seed, "dirichlet"), _counts(dataset, "dirichlet")
    min_size = min(min_size, int(counts.sum()) // clients)
    best = _skewed(rng, counts, clients, alpha)
    for _ in range(TRIES):
        if best.sum(1).min() >= min_size:
            break
        best = max(best, _skewed(rng, counts, clients, alpha), key=lambda shares: shares.sum(1).min())
    return _deal(rng, dataset, best)


def _skewed(rng: np.random.RandomState, counts: np.ndarray, clients: int, alpha: float) -> np.ndarray:
    """Counts (clients, classes): draws proportions for each class among the clients still below their even share."""
    shares = np.zeros((clients, len(counts)), dtype=np.int64)
    for k in np.flatnonzero(counts):
        count = counts[k]
        below = shares.sum(1) < counts.sum() / clients
        p = _proportions(rng, np.full(clients, alpha)) * below
        p = p / p.sum() if p.sum() > 0 else below / below.sum()
        shares[:, k] = np.diff((np.cumsum(p) * count).astype(np.int64), prepend=0)
        shares[np.flatnonzero(below)[-1], k] += count - shares[:, k].sum()
    return shares


def dirichlet_equal(dataset: Dataset, clients: int, seed: int, alpha: float = 0.5) -> Parts:
    """Draws each client's mix of classes from a Dirichlet around the data set's; sizes are equal: only classes skew.

    alpha: small is skewed, large is even
    The draws (clients, classes) are scaled alternately to the sizes of clients and classes (iterative proportional
    fitting), so no client is left with the remains of the others.  They are rounded down, and the rest is dealt out.
    """
    _positive("alpha", alpha)
    rng, counts = _rng(seed, "dirichlet_equal"), _counts(dataset, "dirichlet_equal")
    sizes = np.array([len(part) for part in np.array_split(np.arange(counts.sum()), clients)])
    prior = counts / counts.sum()
    # A share of the data set's own mix, far below one example, rules out patterns of zeros that cannot be fitted.
    mix = np.stack([_proportions(rng, alpha * len(prior) * prior + 1e-12) for _ in range(clients)]) + 1e-9 * prior
    for _ in range(TRIES):
        mix *= (sizes / mix.sum(1))[:, None]
        scale = counts / np.maximum(mix.sum(0), 1e-300)
        mix *= scale
        if np.abs(scale[counts > 0] - 1).max() < 1e-9:
            break
    mix *= np.minimum(sizes / mix.sum(1), 1)[:, None]
    shares = np.floor(mix + 1e-6).astype(np.int64)
    return _deal(rng, dataset, _filled(rng, shares, sizes, counts))


def _filled(rng: np.random.RandomState, shares: np.ndarray, sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Raise shares that exceed neither until they add up to `sizes` by client and `counts` by class."""
    clients = np.repeat(np.arange(len(sizes)), sizes - shares.sum(1))
    classes = rng.permutation(np.repeat(np.arange(len(counts)), counts - shares.sum(0)))
    np.add.at(shares, (clients, classes), 1)
    return shares


def shards(dataset: Dataset, clients: int, seed: int, shards_per_client: int = 2) -> Parts:
    """Sorts examples by class, cuts them into equal shards and deals each client as many (McMahan et al., 2017).

    shards_per_client: shards of each client
    """
    _positive("shards_per_client", shards_per_client)
    rng, labels = _rng(seed, "shards"), _labels(dataset, "shards")
    mixed = rng.permutation(len(labels))
    pieces = np.array_split(mixed[labels[mixed].argsort(kind="stable")], clients * shards_per_client)
    hands = rng.permutation(len(pieces)).reshape(clients, shards_per_client)
    return [np.concatenate([pieces[i] for i in hand]) for hand in hands]


def pathological(dataset: Dataset, clients: int, seed: int, classes_per_client: int = 2) -> Parts:
    """Gives each client a fixed number of classes; the clients that have a class share its examples evenly.

    classes_per_client: distinct classes of each client
    """
    rng, counts = _rng(seed, "pathological"), _counts(dataset, "pathological")
    present = np.flatnonzero(counts)
    if not 1 <= classes_per_client <= len(present):
        raise ValueError(f"classes_per_client is {classes_per_client}; there are {len(present)} classes")
    if clients * classes_per_client < len(present):
        raise ValueError(
            f"{clients} clients of {classes_per_client} classes leave some of {len(present)} classes to nobody; "
            f"choose classes_per_client >= {-(-len(present) // clients)}"
        )
    has_class = np.zeros((clients, len(counts)), dtype=bool)
    for client in range(clients):
        # The classes with the fewest holders so far, ties at random, so that every class finds a holder.
        rarity = has_class[:, present].sum(0) + rng.random(len(present))
        has_class[client, present[rarity.argsort()[:classes_per_client]]] = True
    shares = np.zeros(has_class.shape, dtype=np.int64)
    for k in present:
        holders = np.flatnonzero(has_class[:, k])
        shares[holders, k] = [len(part) for part in np.array_split(np.arange(counts[k]), len(holders))]
    return _deal(rng, dataset, shares)


def class_blocks(dataset: Dataset, clients: int, seed: int) -> Parts:
    """Gives each client all examples of a block of consecutive classes, as in FedSub's ResNet experiments.

    Blocks have equal numbers of classes; if they do not divide evenly, the first blocks have one more.
    There is no randomness: every seed gives the same partition.
    """
    counts = _counts(dataset, "class_blocks")
    present = np.flatnonzero(counts)
    if clients > len(present):
        raise ValueError(f"clients is {clients}; {dataset.name} has {len(present)} classes, choose 1 to {len(present)}")
    client_of = np.zeros(len(counts), dtype=np.int64)
    client_of[present] = np.repeat(np.arange(clients), [len(b) for b in np.array_split(present, clients)])
    return _grouped(client_of[_labels(dataset, "class_blocks")], clients)


def quantity(dataset: Dataset, clients: int, seed: int, alpha: float = 0.5, min_size: int = 10) -> Parts:
    """Deals examples at random to clients whose sizes are a Dirichlet draw: only sizes skew (NIID-Bench).

    alpha: small is skewed, large is even
    min_size: least examples of a client, or its even share if that is less
    """
    _positive("alpha", alpha)
    rng, total = _rng(seed, "quantity"), len(dataset.train[0])
    least = min(min_size, total // clients)
    spare = total - least * clients
    ends = np.cumsum(_proportions(rng, np.full(clients, alpha)) * spare).round().astype(np.int64)
    sizes = least + np.diff(np.append(ends[:-1], spare), prepend=0)
    return np.split(rng.permutation(total), np.cumsum(sizes)[:-1])


def natural(dataset: Dataset, clients: int, seed: int) -> Parts:
    """Uses the data set's own clients, such as writers or speakers; with fewer clients, each has several of them."""
    if dataset.owners is None:
        raise ValueError(f"{dataset.name} has no clients of its own; choose another partition, such as dirichlet")
    ids, examples = np.unique(dataset.owners.numpy(), return_inverse=True)
    if clients > len(ids):
        raise ValueError(f"{dataset.name} has {len(ids)} clients of its own; choose clients <= {len(ids)}")
    client_of = np.arange(len(ids))
    if clients < len(ids):
        client_of = _rng(seed, "natural").permutation(client_of) % clients
    return _grouped(client_of[examples], clients)


def fixed(dataset: Dataset, clients: int, seed: int, file: str = "") -> Parts:
    """Reads the partition from a JSON file of {client: [indices]}: choose it to repeat a partition exactly.

    file: the path of the file
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no partition file {file!r}; write one as JSON, {{client: [indices]}}")
    try:
        return {int(client): part for client, part in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a partition: {error}; write JSON, {{client: [indices]}}") from error


def flwr(
    dataset: Dataset, clients: int, seed: int, partitioner: str = "LinearPartitioner",
    options: Mapping[str, Any] | None = None,
) -> Parts:  # fmt: skip
    """Any partitioner of flwr-datasets, over the column `label` and, if the data set has clients of its own, `owner`.

    partitioner: the name of its class
    options: its other arguments; the number of partitions, the column `label` and the seed are passed already
    """
    try:
        from datasets import Dataset as Table
        from flwr_datasets import partitioner as known
    except ImportError as error:
        raise ValueError("the partition flwr needs flwr-datasets; pip install 'lilliput[run]'") from error
    kinds = [name for name in known.__all__ if name != "Partitioner" and not name.startswith("Vertical")]
    if partitioner not in kinds:
        raise ValueError(f"flwr-datasets has no partitioner {partitioner!r}; {nearest(partitioner, kinds)}")
    kind = getattr(known, partitioner)
    given = {"num_partitions": clients, "partition_by": "label", "seed": seed}
    accepted = inspect.signature(kind).parameters
    try:
        made = kind(**{**{name: value for name, value in given.items() if name in accepted}, **(options or {})})
    except TypeError as error:
        raise ValueError(f"{partitioner}: {error}; it takes options {', '.join(accepted)}") from error
    made.dataset = Table.from_dict(_columns(dataset))
    return [made.load_partition(client)["index"][:] for client in range(made.num_partitions)]


def _columns(dataset: Dataset) -> dict[str, Any]:
    columns: dict[str, Any] = {"index": np.arange(len(dataset.train[0]))}
    if len(dataset.train) > 1 and dataset.train[1].dim() == 1:
        columns["label"] = dataset.train[1].numpy()
    if dataset.owners is not None:
        columns["owner"] = dataset.owners.numpy()
    return columns


PARTITIONS: dict[str, Callable[..., Parts]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "dirichlet_equal": dirichlet_equal,
    "shards": shards,
    "pathological": pathological,
    "class_blocks": class_blocks,
    "quantity": quantity,
    "natural": natural,
    "fixed": fixed,
    "flwr": flwr,
}


def split(
    dataset: Dataset, partition: str | Mapping[int, Any] = "iid", clients: int = 10, seed: int = 0, **options: Any
) -> dict[int, Tensor]:
    """Sorted indices (int64) of each client's training examples; `partition` is a name or the indices themselves.

    Raises ValueError if a name or option is unknown, if an example has not exactly one client, or a client is empty.
    """
    if isinstance(partition, Mapping):
        return checked(partition, len(dataset.train[0]))
    total = len(dataset.train[0])
    if not 1 <= clients <= total:
        raise ValueError(f"clients is {clients}; {dataset.name} has {total} training examples, choose 1 to {total}")
    rule = resolve("partition", partition, PARTITIONS)
    try:
        parts = rule(dataset, clients, seed, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"partition {partition!r}: {str(error).partition('() ')[2]}") from error
    return checked(parts, total)


def checked(parts: Parts, total: int) -> dict[int, Tensor]:
    """Sorted indices of each client, from a mapping or a sequence.

    Raises ValueError if a client is empty, or unless every index below `total` occurs exactly once.
    """
    items = parts.items() if isinstance(parts, Mapping) else enumerate(parts)
    tidy = {int(client): torch.as_tensor(np.sort(np.asarray(part, dtype=np.int64))) for client, part in items}
    empty = [client for client, part in tidy.items() if not len(part)]
    if empty:
        raise ValueError(
            f"the partition leaves {len(empty)} of {len(tidy)} clients without examples (client {empty[0]} first); "
            "choose fewer clients, a larger alpha or another seed"
        )
    every = torch.cat(list(tidy.values())) if tidy else torch.empty(0, dtype=torch.int64)
    if len(every) != total or not torch.equal(every.sort().values, torch.arange(total)):
        raise ValueError(
            f"the partition has {len(every)} indices, {len(every.unique())} of them distinct; "
            f"every index from 0 to {total - 1} must occur exactly once"
        )
    return tidy


def _rng(seed: int, name: str) -> np.random.RandomState:
    # RandomState, because NumPy promises that its streams never change: a seed means the same partition for ever.
    return np.random.RandomState(np.random.MT19937(key("partition", name, seed)))


def _proportions(rng: np.random.RandomState, alpha: np.ndarray) -> np.ndarray:
    """A draw from Dirichlet(alpha), for alpha however small.

    Gamma(a) is Gamma(a + 1) U^(1/a).  In logarithms it does not underflow, unlike NumPy's own draws.
    """
    logs = np.log(rng.standard_gamma(alpha + 1)) + np.log(rng.random_sample(len(alpha))) / alpha
    shares = np.exp(logs - logs.max())
    return shares / shares.sum()


def _labels(dataset: Dataset, name: str) -> np.ndarray:
    if len(dataset.train) < 2 or dataset.train[1].dim() != 1:
        raise ValueError(f"partition {name} needs a label per example; for {dataset.name} choose iid or natural")
    return dataset.train[1].numpy()


def _counts(dataset: Dataset, name: str) -> np.ndarray:
    return np.bincount(_labels(dataset, name), minlength=dataset.classes)


def _deal(rng: np.random.RandomState, dataset: Dataset, shares: np.ndarray) -> Parts:
    """Indices by client, drawn at random from each class; `shares` (clients, classes) has their numbers."""
    labels = dataset.train[1].numpy()
    client_of = np.empty(len(labels), dtype=np.int64)
    for k in range(shares.shape[1]):
        members = rng.permutation(np.flatnonzero(labels == k))
        client_of[members] = np.repeat(np.arange(len(shares)), shares[:, k])
    return _grouped(client_of, len(shares))


def _grouped(client_of: np.ndarray, clients: int) -> Parts:
    """Indices by client, given the client of each index."""
    return np.split(client_of.argsort(kind="stable"), np.bincount(client_of, minlength=clients).cumsum()[:-1])


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be greater than 0")
