"""Libraries that are not always installed, and what they load: from a folder, a file, or a name on the hub."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def needs(module: str, package: str, extra: str = "run") -> Any:
    """A module that is not always installed; raises ValueError with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"this needs {package}; pip install 'lilliput[{extra}]'") from error


def transformers() -> Any:
    """The library `transformers`; raises ValueError with the line that installs it."""
    return needs("transformers", "Hugging Face transformers", "hf")


def is_place(source: str) -> bool:
    """Whether a source is a place on this machine: it is there, or is written like a path."""
    return Path(source).expanduser().exists() or source.startswith((".", "/", "~")) or source.count("/") > 1


def place(source: str, kind: str) -> Path:
    """The path of a source; raises ValueError, in words about its `kind`, if there is nothing."""
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"there is no {kind} at {source!r}; name a folder, a .json file or a name on the hub")
    return path


def from_hub(load: Callable[..., Any], name: str, **options: Any) -> Any:
    """What `load` makes of a name on the hub: of the copy kept here, else fetched."""
    try:
        return load(name, local_files_only=True, **options)
    except OSError:
        return load(name, **options)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and reports of `transformers`; what matters in them is raised."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def line(error: Exception) -> str:
    """What an error of a library says, as the middle of a line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
