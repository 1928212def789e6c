"""`lilliput evaluate`: score what a run trained, or weights from a file, on a test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lilliput.config.build import Built
    from lilliput.fleet import Model

HELP = """usage: lilliput evaluate [FOLDER] [--best] [key=value ...]

Scores the model of a run's last checkpoint (or of its best round, --best) on the run's test set, or on another one.
Without a folder: a model by name with weights from a file.

  lilliput evaluate runs/my-run
  lilliput evaluate runs/my-run --best dataset=cifar10 cifar10.folder=data/cifar10
  lilliput evaluate model=resnet20 dataset=cifar10 cifar10.folder=data/cifar10 init=resnet20-12fca82f.th"""


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP)
        return 0
    from lilliput.config import words

    places = [Path(word) for word in argv if "=" not in word and not word.startswith("-")]
    flags = {word for word in argv if word.startswith("-")}
    if len(places) > 1 or flags - {"--best"}:
        raise ValueError("evaluate takes one folder, --best and settings; `lilliput evaluate --help` tells more")
    changes = words(word for word in argv if "=" in word)
    metrics = of_run(places[0], changes, bool(flags)) if places else of_weights(changes)
    from lilliput.report.text import number

    for name, value in metrics.items():
        print(f"{name} {number(name, value)}")
    return 0


def of_weights(changes: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a model by name with weights from a file."""
    from lilliput.config import settings
    from lilliput.config.build import build, device
    from lilliput.config.checks import check

    s = settings(changes)
    if s["init"] is None:
        raise ValueError("evaluate needs a run's folder, or weights with init=FILE")
    check(s)
    experiment = build(s).experiment
    start = experiment.task.init()
    return experiment.task.evaluate(start["params"], start["buffers"], experiment.test, device(s).partition(",")[0])


def of_run(folder: Path, changes: Mapping[str, Any], best: bool) -> dict[str, float]:
    """Metrics of what a run trained, on its test set or the one that `changes` name."""
    from lilliput.cli import folder as folders
    from lilliput.config import changed
    from lilliput.config.build import build
    from lilliput.config.checks import check
    from lilliput.evaluation import at_server

    s = folders.read_config(folder)
    other = changed(s, changes)
    check(other)
    built = build(s)
    models = best_models(folder) if best else last_models(folder, built)
    experiment = build(other).experiment if changes else built.experiment
    return at_server(experiment.task, models, experiment.test)


def last_models(folder: Path, built: Built) -> dict[Any, Model]:
    """The models of a run's last checkpoint: those of a run that has no round left."""
    from lilliput import checkpoint
    from lilliput.cli import folder as folders

    saved = checkpoint.load(folder / "checkpoint")
    if saved is None:
        raise ValueError(f"{folder} has no checkpoint yet; `lilliput resume {folder}` runs it")
    experiment = built.experiment
    experiment.folder, experiment.rounds = folder, saved.round
    with folders.held(folder):
        return experiment.run(built.engine, resume=True).models


def best_models(folder: Path) -> dict[Any, Model]:
    """The models of a run's best round."""
    from lilliput.fleet import Model
    from lilliput.wire import WireError, decode

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
