"""Text to train a language model on, as a stream of documents: any local text, the standard library's source, or C4.

A document is a line of JSON lines, a row of Parquet, or a piece of a text file, cut at a blank line or at least at the
end of a line.  Only the current document is in memory, so a corpus may be larger than memory.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from lilliput.data.embedded import PACKAGES, files_of
from lilliput.data.formats import needs

_FACTOR = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
PIECE = 8_000  # characters of a text file after which the next blank line ends a document; after twice that, any line
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".txt", ".txt.gz", ".text", ".tokens", ".raw")
KEY = "text_key (dataset.key of a data set)"  # the setting for the field that holds the text
HELD_OUT = ("validation", "valid", "val", "dev", "eval")  # words that mark a file as validation text by its name


class Source(Protocol):
    """Documents in a fixed order."""

    def documents(self, skip: int = 0) -> Iterator[str]:
        """All documents but the first `skip`."""

    def fingerprint(self) -> str:
        """A string that tells this text from any other."""


@dataclass(frozen=True)
class Files:
    """The documents of files, one file after another.  `key` is the field or column that holds the text."""

    paths: tuple[Path, ...]
    key: str = "text"

    def documents(self, skip: int = 0) -> Iterator[str]:
        return islice((text for path in self.paths for text in read(path, self.key)), skip, None)

    def fingerprint(self) -> str:
        content = hashlib.blake2b(self.key.encode(), digest_size=12)
        for path in self.paths:
            # Only both ends and the length, because the file may have terabytes.
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(1 << 20)
                file.seek(max(0, size - (1 << 16)))
                content.update(f"{path.name}\0{size}\0".encode() + head + file.read())
        return content.hexdigest()


@dataclass(frozen=True)
class Library:
    """The source files of packages of Python's standard library."""

    packages: tuple[str, ...] = PACKAGES

    def documents(self, skip: int = 0) -> Iterator[str]:
        return islice((text for package in self.packages for text in files_of(package)), skip, None)

    def fingerprint(self) -> str:
        return hashlib.blake2b("\0".join(self.documents()).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Hub:
    """A split of a data set on Hugging Face's hub, streamed: it downloads only what is read."""

    path: str
    name: str | None
    split: str
    key: str = "text"

    def documents(self, skip: int = 0) -> Iterator[str]:
        datasets = needs("datasets", "Hugging Face datasets")
        try:
            rows = datasets.load_dataset(self.path, self.name, split=self.split, streaming=True)
        except Exception as error:  # the hub and the network raise errors of many types
            words = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{self.path} cannot be loaded from Hugging Face: {words}; go online, or name local files"
            ) from error
        return (_text(row, self.key, self.path) for row in rows.skip(skip))

    def fingerprint(self) -> str:
        return hashlib.blake2b(repr(self).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """The training or validation documents of a source.  A hash of a document's text decides which side it is on.

    share: the share of documents held out for validation; None if every document is on this side
    held_out: whether this is the side held out for validation
    """

    source: Source
    share: float | None = None
    held_out: bool = False

    def has(self, text: str) -> bool:
        """Whether a document has text and is on this side; equal documents are always on the same side."""
        if not text.strip():
            return False
        if self.share is None:
            return True
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return (int.from_bytes(digest, "little") / 2**64 < self.share) == self.held_out

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()}/{self.share}/{self.held_out}"


