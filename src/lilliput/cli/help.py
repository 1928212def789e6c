"""What `lilliput run --help` says: the settings with their types, defaults and meanings, read off the dataclasses."""

from __future__ import annotations

import shutil
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from lilliput.cli.run_words import USAGE
from lilliput.config.axes import AXES, LOOSE, PROFILE, Axis
from lilliput.config.fields import REQUIRED, Field, docs, fields_of, summary
from lilliput.config.reader import near
from lilliput.config.shared import Shared, top, training
from lilliput.config.values import describe, show
from lilliput.core.registry import is_path, normal

RUN = """usage: {usage}

Trains one model on clients that keep their data.  Settings are written key=value or --key value; each has a default,
so that `lilliput run` alone works.  What a single method, model, data set, ... has of its own stands under its name,
and `partition.alpha` is `alpha` of the partition chosen; `lilliput run --help NAME` shows what a name has.

  lilliput run algorithm=fedprox fedprox.mu=0.1 partition=dirichlet partition.alpha=0.3
  lilliput run dataset=cifar10 cifar10.folder=data/cifar10 model=resnet20 resnet20.norm=group clients=100 cohort=10
  lilliput run -m algorithm=fedavg,fedprox fedprox.mu=0.01,0.1 seed=0,1,2
  lilliput run -m seed=0,1,2,3 hydra/launcher=joblib hydra.launcher.n_jobs=2
  lilliput run algorithm=mine.py:MyMethod my_method.mu=0.5

flags
  -m             a sweep: every combination of comma-separated values; typed again, only what is missing
  --config FILE  settings from a YAML file, below those that are typed; a run's config.yaml repeats it
  --dry          tell bytes by kind, memory and FLOPs of every client beforehand, and train nothing (engine=dry too)
  --count published   with --dry: bytes as the methods' papers count them, without labels
  --check        of a recipe: compare with what was published (reproduced, same ordering, not reproduced, not run)
  --cfg          print the settings and stop
  --plain        a line per round instead of the live table

{settings}

Names of methods, models, data sets, ...: `lilliput list`.  Case, - and _ in names do not matter.  The keys of the
published programs work too: num_clients, comm_round, client_sample_ratio, partition_alpha, dataset.distribution, ..."""


def run_help(name: str) -> str:
    """The help of `run`, or of one name or setting.  Raises ValueError for what has none."""
    if not name:
        return RUN.format(usage=USAGE, settings="\n".join(_shared()))
    if is_path(name):
        return _node(*_typed(name))
    found = [(choice.name, axis, choice.target) for axis in AXES.values() for choice in axis.nodes()]
    if any(normal(own) == normal(name) for own, _, _ in found):
        return "\n\n".join(_node(*node) for node in found if normal(node[0]) == normal(name))
    if normal(name) in map(normal, AXES):
        return _axis(next(axis for key, axis in AXES.items() if normal(key) == normal(name)))
    for node, target in LOOSE.items():
        if normal(name) == normal(node):
            lines = setting_lines(list(fields_of(target).values()), docs(target), f"{node}.")
            return "\n".join([f"{node}: {summary(target)}", *lines])
    if normal(name) in map(normal, top()):
        f = next(f for key, f in top().items() if normal(key) == normal(name))
        return "\n".join(setting_lines([f], _top_docs(), ""))
    raise ValueError(f"there is no help on {name!r}{near(name, [*(own for own, _, _ in found), *top()])}")


def _typed(path: str) -> tuple[str, Axis, Any]:
    """A user's own `file.py:Name`, on the axis that it looks made for."""
    choice = AXES["algorithm"].choose(path)
    if hasattr(choice.target, "round"):
        return choice.name, AXES["algorithm"], choice.target
    is_model = isinstance(choice.target, type) and hasattr(choice.target, "forward")
    return choice.name, AXES["model" if is_model else "dataset"], choice.target


