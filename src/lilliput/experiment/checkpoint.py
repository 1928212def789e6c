"""Checkpoints: a run can be killed at any moment and resumes with the bits it would have had.

A checkpoint is a folder: `manifest.json` names the round, the run and every file that belongs to it, with sizes and
checksums.  Files are written under new names first; replacing the manifest is the one step that makes them count.
All randomness is keyed by round and client, so there is no generator state to keep.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lilliput.core.tree import Body
from lilliput.experiment.identity import differences, told
from lilliput.wire.store import File, Store, checksum, replace, write

FORMAT, VERSION, MANIFEST = "lilliput-checkpoint", 2, "manifest.json"
# What reading a damaged manifest may raise; an infinity that stands for a whole number overflows.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, foreign, or of another version."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says: the run it belongs to, the rounds done, and the files of server and clients."""

    run: str
    identity: dict[str, Any]  # what must be the same for the run to go on; see lilliput.experiment.identity
    planned: int  # the rounds that the run was planned for, which its schedule follows
    round: int
    attempt: int
    server: File
    states: dict[str, File]
    files: dict[str, int]  # that hold the states, and their bytes

    def read_server(self, folder: Path) -> Body:
        """The server's state; raises CheckpointError that names the file if it is damaged."""
        try:
            return self.server.read(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot go on from {folder}: {error}") from None

    def check(self, identity: dict[str, Any], folder: Path) -> None:
        """Raise CheckpointError, naming what differs, if this is another experiment's."""
        found = list(differences(self.identity, identity))
        if found:
            raise CheckpointError(
                f"{folder} belongs to another experiment: {told(found)}; "
                f"go on with the configuration it was made with, or choose another folder"
            )

    def check_rounds(self, algorithm: Any, rounds: int, folder: Path) -> None:
        """Raise CheckpointError if a run of so many rounds could not have begun like this one.

        Its rounds would be fewer than were done, or have had other learning rates than those that were taken.
        """
        if rounds < self.round:
            raise CheckpointError(f"{folder} has done {self.round} rounds, more than rounds={rounds}; ask for more")
        factor = getattr(algorithm, "factor_at", None)
        if factor is None or rounds == self.planned:
            return
        for number in range(1, self.round + 1):
            then, now = factor(number, self.planned), factor(number, rounds)
            if then != now:
                raise CheckpointError(
                    f"schedule={getattr(algorithm, 'schedule', '')} of {folder} was laid out over {self.planned} "
                    f"rounds, and over {rounds} its learning rate would jump: in round {number} it would have been "
                    f"{now / then if then else now:.3g} times what it was; go on with rounds={self.planned}, or train "
                    f"on from its weights in a new run with init={folder}"
                )


def save(folder: Path, saved: dict[str, Any], state: Body, store: Store) -> float:
    """Write a checkpoint of `round` and remove what the one before no longer shares; seconds it took."""
    started = time.perf_counter()
    prefix = f"round-{saved['round']}-{saved['attempt']}"
    states, files = store.flush(prefix), store.sizes
    server = write(folder, f"{prefix}-server.safetensors", state)
    manifest = {"format": FORMAT, "version": VERSION, **saved, "server": asdict(server), "files": files}
    place = {name: number for number, name in enumerate(files)}
    # A row of numbers for each: there may be as many as clients.
    manifest["states"] = {key: [place[f.name], f.offset, f.bytes, f.crc] for key, f in states.items()}
    supersede(folder, manifest, [server.name, *files])
    store.settle()
    return time.perf_counter() - started


def load(folder: Path) -> Saved | None:
    """The checkpoint in a folder, or None if there is none.

    Raises CheckpointError for one that is damaged, not ours, or of a version this release does not read; files are
    checked against their checksums when they are read, and here for being there.
    """
    data = read_manifest(folder, FORMAT, VERSION)
    if data is None:
        return None
    try:
        saved = Saved(
            str(data["run"]), dict(data["identity"]), int(data["planned"]), int(data["round"]), int(data["attempt"]),
            recorded(data["server"]), *_states(data["files"], data["states"]),
        )  # fmt: skip
    except DAMAGE:
        raise damaged(folder) from None
    check_files(folder, {saved.server.name: saved.server.bytes, **saved.files})
    return saved


def _states(files: dict[str, Any], rows: dict[str, Any]) -> tuple[dict[str, File], dict[str, int]]:
    sizes = {inside(name): int(size) for name, size in files.items()}
    names, states = list(sizes), {}
    for key, (number, offset, size, crc) in rows.items():
        if not 0 <= number < len(names) or not 0 <= offset <= offset + size <= sizes[names[number]]:
            raise ValueError(f"{key} lies in no file")
        states[str(key)] = File(names[number], size, crc, offset)
    return states, sizes


def initial(place: Path) -> tuple[Path, Any]:
    """(file, None) of weights to start from, or (folder, state) of a run: its exported model, or its last checkpoint.

    Raises CheckpointError for a folder that holds neither.
    """
    exported = place / "model" / "model.safetensors"
    if place.is_dir() and not exported.is_file():
        return place, weights(place)
    return (exported if place.is_dir() else place), None


def weights(folder: Path) -> dict[str, Any]:
    """Parameters and buffers by name, as a run's last checkpoint has them, of `lilliput run` or `pretrain`.

    An auxiliary head is no part of the model.  Raises CheckpointError if there is none, or none of a whole model.
    """
    place = folder / "checkpoint"
    data = read_manifest(place, None, VERSION)
    if data is None:
        raise CheckpointError(f"{folder} holds no checkpoint; name a run's folder, or a file of weights")
    try:
        body = recorded(data["server" if "server" in data else "model"]).read(place)
        state = {**body["params"], **(body.get("buffers") or {})} if "server" in data else body
        return {name: x for name, x in state.items() if not name.startswith("auxiliary.")}
    except (*DAMAGE, OSError) as error:
        raise CheckpointError(f"{place} holds no model to start from ({error}); use best.safetensors") from None


# What any checkpoint of a folder, a manifest and files does, whatever they hold.


def supersede(folder: Path, manifest: dict[str, Any], files: Iterable[str]) -> None:
    """Make a manifest count, and remove what of the folder it does not name."""
    replace(folder / MANIFEST, sealed(manifest))
    current = {MANIFEST, *files}
    for path in folder.iterdir():
        if path.name not in current:
            path.unlink(missing_ok=True)


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest as JSON, with the checksum of all else in it as its last entry."""
    text = json.dumps(manifest)
    return f'{text[:-1]}, "checksum": {checksum(text.encode())}}}'.encode()


def read_manifest(folder: Path, format: str | None, version: int) -> dict[str, Any] | None:
    """What the manifest of a folder says, of one program or (None) of either; None if there is none.

    Raises CheckpointError if it is damaged, of another program, or of another version.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_bytes())
        if format is not None and data["format"] != format:
            raise CheckpointError(f"{path} is a checkpoint of {str(data['format'])[:40]!r}, not of {format!r}")
        if data["version"] != version:
            raise CheckpointError(
                f"{path} has version {str(data['version'])[:20]}; this release reads version {version}: "
                f"finish the run with the release that began it, or start anew in another folder"
            )
        if data.pop("checksum") != checksum(json.dumps(data).encode()):
            raise ValueError("its checksum is another")
    except DAMAGE:
        raise damaged(folder) from None
    return dict(data)


def damaged(folder: Path) -> CheckpointError:
    """The error of a manifest that does not say what it should."""
    return CheckpointError(f"{folder / MANIFEST} is damaged; restore it, or start anew in another folder")


def check_files(folder: Path, files: Mapping[str, int]) -> None:
    """Raise CheckpointError for a file that is not there, or of another size than these bytes."""
    for name, size in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise CheckpointError(f"cannot go on from {folder}: {name} is missing or has another size than recorded")


def recorded(value: dict[str, Any]) -> File:
    """A file as a manifest records it.  Raises ValueError for one outside of the folder."""
    return File(inside(value["name"]), int(value["bytes"]), int(value["crc"]))


def inside(name: Any) -> str:
    """The name of a file in a checkpoint's folder.  Raises ValueError for any other place."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"a checkpoint's file must lie in its folder, not at {name!r}")
    return name