def corpora(
    data: str | Iterable[str], validation: str | Iterable[str] | None = None, held_out: float = 0.05, key: str = "text"
) -> tuple[Corpus, Corpus, str]:
    """(training text, validation text, a description of how they were separated).

    data: `c4` (streamed), `stdlib`, or files and folders of .txt, .jsonl, .json.gz or .parquet
    validation: the same for validation; by default C4's own split, or files named so, or a share `held_out`
    held_out: the share of documents kept for validation if there is no other validation text
    key: the field or column that holds the text
    Raises ValueError if the text does not exist or the files are of no such kind.
    """
    names = _listed(data)
    if validation is not None:
        return Corpus(_source(names, key)), Corpus(_source(_listed(validation), key)), "validation text of its own"
    if names == ["c4"]:
        return Corpus(_c4("train")), Corpus(_c4("validation")), "C4's own validation split"
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; give a share between 0 and 1, or validation=FILE")
    source = _source(names, key)
    if isinstance(source, Files):
        valid = tuple(path for path in source.paths if _is_held_out(path))
        train = tuple(path for path in source.paths if path not in valid)
        if valid and train:
            words = f"validation on {', '.join(path.name for path in valid)}"
            return Corpus(Files(train, key)), Corpus(Files(valid, key)), words
    words = f"{100 * held_out:g} % of the documents held out, by a hash of their text"
    return Corpus(source, held_out), Corpus(source, held_out, True), words


def count(value: str | int | float, name: str) -> int:
    """A number of tokens: 5000, 1e6, 500M, 1.1B.  Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?\d+)?)\s*([KMBT]?)", str(value).replace("_", ""), re.IGNORECASE)
    try:
        number = round(float(match[1]) * _FACTOR[match[2].upper()]) if match else 0
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}={value} is not a number of tokens; write 5000, 500M or 1.1B")
    return number


def read(path: Path, key: str = "text") -> Iterator[str]:
    """The documents of one file, in the format of its suffix.  Raises ValueError with the unreadable file and line."""
    kind = path.name.lower().removesuffix(".gz")
    reader = _parquet if kind.endswith(".parquet") else _json_lines if kind.endswith((".jsonl", ".json")) else _pieces
    try:
        yield from reader(path, key)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}; restore it, or leave it out") from None


def _parquet(path: Path, key: str) -> Iterator[str]:
    parquet = needs("pyarrow.parquet", "pyarrow, which comes with Hugging Face datasets,")
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a Parquet file: {error}") from None
    if key not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column {key!r}; there is {', '.join(file.schema_arrow.names)}; set {KEY}")
    for batch in file.iter_batches(batch_size=256, columns=[key]):
        yield from (text or "" for text in batch.column(0).to_pylist())


def _json_lines(path: Path, key: str) -> Iterator[str]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number} is not JSON: {error}") from None
                yield _text(row, key, f"{path}:{number}")


def _pieces(path: Path, key: str) -> Iterator[str]:
    """Cut a text file into documents of PIECE characters or a little more."""
    piece: list[str] = []
    size = 0
    with _opened(path) as lines:
        for line in lines:
            text = line.decode("utf-8", "replace")
            piece.append(text)
            size += len(text)
            if size >= 2 * PIECE or (size >= PIECE and not text.strip()):
                yield "".join(piece)
                piece, size = [], 0
    yield "".join(piece)


def _opened(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _text(row: Any, key: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(key), str | None) or key not in row:
        has = f"there is {', '.join(row)}" if isinstance(row, dict) else "it is not an object"
        raise ValueError(f"{where} has no text {key!r}; {has}; set {KEY}")
    return row[key] or ""


def _c4(split: str) -> Hub:
    return Hub("allenai/c4", "en", split)


def _source(names: list[str], key: str) -> Source:
    if names == ["stdlib"]:
        return Library()
    if names == ["c4"]:
        return _c4("train")
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if not path.exists():
            raise ValueError(f"there is no text at {name!r}; name a file or folder, c4 or stdlib")
        files = sorted(p for p in path.rglob("*") if p.name.lower().endswith(SUFFIXES)) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{name} holds no text: the names of files must end in {', '.join(SUFFIXES)}")
        paths += files
    return Files(tuple(paths), key)


def _is_held_out(path: Path) -> bool:
    words = path.name.lower().replace("-", " ").replace("_", " ").replace(".", " ").split()
    return any(word in HELD_OUT for word in words)


def _listed(names: str | Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
