"""Image data sets through Hugging Face `datasets`: by their name on the hub, or from a folder in its layout."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lilliput.core.sources import needs
from lilliput.data.cache import Arrays, cached
from lilliput.data.formats import IMAGE_COLUMNS, LABEL_COLUMNS, decoded


class Location(NamedTuple):
    """Where a data set is and what its columns are called; None finds the image and label columns by type."""

    path: str
    config: str | None = None
    image: str | None = None
    label: str | None = None
    owner: str | None = None


def fetch(name: str, source: Location, channels: int = 3) -> Arrays:
    """Load train_x, train_y, test_x, test_y and, with an owner column, train_owner and test_owner.

    Without a split `test`, the test side is `validation`, or else the last tenth of each owner's examples (of all
    examples without owners).  Raises ValueError if the data set cannot be loaded.
    """
    datasets = needs("datasets", "Hugging Face datasets")
    try:
        sides = datasets.load_dataset(source.path, source.config)
    except Exception as error:  # the hub, the network and the files raise errors of many types
        words = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name} cannot be loaded from Hugging Face ({source.path}): {words}; go online or set dataset.folder"
        ) from error
    train, test = sides["train"], sides.get("test", sides.get("validation"))
    key = "/".join(["hub", str(channels), *(str(source[2:]),), *(side._fingerprint for side in (train, test) if side)])

    def build() -> Arrays:
        arrays = _columns(train, source, channels, "train")
        if test is None:
            return _last_tenth(_numbered(arrays))
        return _numbered({**arrays, **_columns(test, source, channels, "test")})

    return cached(name, key, build)


def _columns(side: Any, source: Location, channels: int, prefix: str) -> Arrays:
    import datasets

    image = source.image or _typed(side, datasets.Image, IMAGE_COLUMNS)
    label = source.label or _typed(side, datasets.ClassLabel, LABEL_COLUMNS)
    raw = side.cast_column(image, datasets.Image(decode=False)).with_format("arrow")
    pixels = [decoded(_blobs(part[image]), channels) for part in raw.iter(batch_size=10_000)]
    columns = {f"{prefix}_x": np.concatenate(pixels), f"{prefix}_y": np.array(side[label][:], dtype=np.int64)}
    if source.owner:
        columns[f"{prefix}_owner"] = np.array(side[source.owner][:])
    return columns


def _numbered(arrays: Arrays) -> Arrays:
    """The arrays with owners numbered from 0, with the same numbers in training and test."""
    names = [name for name in arrays if name.endswith("_owner")]
    if not names:
        return arrays
    ids = np.unique(np.concatenate([arrays[name] for name in names]))
    return {**arrays, **{name: np.searchsorted(ids, arrays[name]) for name in names}}


def _blobs(column: Any) -> list[bytes]:
    """The bytes of encoded images; a data set from a folder stores them as paths."""
    return [x["bytes"] if x["bytes"] is not None else _read(x["path"]) for x in column.to_pylist()]


def _read(path: str) -> bytes:
    with open(path, "rb") as stream:
        return stream.read()


def _typed(side: Any, kind: type, usual: tuple[str, ...]) -> str:
    names = [name for name, feature in side.features.items() if isinstance(feature, kind)]
    names = names or [name for name in usual if name in side.features]
    if not names:
        raise ValueError(f"none of the columns {', '.join(side.features)} is a {kind.__name__}; name the column")
    return names[0]


def _last_tenth(arrays: Arrays) -> Arrays:
    owner = arrays.get("train_owner", np.zeros(len(arrays["train_y"]), dtype=np.int64))
    order = owner.argsort(kind="stable")
    sizes = np.bincount(owner)
    rank = np.empty(len(owner), dtype=np.int64)
    rank[order] = np.arange(len(owner)) - np.repeat(sizes.cumsum() - sizes, sizes)
    last = rank >= sizes[owner] - sizes[owner] // 10
    sides = {"train": ~last, "test": last}
    return {key.replace("train", side): x[mask] for side, mask in sides.items() for key, x in arrays.items()}
