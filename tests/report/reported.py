"""Runs made of rows that a test writes out, as folders on disk."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lilliput.experiment.stop import Stop

Row = dict[str, Any]


def rows(
    accuracies: list[float | None], up: int = 2_000_000, down: int = 3_000_000, seconds: float = 10.0, **more: Any
) -> list[Row]:
    """A round for each accuracy (None: not evaluated), each sending and lasting the same."""
    cost = {"up_bytes": up, "down_bytes": down, "simulated_seconds": seconds, **more}
    return [
        {"round": number, **({} if accuracy is None else {"accuracy": accuracy}), **cost}
        for number, accuracy in enumerate(accuracies, 1)
    ]


def write(folder: Path, rows: list[Row], config: Row | None = None, data: str | None = "d") -> Path:
    """A run's folder with these rows, this configuration and this fingerprint of its data."""
    import yaml

    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if data is not None:
        (folder / "environment.json").write_text(json.dumps({"data": data, "partition": folder.name}))
    return folder


class Fedavg:
    """A method by name alone: reporters look at nothing else of it."""


def experiment(rounds: int = 4, clients: int = 10, target: str | None = None) -> Any:
    """What a reporter sees of an experiment."""
    return SimpleNamespace(algorithm=Fedavg(), rounds=rounds, data=dict.fromkeys(range(clients)), stop=Stop(target))