# The settings in the order in which one meets them.
GROUPS: dict[str, tuple[str, ...]] = {
    "what runs": (
        "algorithm", "model", "dataset", "partition", "cut", "slice", "combine", "codec", "loss", "recipe", "scale",
        "case",
    ),
    "rounds": ("clients", "cohort", "rounds", "seed", "quorum", "timeout", "device_profile", "profiles"),
    "training on a client": (
        "local_epochs", "local_steps", "batch_size", "augment", "lr", "schedule", "warmup", "optimizer",
        "optimizer_options", "momentum", "nesterov", "weight_decay", "clip", "accumulate", "precision", "checkpointing",
        "per_layer", "optimizer_state", "buffers", "init", "lora",
    ),
    "evaluation and stopping": (
        "evaluate", "evaluate_every", "test_fraction", "target", "patience", "comm_threshold_mb", "seconds",
    ),
    "where it runs, and what it leaves": (
        "engine", "device", "name", "folder", "checkpoint_every", "profile", "plots", "tensorboard", "wandb",
    ),
}  # fmt: skip

WORDS = {
    "cohort": "clients per round: a number, or a share of them below 1; all of them for null",
    "momentum": "of SGD",
    "nesterov": "Nesterov's momentum",
    "weight_decay": "pull of the optimizer towards zero",
    "optimizer": "sgd, adam, adamw, or your own: torch.optim:RMSprop, mine.py:Mine",
    "optimizer_options": "further arguments of the optimizer: optimizer_options.eps=1e-6",
    "local_steps": "steps per round, instead of epochs",
    "cut": "of split methods: the module that the server begins with, or cut.memory=200MB, ...; as published or half",
    "lora": "train low-rank adapters beside frozen weights: lora.rank=4 lora.alpha=32 lora.targets=[c_attn]",
    "device_profile": "memory, link and speed of every device: device_profile.memory_bytes=4e6",
}


def _shared() -> Iterable[str]:
    fields = {**top(), **{name: Field(name, Any, {} if name == PROFILE else None) for name in LOOSE}}
    for title, keys in GROUPS.items():
        yield f"\n{title}"
        yield from setting_lines([fields[key] for key in keys], _top_docs(), "")


def _top_docs() -> Mapping[str, str]:
    from lilliput.algorithms import FedAvg

    return {**docs(FedAvg), **docs(Shared), **WORDS}


def _node(name: str, axis: Axis, target: Any) -> str:
    fields = axis.fields(target)
    own = [f for f in fields.values() if axis.key != "algorithm" or f.name not in training()]
    lines = [f"{axis.key}={name}: {summary(target)}", *setting_lines(own, docs(target), f"{name}.")]
    if not own:
        lines.append("  has no settings of its own")
    if axis.key == "algorithm":
        lines.append(f"  and how clients train, for this method alone: {name}.lr=..., as in `lilliput run --help`")
    return "\n".join(lines)


def _axis(axis: Axis) -> str:
    from lilliput.cli.listing import section

    names = {choice.name: summary(choice.target) for choice in axis.nodes()}
    own = f"  or your own: {axis.key}=mine.py:Name, {axis.key}=package.module:Name"
    return f"{section(f'{axis.key}: {axis.doc}', names)}\n{own}"


def setting_lines(fields: Sequence[Field], words: Mapping[str, str], prefix: str) -> list[str]:
    """`name=default  what it means (type)` for each field, wrapped to the terminal."""
    heads = {f.name: f"  {prefix}{f.name}={_default(f)}" for f in fields}
    by_name = {f.name: f for f in fields}
    indent = min(30, max((len(head) for head in heads.values()), default=0) + 2)
    width = max(60, min(120, shutil.get_terminal_size((110, 24)).columns))
    lines = []
    for name, head in heads.items():
        text = " ".join(filter(None, (words.get(name, "").rstrip("."), _kind(by_name[name].hint))))
        wrapped = textwrap.wrap(text, width - indent) or [""]
        first = f"{head:{indent}}{wrapped[0]}" if len(head) < indent else f"{head}\n{'':{indent}}{wrapped[0]}"
        lines += [first, *(f"{'':{indent}}{line}" for line in wrapped[1:])]
    return lines


def _kind(hint: Any) -> str:
    """The type in brackets, where it tells more than the default does."""
    options = [o for o in (typing.get_args(hint) or (hint,)) if o is not type(None)]
    choices = typing.get_origin(hint) is Literal or any(typing.get_origin(o) is Literal for o in options)
    return f"({describe(hint)})" if choices or set(options) & {int, float} else ""


def _default(f: Field) -> str:
    if f.default is REQUIRED:
        return "..."
    return show(list(f.default) if isinstance(f.default, tuple) else f.default)
