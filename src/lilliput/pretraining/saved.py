"""Checkpoints of pre-training: weights, optimizer, and where each process stands in the text.

As of a federated run, a checkpoint is a folder whose manifest names its files with sizes and checksums; replacing the
manifest is the one step that makes them count.  All other randomness is keyed by the step.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lilliput.core.tree import Body
from lilliput.data.sequences import Position
from lilliput.experiment.checkpoint import (
    DAMAGE,
    CheckpointError,
    check_files,
    damaged,
    read_manifest,
    recorded,
    supersede,
)
from lilliput.experiment.identity import differences, told
from lilliput.wire.store import File, write

FORMAT, VERSION = "lilliput-pretraining", 2


@dataclass(frozen=True)
class Progress:
    """What a run has done.

    step: optimizer steps done
    tokens: labels that counted so far, over all processes
    loss, labels, examples, seconds: sums since the last line of metrics.jsonl
    lr: of the next step, as the run's own schedule has it; 0 if it is not known
    """

    step: int = 0
    tokens: int = 0
    loss: float = 0.0
    labels: int = 0
    examples: int = 0
    seconds: float = 0.0
    lr: float = 0.0


@dataclass(frozen=True)
class Saved:
    """A checkpoint: the text and model it belongs to, and the files of weights and optimizer."""

    folder: Path
    identity: dict[str, Any]
    progress: Progress
    positions: list[Position]  # of every process, by rank
    model: File
    optimizer: File

    def read(self, file: File) -> Body:
        """One of the files; raises CheckpointError that names it if it is damaged."""
        try:
            return file.read(self.folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot go on from {self.folder}: {error}") from None

    def check(self, identity: dict[str, Any]) -> None:
        """Raise CheckpointError if it is of another model or text."""
        found = list(differences(self.identity, identity))
        if found:
            raise CheckpointError(
                f"{self.folder} belongs to another run: {told(found)}; "
                f"go on with it as it was, or start from its weights alone with init="
            )

    def position(self, rank: int, world: int, packing: bool) -> Position:
        """Where a process goes on.  Raises CheckpointError if packed text was dealt to another number of processes."""
        if world == len(self.positions):
            return self.positions[rank]
        if packing:
            raise CheckpointError(
                f"{self.folder} was made by {len(self.positions)} processes, each with packed text of its own; "
                f"go on with as many, not {world}"
            )
        return max(self.positions, key=lambda p: p.kept)  # what the last of them has passed, all have


def save(
    folder: Path, identity: dict[str, Any], progress: Progress, positions: list[Position], model: Body, optimizer: Body
) -> None:
    """Write a checkpoint and remove the one before."""
    files = {
        "model": write(folder, f"step-{progress.step}-model.safetensors", model),
        "optimizer": write(folder, f"step-{progress.step}-optimizer.safetensors", optimizer),
    }
    manifest = {
        "format": FORMAT, "version": VERSION, "identity": identity, "progress": asdict(progress),
        "positions": [asdict(p) for p in positions], **{name: asdict(file) for name, file in files.items()},
    }  # fmt: skip
    supersede(folder, manifest, [file.name for file in files.values()])


def load(folder: Path) -> Saved | None:
    """The checkpoint in a folder, or None.  Raises CheckpointError for one that is damaged or of another program."""
    data = read_manifest(folder, FORMAT, VERSION)
    if data is None:
        return None
    try:
        positions = [Position(**{**p, "waiting": tuple(p["waiting"])}) for p in data["positions"]]
        saved = Saved(
            folder, dict(data["identity"]), Progress(**data["progress"]), positions,
            *(recorded(data[name]) for name in _FILES),
        )  # fmt: skip
    except DAMAGE:
        raise damaged(folder) from None
    check_files(folder, {file.name: file.bytes for file in (saved.model, saved.optimizer)})
    return saved


_FILES = ("model", "optimizer")
