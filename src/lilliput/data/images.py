"""Image data sets by name: from a folder of their published files or of Parquet, else through Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from lilliput.core.random import generator
from lilliput.data import formats, hub
from lilliput.data.cache import Arrays
from lilliput.data.datasets import Dataset, existing

Reader = Callable[[Path], "Arrays | None"]


class ImageSet(NamedTuple):
    """A published data set: its facts, its format and its place on the hub."""

    classes: int
    channels: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    reader: Reader
    files: str  # the files that the reader looks for, as errors name them
    source: hub.Location
    augment: tuple[str, ...] = ()


IMAGE_SETS = {
    "cifar10": ImageSet(
        10, 3, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), formats.cifar,
        "data_batch_1 to 5 and test_batch", hub.Location("uoft-cs/cifar10"), ("crop:4", "flip"),
    ),
    "cifar100": ImageSet(
        100, 3, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), formats.cifar,
        "train, test and meta", hub.Location("uoft-cs/cifar100", label="fine_label"), ("crop:4", "flip"),
    ),
    "cinic10": ImageSet(
        10, 3, (0.4789, 0.4723, 0.4305), (0.2421, 0.2383, 0.2587), formats.tree,
        "train and test with a folder for each class", hub.Location("flwrlabs/cinic10"),
    ),
    "svhn": ImageSet(
        10, 3, (0.5,) * 3, (0.5,) * 3, formats.mat,
        "train_32x32.mat and test_32x32.mat", hub.Location("ufldl-stanford/svhn", config="cropped_digits"),
    ),
    "mnist": ImageSet(
        10, 1, (0.1307,), (0.3081,), formats.idx,
        "train-images-idx3-ubyte and its three siblings", hub.Location("ylecun/mnist"),
    ),
    "fashion_mnist": ImageSet(
        10, 1, (0.2860,), (0.3530,), formats.idx,
        "train-images-idx3-ubyte and its three siblings", hub.Location("zalando-datasets/fashion_mnist"),
    ),
    "femnist": ImageSet(
        62, 1, None, None, lambda root: None,
        "no files of its own", hub.Location("flwrlabs/femnist", label="character", owner="writer_id"),
    ),
}  # fmt: skip


def named(name: str, folder: str | None = None) -> Dataset:
    """A data set of `IMAGE_SETS`.  Raises ValueError if `folder` lacks its files, or the hub cannot deliver it."""
    facts = IMAGE_SETS[name]
    if folder is None:
        arrays = hub.fetch(name, facts.source, facts.channels)
    else:
        root = existing(folder)
        read = facts.reader(root) or formats.parquet(root, facts.channels)
        if read is None or "test_x" not in read:
            raise ValueError(
                f"{folder} does not hold {name}: neither {facts.files}, nor train-*.parquet, test-*.parquet"
            )
        arrays = read
    return _dataset(name, arrays, facts.classes, facts.mean, facts.std, facts.augment)


def cifar10(folder: str | None = None) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test colour images of 32 x 32, 10 classes; augmented by crop and flip.

    folder: the python batches or Parquet files; by default they come from Hugging Face
    """
    return named("cifar10", folder)


def cifar100(folder: str | None = None) -> Dataset:
    """CIFAR-100: 50,000 training and 10,000 test colour images of 32 x 32, 100 classes; augmented by crop and flip.

    folder: the python batches or Parquet files; by default they come from Hugging Face
    """
    return named("cifar100", folder)


def cinic10(folder: str | None = None) -> Dataset:
    """CINIC-10: 90,000 training and 90,000 test colour images of 32 x 32 from CIFAR-10 and ImageNet, 10 classes.

    folder: its folders train and test, or Parquet files; by default they come from Hugging Face
    """
    return named("cinic10", folder)


def svhn(folder: str | None = None) -> Dataset:
    """SVHN: 73,257 training and 26,032 test colour images of 32 x 32 of digits in house numbers, 10 classes.

    folder: train_32x32.mat and test_32x32.mat, or Parquet files; by default they come from Hugging Face
    """
    return named("svhn", folder)


