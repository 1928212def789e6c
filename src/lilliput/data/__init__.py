"""Data sets by name or of your own, how their examples are spread over clients, and the batches that a client draws.

>>> data = federate(load("digits"), "dirichlet", clients=20, alpha=0.5)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lilliput.core.registry import resolve
from lilliput.data import images, nlg, text, tokenised, wikitext
from lilliput.data.batches import ArrayBatches, Batch, Batches, ListBatches, Pooled, as_batches, pooled
from lilliput.data.datasets import Dataset
from lilliput.data.embedded import digits, stdlib
from lilliput.data.federate import Federated, federate
from lilliput.data.partition import PARTITIONS
from lilliput.data.picture import class_counts, picture

DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "stdlib": stdlib,
    "cifar10": images.cifar10,
    "cifar100": images.cifar100,
    "cinic10": images.cinic10,
    "svhn": images.svhn,
    "mnist": images.mnist,
    "fashion_mnist": images.fashion_mnist,
    "femnist": images.femnist,
    "image_folder": images.image_folder,
    "hub": images.from_hub,
    "text": text.text,
    "tinyshakespeare": text.tinyshakespeare,
    "shakespeare_roles": text.shakespeare_roles,
    "e2e": nlg.e2e,
    "webnlg": nlg.webnlg,
    "corpus": tokenised.corpus,
    "wikitext2": wikitext.wikitext2,
}

__all__ = [
    "DATASETS", "PARTITIONS", "ArrayBatches", "Batch", "Batches", "Dataset", "Federated", "ListBatches", "Pooled",
    "as_batches", "class_counts", "digits", "federate", "load", "names", "picture", "pooled", "stdlib",
]  # fmt: skip


def names() -> list[str]:
    """The names that `load` knows, in alphabetical order."""
    return sorted(DATASETS)


def load(name: str, folder: str | None = None, **options: Any) -> Dataset:
    """Load the data set of this name; `folder` is where its files are, if it has any.

    `name` is one of `names()`, a file and a name in it (`mine.py:my_data`), an import path (`package.module:my_data`)
    or an entry point of the group `lilliput.datasets`; your own data set is a `Dataset` or a function that returns one.
    Raises ValueError if the name or an option is unknown, or if files are missing or malformed.
    """
    made = resolve("dataset", name, DATASETS)
    if isinstance(made, Dataset):
        return made
    if folder is not None:
        options["folder"] = folder
    try:
        dataset = made(**options)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ValueError(f"dataset {name!r}: {str(error).partition('() ')[2] or error}") from error
    if not isinstance(dataset, Dataset):
        raise ValueError(f"dataset {name!r} made a {type(dataset).__name__}; it must make a lilliput.data.Dataset")
    return dataset
