"""A run's settings: complete and canonical, as `config.yaml` holds them.

Shared settings stand at the top, the fields of the chosen names in their nodes, names as we write them.  Read again,
settings give themselves; two runs with equal settings have equal fingerprints.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput.config.axes import AXES, Choice
from lilliput.config.shared import NEUTRAL


@dataclass(frozen=True)
class Settings:
    """Everything a run is made from.  `notes` are remarks by key on settings that do nothing here."""

    top: Mapping[str, Any]
    nodes: Mapping[str, Mapping[str, Any]]
    choices: Mapping[str, Choice]
    notes: Mapping[str, str]
    typed: tuple[tuple[str, Any], ...] = ()
    sweep: bool = False

    def __getitem__(self, key: str) -> Any:
        return self.top[key]

    def node(self, axis: str) -> dict[str, Any]:
        """The fields of the name chosen for an axis."""
        choice = self.choices.get(axis)
        if choice is None:
            return {}
        known = AXES[axis].fields(choice.target)
        return {name: value for name, value in self.nodes.get(choice.name, {}).items() if name in known}

    def as_dict(self) -> dict[str, Any]:
        """The settings as `config.yaml` holds them."""
        return {**self.top, **{name: dict(node) for name, node in self.nodes.items() if node}}

    def fingerprint(self) -> str:
        """The same for two runs exactly if they are of the same experiment, down to a user's own source files."""
        kept = {key: value for key, value in self.as_dict().items() if key not in NEUTRAL}
        text = json.dumps([kept, self.sources()], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def sources(self) -> dict[str, str]:
        """Digests of the files in which a user's own choices are defined, by axis."""
        own = {axis: choice for axis, choice in self.choices.items() if self.top.get(axis) != choice.name}
        return {axis: digest for axis, choice in own.items() if (digest := _source_digest(choice.target))}


def _source_digest(target: Any) -> str | None:
    try:
        file = inspect.getsourcefile(target)
        return hashlib.blake2b(Path(str(file)).read_bytes(), digest_size=12).hexdigest()
    except (OSError, TypeError):
        return None