def mnist(folder: str | None = None) -> Dataset:
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, grey, 28 x 28, 10 classes.

    folder: the four idx files, gzipped or not, or Parquet files; by default they come from Hugging Face
    """
    return named("mnist", folder)


def fashion_mnist(folder: str | None = None) -> Dataset:
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothes, grey, 28 x 28, 10 classes.

    folder: the four idx files, gzipped or not, or Parquet files; by default they come from Hugging Face
    """
    return named("fashion_mnist", folder)


def femnist(folder: str | None = None) -> Dataset:
    """FEMNIST: 814,255 handwritten characters, grey, 28 x 28, 62 classes, one client per writer; a tenth for testing.

    folder: a copy of the Hugging Face data set; by default it comes from Hugging Face
    """
    facts = IMAGE_SETS["femnist"]
    source = facts.source if folder is None else facts.source._replace(path=str(existing(folder)))
    return _dataset("femnist", hub.fetch("femnist", source, facts.channels), facts.classes)


def image_folder(
    folder: str | None = None, size: int | None = None, channels: Literal[1, 3] = 3, test_share: float = 0.2
) -> Dataset:
    """Your own image files: one folder per class, below train and test or below the folder itself.

    folder: where they are
    size: resizes images to size x size pixels; needed if their sizes differ
    channels: 3 for colour, 1 for grey
    test_share: share kept for testing if there is no folder test
    """
    if folder is None:
        raise ValueError("image_folder needs dataset.folder: a folder with one folder of images per class")
    arrays = formats.tree(existing(folder), channels, size)
    if arrays is None:
        raise ValueError(f"{folder} has no folders of images; put each class's images into a folder of its name")
    if "test_x" not in arrays:
        arrays = _held_out(arrays, test_share)
    return _dataset(Path(folder).name, arrays, _classes(arrays))


def from_hub(
    path: str = "", config: str | None = None, image: str | None = None, label: str | None = None,
    owner: str | None = None, channels: Literal[1, 3] = 3,
) -> Dataset:  # fmt: skip
    """Any image classification data set on Hugging Face, or a folder in its layout.

    path: its name there, such as zalando-datasets/fashion_mnist, or a folder
    config: which of its configurations
    image: the column of images; by default found by its type
    label: the column of labels; by default found by its type
    owner: the column that names the owner of an example
    channels: 3 for colour, 1 for grey
    """
    if not path:
        raise ValueError("hub needs a path: the data set's name on Hugging Face, such as uoft-cs/cifar10")
    arrays = hub.fetch(path, hub.Location(path, config, image, label, owner), channels)
    return _dataset(Path(path).name, arrays, _classes(arrays))


def _classes(arrays: Arrays) -> int:
    return int(max(arrays["train_y"].max(), arrays["test_y"].max())) + 1


def _held_out(arrays: Arrays, share: float) -> Arrays:
    """Move a random share, the same on every call, to the test side."""
    total = len(arrays["train_y"])
    count = round(total * share)
    if not 0 < count < total:
        raise ValueError(f"test_share={share} of {total} images leaves one side empty; it must lie between 0 and 1")
    order = torch.randperm(total, generator=generator("image_folder", "split")).numpy()
    sides = {"test": np.sort(order[:count]), "train": np.sort(order[count:])}
    return {f"{side}_{c}": arrays[f"train_{c}"][index] for side, index in sides.items() for c in "xy"}


def _dataset(
    name: str, arrays: Arrays, classes: int, mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None, augment: tuple[str, ...] = (),
) -> Dataset:  # fmt: skip
    columns = {key: torch.from_numpy(array) for key, array in arrays.items()}
    for side in ("train", "test"):
        labels = columns[f"{side}_y"]
        low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
        if low < 0 or high >= classes:
            raise ValueError(f"{name} has labels {low} to {high} and {classes} classes; these are not its files")
    return Dataset(
        name, (columns["train_x"], columns["train_y"]), (columns["test_x"], columns["test_y"]), classes,
        kind="image", mean=mean, std=std, augment=augment,
        owners=columns.get("train_owner"), test_owners=columns.get("test_owner"),
    )  # fmt: skip
