"""Readers of image files in the formats that data sets are published in.

A reader takes a folder and returns {"train_x": (N, C, H, W) uint8, "train_y": (N,) int64, "test_x", "test_y"}, or None
if the folder has no files of its format.  No file can make a reader run code.
"""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lilliput.core.sources import needs
from lilliput.data.cache import Arrays, cached, files_key

IMAGE_FILES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels", "character")


def cifar(root: Path) -> Arrays | None:
    """CIFAR's python batches, in the folder itself or in the one that their archive unpacks to."""
    for home in (root, root / "cifar-10-batches-py", root / "cifar-100-python"):
        ten, hundred = [home / f"data_batch_{i}" for i in range(1, 6)], [home / "train"]
        if all(file.is_file() for file in ten):
            return _sides(_batches(ten), _batches([home / "test_batch"]))
        if hundred[0].is_file() and (home / "meta").is_file():
            return _sides(_batches(hundred), _batches([home / "test"]))
    return None


def _batches(files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    parts = [_batch(file) for file in files]
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def _batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with file.open("rb") as stream:
            content = _ArraysOnly(stream, encoding="latin1").load()
        labels = content["labels"] if "labels" in content else content["fine_labels"]
        return content["data"].values.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)
    except FileNotFoundError as error:
        raise ValueError(f"there is no {file.name} in {file.parent}; unpack the whole archive there") from error
    except Exception as error:  # a damaged or foreign pickle may raise anything
        raise ValueError(f"{file} is not a CIFAR batch: {error}; unpack the archive again") from error


class _Array:
    """An array in a pickle.  NumPy's own unpickling trusts the dtype, which can turn bytes into pointers."""

    def __init__(self, *_: object) -> None:
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype) or dtype.code != "u1":
            raise pickle.UnpicklingError("it has arrays of something other than bytes")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 wrote bytes as text
        self.values = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Dtype:
    """The dtype of an array in a pickle: its code, such as u1.  Bytes have no byte order, so the state is ignored."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        pass


# numpy's function has two homes, by version.  Python 3 writes bytes for Python 2 as encoded text.
_HARMLESS: dict[str, Any] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
}


class _ArraysOnly(pickle.Unpickler):
    """Reads dicts, lists, strings, numbers and numpy arrays of bytes, and refuses every other class."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _HARMLESS:
            return _HARMLESS[f"{module}.{name}"]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")


def idx(root: Path) -> Arrays | None:
    """MNIST's four files, gzipped or not, in the folder itself or in the one that torchvision makes."""
    for home in (root, root / "raw", root / "MNIST" / "raw", root / "FashionMNIST" / "raw"):
        kinds = [f"{side}-{what}" for side in ("train", "t10k") for what in ("images?idx3", "labels?idx1")]
        matches = [sorted(home.glob(f"{kind}-ubyte*")) for kind in kinds]
        if all(matches):
            train_x, train_y, test_x, test_y = (_idx(files[0]) for files in matches)
            return _sides((train_x[:, None], train_y), (test_x[:, None], test_y))
    return None


def _idx(file: Path) -> np.ndarray:
    """One idx file of bytes: two zeros, type 8, the number of dimensions, each size as 4 bytes big-endian, the data."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if data[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as an idx file of bytes")
        shape = np.frombuffer(data, ">u4", data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape.astype(int)).copy()
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise ValueError(f"{file} cannot be read: {error}; download it again") from error


def mat(root: Path) -> Arrays | None:
    """SVHN's cropped digits as Matlab files; their label 10 is the digit 0."""
    files = [root / "train_32x32.mat", root / "test_32x32.mat"]
    if not all(file.is_file() for file in files):
        return None
    from scipy.io import loadmat

    contents = [loadmat(file) for file in files]
    train, test = ((c["X"].transpose(3, 2, 0, 1).copy(), c["y"].ravel().astype(np.int64) % 10) for c in contents)
    return _sides(train, test)


