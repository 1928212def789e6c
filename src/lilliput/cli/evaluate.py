"""`lilliput evaluate`: score what a run trained, or weights from a file, on a test set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput.cli import folder as folders
from lilliput.cli.arguments import Line, folders_and_settings
from lilliput.config import changed, settings
from lilliput.config.build import Built, build, device
from lilliput.config.checks import check
from lilliput.config.values import convert, describe
from lilliput.core.fleet import Model
from lilliput.data import Dataset
from lilliput.experiment.evaluation import at_server
from lilliput.experiment.experiment import Experiment
from lilliput.report.text import number
from lilliput.wire.image import WireError, decode

# What `--generate` takes: the type of each flag.
SEARCH: dict[str, type] = {
    "beams": int, "new_tokens": int, "length_penalty": float, "no_repeat": int, "batch_size": int, "first": int,
    "out": str,
}  # fmt: skip
_LINE = Line("--best", "--generate", **{name: describe(kind) for name, kind in SEARCH.items()} | {"out": "a file"})


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    flags, typed = _LINE.parse(argv)
    places, changes = folders_and_settings(typed)
    search = {
        name: convert(flags[name], kind, f"--{name.replace('_', '-')}")
        for name, kind in SEARCH.items()
        if flags[name] is not None
    }
    if len(places) > 1 or (search and not flags["generate"]):
        raise ValueError(
            "evaluate takes one folder, --best, --generate and settings; `lilliput evaluate --help` tells more"
        )
    found = of_run(places[0], changes, flags["best"]) if places else of_weights(changes)
    metrics = written(found, search) if flags["generate"] else found.metrics()
    for name, value in metrics.items():
        print(f"{name} {number(name, value)}")
    return 0


@dataclass(frozen=True)
class Trained:
    """Models, and the experiment and data that they are scored on."""

    experiment: Experiment
    models: Mapping[Any, Model]
    dataset: Dataset
    device: str = "cpu"

    def metrics(self) -> dict[str, float]:
        """What the experiment's metrics say of the models on its test set."""
        return at_server(self.experiment.task, self.models, self.experiment.test, self.device)


def written(found: Trained, search: dict[str, Any]) -> dict[str, float]:
    """Scores of what the first model answers to the prompts of the test set."""
    from lilliput.tasks.generation import answers
    from lilliput.tasks.scores import scores

    out, model = search.pop("out", None), next(iter(found.models.values()))
    texts, references = answers(found.experiment.task, model.params, found.dataset, device=found.device, **search)
    if out is not None:
        lines = [{"text": text, "references": said} for text, said in zip(texts, references, strict=True)]
        Path(out).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return scores(texts, references)


def of_weights(changes: Mapping[str, Any]) -> Trained:
    """A model by name with weights from a file."""
    s = settings(changes)
    if s["init"] is None:
        raise ValueError("evaluate needs a run's folder, or weights with init=FILE")
    check(s)
    built = build(s)
    start = built.experiment.task.init()
    models = {"global": Model(start["params"], buffers=start["buffers"])}
    return Trained(built.experiment, models, built.dataset, device(s).partition(",")[0])


def of_run(folder: Path, changes: Mapping[str, Any], best: bool) -> Trained:
    """What a run trained, with its test set or the one that `changes` name."""
    s = folders.read_config(folder)
    other = changed(s, changes)
    check(other)
    built = build(s)
    models = best_models(folder) if best else last_models(folder, built)
    target = build(other) if changes else built
    return Trained(target.experiment, models, target.dataset, device(other).partition(",")[0])


def last_models(folder: Path, built: Built) -> dict[Any, Model]:
    """The models of a run's last checkpoint: those of a run that has no round left."""
    experiment = built.experiment
    experiment.folder = folder
    with folders.held(folder):
        return experiment.trained(built.engine)


def best_models(folder: Path) -> dict[Any, Model]:
    """The models of a run's best round."""
    file = folder / "best.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} has no best model: none of its rounds was evaluated")
    try:
        models: Any = decode(file.read_bytes())["models"]
        return {_name(name): Model(m["params"], buffers=m["buffers"] or None) for name, m in models.items()}
    except (WireError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); evaluate the last checkpoint, without --best") from None


def _name(name: str) -> int | str:
    return int(name) if name.isdigit() else name
