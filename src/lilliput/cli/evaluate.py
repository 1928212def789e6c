"""`lilliput evaluate`: score what a run trained, or weights from a file, on a test set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.cli.arguments import Line, folders_and_settings

if TYPE_CHECKING:
    from lilliput.config.build import Built
    from lilliput.core.fleet import Model
    from lilliput.data import Dataset
    from lilliput.experiment.experiment import Experiment

HELP = """usage: lilliput evaluate [FOLDER] [--best] [--generate [--beams=4 ...]] [key=value ...]

Scores the model of a run's last checkpoint (or of its best round, --best) on the run's test set, or on another one.
Without a folder: a model by name with weights from a file.

  lilliput evaluate runs/my-run
  lilliput evaluate runs/my-run --best dataset=cifar10 cifar10.folder=data/cifar10
  lilliput evaluate model=resnet20 dataset=cifar10 cifar10.folder=data/cifar10 init=resnet20-12fca82f.th

--generate lets a language model answer each prompt of the test set, and scores the texts: BLEU, NIST, METEOR, ROUGE-L.
  --beams=1             beams of the search; 1 is greedy
  --new-tokens=64       tokens of an answer at most
  --length-penalty=1.0  above 0 favours longer texts, with more than one beam
  --no-repeat=0         n-grams of this length occur once in a text
  --batch-size=16       prompts at a time
  --first=N             only the first N prompts
  --out=FILE            write the texts beside their references, as lines of JSON"""

# What `--generate` takes: the type of each flag.
SEARCH: dict[str, type] = {
    "beams": int, "new_tokens": int, "length_penalty": float, "no_repeat": int, "batch_size": int, "first": int,
    "out": str,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP)
        return 0
    from lilliput.config.values import convert, describe

    kinds = {name: "a file" if name == "out" else describe(kind) for name, kind in SEARCH.items()}
    flags, typed = Line("--best", "--generate", **kinds).parse(argv)
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
    from lilliput.report.text import number

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
        from lilliput.experiment.evaluation import at_server

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
    from lilliput.config import settings
    from lilliput.config.build import build, device
    from lilliput.config.checks import check
    from lilliput.core.fleet import Model

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
    from lilliput.cli import folder as folders
    from lilliput.config import changed
    from lilliput.config.build import build, device
    from lilliput.config.checks import check

    s = folders.read_config(folder)
    other = changed(s, changes)
    check(other)
    built = build(s)
    models = best_models(folder) if best else last_models(folder, built)
    target = build(other) if changes else built
    return Trained(target.experiment, models, target.dataset, device(other).partition(",")[0])


def last_models(folder: Path, built: Built) -> dict[Any, Model]:
    """The models of a run's last checkpoint: those of a run that has no round left."""
    from lilliput.cli import folder as folders

    experiment = built.experiment
    experiment.folder = folder
    with folders.held(folder):
        return experiment.trained(built.engine)


def best_models(folder: Path) -> dict[Any, Model]:
    """The models of a run's best round."""
    from lilliput.core.fleet import Model
    from lilliput.wire.image import WireError, decode

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