def parquet(root: Path, channels: int = 3) -> Arrays | None:
    """Parquet files named train-... and test-... with a column of encoded images and one of labels."""
    files = sorted(root.rglob("*.parquet"))
    sides = [[f for f in files if f.name.startswith(side)] for side in ("train", "test")]
    if not all(sides):
        return None
    key = f"parquet/{channels}/{files_key(sides[0] + sides[1])}"
    return cached(root.name, key, lambda: _sides(*(_tables(side, channels) for side in sides)))


def _tables(files: Sequence[Path], channels: int) -> tuple[np.ndarray, np.ndarray]:
    pq = needs("pyarrow.parquet", "pyarrow")
    parts = []
    for file in files:
        try:
            table = pq.read_table(file)
        except Exception as error:
            raise ValueError(f"{file} is not a Parquet file: {error}; download it again") from error
        image, label = (_column(file, table.column_names, names) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
        blobs = [x["bytes"] if isinstance(x, dict) else x for x in table.column(image).to_pylist()]
        parts.append((decoded(blobs, channels), np.array(table.column(label).to_pylist(), dtype=np.int64)))
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def _column(file: Path, columns: Sequence[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in columns:
            return name
    raise ValueError(f"{file} has columns {', '.join(columns)}; one of them must be called {' or '.join(wanted)}")


def tree(root: Path, channels: int = 3, size: int | None = None) -> Arrays | None:
    """One folder per class below train and test, or below the folder itself, which then has no test side.

    Classes are numbered in the order of their names; `size` resizes images to `size` x `size` pixels.
    """
    homes = {side: root / side for side in ("train", "test") if (root / side).is_dir()} or {"train": root}
    names = sorted({c.name for home in homes.values() for c in home.iterdir() if c.is_dir() and any(_images(c))})
    if not names:
        return None
    labelled = {
        side: [(file, k) for k, name in enumerate(names) for file in sorted(_images(home / name))]
        for side, home in homes.items()
    }
    key = f"tree/{channels}/{size}/{names}/" + "/".join(files_key(f for f, _ in pairs) for pairs in labelled.values())

    def build() -> Arrays:
        arrays = {}
        for side, pairs in labelled.items():
            arrays[f"{side}_x"] = decoded([f for f, _ in pairs], channels, size)
            arrays[f"{side}_y"] = np.array([k for _, k in pairs], dtype=np.int64)
        return arrays

    return cached(root.name, key, build)


def _images(folder: Path) -> Iterator[Path]:
    return (f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_FILES)


def decoded(images: Sequence[bytes | Path], channels: int = 3, size: int | None = None) -> np.ndarray:
    """Decode images in threads to (N, channels, H, W) uint8.  They must share one size unless `size` resizes them."""
    image = needs("PIL.Image", "Pillow")

    def one(source: bytes | Path) -> np.ndarray:
        picture = image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        picture = picture.convert("L" if channels == 1 else "RGB")
        return np.asarray(picture.resize((size, size)) if size else picture)

    def some(chunk: range) -> list[np.ndarray]:
        return [one(images[i]) for i in chunk]

    chunks = [range(i, min(i + 256, len(images))) for i in range(0, len(images), 256)]
    out: np.ndarray | None = None
    with ThreadPoolExecutor() as pool:  # Pillow decodes without holding the interpreter
        for chunk, pictures in zip(chunks, pool.map(some, chunks), strict=True):
            if out is None:
                out = np.empty((len(images), *pictures[0].shape), dtype=np.uint8)
            for i, picture in zip(chunk, pictures, strict=True):
                if picture.shape != out.shape[1:]:
                    sizes = f"{out.shape[1:3]} and {picture.shape[:2]}"
                    raise ValueError(f"there are images of {sizes} pixels; set size to resize them")
                out[i] = picture
    if out is None:
        raise ValueError("there are no images")
    return np.ascontiguousarray(out[:, None] if channels == 1 else out.transpose(0, 3, 1, 2))


def _sides(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> Arrays:
    columns = zip(("train_x", "train_y", "test_x", "test_y"), (*train, *test), strict=True)
    return {name: x.astype(np.int64) if name.endswith("y") else x for name, x in columns}
