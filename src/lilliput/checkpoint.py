"""Checkpoints: a run can be killed at any moment and resumes with the bits it would have had.

A checkpoint is a folder: `manifest.json` names the round, the run and every file that belongs to it, with sizes and
checksums.  Files are written under new names first; replacing the manifest is the one step that makes them count.
All randomness is keyed by round and client, so there is no generator state to keep.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lilliput.store import File, Store, replace, write
from lilliput.tree import Body

FORMAT, VERSION = "lilliput-checkpoint", 1
# What reading a damaged manifest may raise; an infinity that stands for a whole number overflows.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, foreign, or of another version."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says: the run it belongs to, the rounds done, and the files of server and clients."""

    run: str
    identity: dict[str, Any]  # what must be the same for the run to go on; see Experiment.identity
    round: int
    attempt: int
    server: File
    states: dict[str, File]

    def read_server(self, folder: Path) -> Body:
        """The server's state; raises CheckpointError that names the file if it is damaged."""
        try:
            return self.server.read(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot go on from {folder}: {error}") from None

    def check(self, identity: dict[str, Any], folder: Path) -> None:
        """Raise CheckpointError if this is another experiment's."""
        for name, value in identity.items():
            if not _same(self.identity.get(name), value):
                raise CheckpointError(
                    f"{folder} belongs to another experiment: its {name} is {self.identity.get(name)!r}, not "
                    f"{value!r}; "
                    f"resume with the configuration it was made with, or choose another folder"
                )


def _same(then: Any, now: Any) -> bool:
    """Whether what was saved is what is; a setting that is newer than the checkpoint must be off."""
    if not isinstance(then, dict) or not isinstance(now, dict):
        return bool(then == now)
    return then.keys() <= now.keys() and all(then[k] == v if k in then else not v for k, v in now.items())


def save(folder: Path, saved: dict[str, Any], state: Body, store: Store) -> float:
    """Write a checkpoint of `round` and remove what the one before no longer shares; seconds it took."""
    started = time.perf_counter()
    prefix = f"round-{saved['round']}-{saved['attempt']}"
    states = store.flush(prefix)
    server = write(folder, f"{prefix}-server.safetensors", state)
    manifest = {"format": FORMAT, "version": VERSION, **saved, "server": asdict(server)}
    manifest["states"] = {key: asdict(file) for key, file in states.items()}
    supersede(folder, manifest, [server, *states.values()])
    return time.perf_counter() - started


def load(folder: Path) -> Saved | None:
    """The checkpoint in a folder, or None if there is none.

    Raises CheckpointError for one that is damaged, not ours, or of a version this release does not read; files are
    checked against their checksums when they are read, and here for being there.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_bytes())
        if data["format"] != FORMAT:
            raise CheckpointError(f"{path} is not a lilliput checkpoint")
        if data["version"] != VERSION:
            raise CheckpointError(f"{path} has version {data['version']}; this release reads version {VERSION}")
        saved = Saved(
            str(data["run"]), dict(data["identity"]), int(data["round"]), int(data["attempt"]),
            recorded(data["server"]), {str(key): recorded(value) for key, value in data["states"].items()},
        )  # fmt: skip
    except DAMAGE:
        raise CheckpointError(f"{path} is damaged; remove the folder to start again, or restore it") from None
    check_files(folder, [saved.server, *saved.states.values()])
    return saved


# What any checkpoint of a folder, a manifest and files does, whatever they hold.


def supersede(folder: Path, manifest: dict[str, Any], files: Iterable[File]) -> None:
    """Make a manifest count, and remove what of the folder it does not name."""
    replace(folder / "manifest.json", json.dumps(manifest).encode())
    current = {"manifest.json", *(file.name for file in files)}
    for path in folder.iterdir():
        if path.name not in current:
            path.unlink(missing_ok=True)


def check_files(folder: Path, files: Iterable[File]) -> None:
    """Raise CheckpointError for a file that is not there, or of another size."""
    for file in files:
        if not (folder / file.name).is_file() or (folder / file.name).stat().st_size != file.bytes:
            raise CheckpointError(
                f"cannot go on from {folder}: {file.name} is missing or has another size than recorded"
            )


def recorded(value: dict[str, Any]) -> File:
    """A file as a manifest records it.  Raises ValueError for one outside of the folder."""
    name = value["name"]
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"a checkpoint's file must lie in its folder, not at {name!r}")
    return File(name, int(value["bytes"]), int(value["crc"]))


def cut_lines(path: Path, rounds: int) -> list[dict[str, Any]]:
    """Cut a JSON-lines file back to the rounds that count; the lines kept.  A line half written is cut too."""
    if not path.exists():
        return []
    kept, size = [], 0
    with open(path, "rb") as lines:
        for line in lines:
            try:
                row = json.loads(line) if line.endswith(b"\n") else {}
            except ValueError:
                row = {}
            if not isinstance(row, dict) or not 0 < row.get("round", 0) <= rounds:
                break
            kept.append(row)
            size += len(line)
    with open(path, "r+b") as out:
        out.truncate(size)
    return kept
