"""A run's folder: where it lies, what it holds from the start, and which run of the same experiment there is already.

The folder is held locked while a run writes to it, so that no two processes do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from lilliput.config import Settings, from_file, settings
from lilliput.wire.store import replace

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"


def place(s: Settings) -> Path:
    """Where a new run of these settings goes: its name, or <algorithm>/<model>/<dataset>-<partition>/<time>."""
    root = Path(s["folder"])
    if s["name"] is not None:
        return root / str(s["name"])
    words = [_word(s, key) for key in ("algorithm", "model", "dataset", "partition")]
    return root / words[0] / words[1] / f"{words[2]}-{words[3]}" / time.strftime("%Y-%m-%d_%H-%M-%S")


def _word(s: Settings, axis: str) -> str:
    choice = s.choices.get(axis)
    return choice.name if choice else str(s[axis])


def refuse_taken(s: Settings) -> None:
    """Raise ValueError if the run was given a name that another has."""
    if s["name"] is not None:
        refuse_full(place(s))


def refuse_full(path: Path) -> None:
    """Raise ValueError if there is something in a folder that a new run was to have."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; choose another name=")
    if path.exists() and any(path.iterdir()):
        go_on = f"go on with `lilliput resume {path}`, remove it, or " if (path / CONFIG).is_file() else ""
        raise ValueError(f"{path} exists; {go_on}choose another name=")


@dataclass(frozen=True)
class Made:
    """The folder of a new run, and what there was before: `above` existed already, and was last changed `then`."""

    path: Path
    above: Path
    then: tuple[int, int]  # when `above` was last read and changed, before and after the folder was made
    since: int

    def undo(self) -> bool:
        """Remove the folder and those made to hold it, unless it got through a round; whether it was removed."""
        metrics = self.path / "metrics.jsonl"
        if (self.path / "checkpoint").exists() or (metrics.exists() and metrics.stat().st_size):
            return False
        alone = self.above.stat().st_mtime_ns == self.since
        for inner in self.path.iterdir() if self.path.is_dir() else ():
            if inner.is_dir() and not inner.is_symlink():
                shutil.rmtree(inner, ignore_errors=True)
            else:
                inner.unlink(missing_ok=True)
        for folder in (self.path, *self.path.parents):
            if folder == self.above:
                break
            try:
                folder.rmdir()
            except OSError:  # another run has come to lie in it
                return True
        if alone or self.path == self.above:  # nobody else has come and gone: as if we had not either
            os.utime(self.above, ns=self.then)
        return True


def make(s: Settings) -> Made:
    """Make the folder of a new run."""
    refuse_taken(s)
    return reserve(place(s), named=s["name"] is not None)


def reserve(wanted: Path, named: bool) -> Made:
    """Make a folder (see `fresh`) in a way that can be undone."""
    above = next((path for path in (wanted, *wanted.parents) if path.exists()), wanted)
    then = above.stat()
    path = fresh(wanted, named)
    return Made(path, above, (then.st_atime_ns, then.st_mtime_ns), above.stat().st_mtime_ns)


def fresh(folder: Path, named: bool) -> Path:
    """Make a folder; unless its name was chosen, a number sets those apart that start in the same second."""
    if named:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for number in range(1, 1000):
        path = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise ValueError(f"{folder} is taken a thousand times over; choose a name=")


def write_config(folder: Path, s: Any) -> None:
    """Write config.yaml, from which the run can be started again to the same bits."""
    replace(folder / CONFIG, as_yaml(s).encode())


def as_yaml(s: Any) -> str:
    """Settings, which give themselves by `as_dict()`, as text that `--config` reads."""
    values = s.as_dict()
    text = OmegaConf.to_yaml(values)
    # PyYAML writes these line breaks as they are in text that is not in double quotes, and then reads a space.
    if not re.search("[\x85\u2028\u2029]", text):
        return text
    return yaml.safe_dump(values, default_style='"', allow_unicode=True, sort_keys=False)


def read_config(folder: Path) -> Settings:
    """The settings of the federated run in a folder.  Raises ValueError if there is none, or it is damaged."""
    layer = layer_of(folder)
    if layer.get("program") == "pretrain":
        raise ValueError(
            f"{folder} is a run of `lilliput pretrain`: its perplexity is in metrics.jsonl, its model in model/"
        )
    return settings(layer)


def layer_of(folder: Path) -> dict[str, Any]:
    """What the config.yaml of a run says.  Raises ValueError if there is none, or it is damaged."""
    if not (folder / CONFIG).is_file():
        why = "is no run's folder: it has no config.yaml" if folder.is_dir() else "does not exist"
        raise ValueError(f"{folder} {why}; `lilliput run` starts a new run")
    return from_file(folder / CONFIG)


def note(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add facts to environment.json."""
    replace(folder / ENVIRONMENT, (json.dumps({**facts_of(folder), **facts}, indent=2) + "\n").encode())


class Noting:
    """A reporter that writes config.yaml and environment.json when every check has passed; `begun` says whether.

    s:     the settings, or None where those in the folder stay.
    facts: of what runs, for environment.json; None notes nothing.
    """

    def __init__(self, folder: Path, s: Any, facts: Callable[[Any], Mapping[str, Any]] | None):
        self.folder, self.s, self.facts, self.begun = folder, s, facts, False

    def start(self, run: Any, rows: Sequence[Any]) -> None:
        self.begun = True
        if self.s is not None:
            write_config(self.folder, self.s)
        if self.facts is not None:
            note(self.folder, self.facts(run))

    def progress(self, round: int, done: int, total: int) -> None:
        """Nothing is noted between."""

    def row(self, row: Mapping[str, Any]) -> None:
        """Nothing is noted between."""

    def end(self, rows: Sequence[Any]) -> None:
        """The end of all work is noted by the command."""


def facts_of(folder: Path) -> dict[str, Any]:
    """What environment.json says; nothing for one that is missing or damaged."""
    try:
        facts = json.loads((folder / ENVIRONMENT).read_bytes())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def runs(root: Path) -> Iterator[Path]:
    """Every run's folder at or below a folder, in order of path."""
    for path, folders, files in os.walk(root):
        folders.sort()
        if CONFIG in files:
            folders.clear()  # checkpoints may hold thousands of files
            yield Path(path)


def same(root: Path, fingerprint: str) -> list[Path]:
    """The runs of the same experiment, finished ones first, else the last started first."""
    facts = {run: facts_of(run) for run in runs(root)}
    mine = [run for run in facts if facts[run].get("fingerprint") == fingerprint]
    return sorted(mine, key=lambda r: (bool(facts[r].get("finished")), facts[r].get("started", "")), reverse=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a run's folder.  Raises ValueError if one does already."""
    handle = _locked(folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the lock; None on systems without, where the user is trusted not to start a run twice."""
    handle = None
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)  # type: ignore[arg-type]
        raise ValueError(f"{folder} is being written by another process; wait for it, or stop it") from None
    except (ImportError, OSError):
        pass
    return handle
