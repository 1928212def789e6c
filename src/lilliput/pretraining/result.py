"""What a pre-training run gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Result:
    """What came of a run: the rows of metrics.jsonl, the model (in shards under FSDP), and its folder if it has one."""

    rows: list[dict[str, Any]]
    model: nn.Module
    folder: Path | None = None

    @property
    def perplexity(self) -> float:
        """On the validation text, at the end."""
        return float(self.rows[-1]["perplexity"])
