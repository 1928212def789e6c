"""What `lilliput run --help` says of settings and of names."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lilliput.cli.facts import facts
from lilliput.core.registry import is_path, spelled

RUN = """usage: lilliput run [-m] [--config FILE] [--dry] [--count published] [--check] [--cfg] [--plain]
                    [key=value ...]

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
    if is_path(name):
        from lilliput.config.facts import of_path

        return _name(*of_path(name))
    known = facts()
    if not name:
        return RUN.format(settings="\n".join(_grouped(known["settings"])))
    axes = known["axes"]
    named = [(key, own, axis["names"][own]) for key, axis in axes.items() if (own := spelled(name, axis["names"]))]
    if named:
        return "\n\n".join(_name(*one) for one in named)
    if key := spelled(name, axes):
        return _axis(key, axes[key])
    if key := spelled(name, known["nodes"]):
        return "\n".join(
            [f"{key}: {known['nodes'][key]['line']}", *setting_lines(known["nodes"][key]["settings"], f"{key}.")]
        )
    if key := spelled(name, known["settings"]):
        return "\n".join(setting_lines({key: known["settings"][key]}))
    from lilliput.config.reader import near

    names = [own for axis in axes.values() for own in axis["names"]]
    raise ValueError(f"there is no help on {name!r}{near(name, [*names, *known['settings']])}")


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


def _grouped(settings: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for title, keys in GROUPS.items():
        yield f"\n{title}"
        yield from setting_lines({key: settings[key] for key in keys})


def _name(axis: str, name: str, told: Mapping[str, Any]) -> str:
    lines = [f"{axis}={name}: {told['line']}", *setting_lines(told["settings"], f"{name}.")]
    if not told["settings"]:
        lines.append("  has no settings of its own")
    if axis == "algorithm":
        lines.append(f"  and how clients train, for this method alone: {name}.lr=..., as in `lilliput run --help`")
    return "\n".join(lines)


def _axis(key: str, axis: Mapping[str, Any]) -> str:
    names = section(f"{key}: {axis['doc']}", {name: told["line"] for name, told in axis["names"].items()})
    return f"{names}\n  or your own: {key}=mine.py:Name, {key}=package.module:Name"


def section(title: str, lines: Mapping[str, str]) -> str:
    """Names as text, each with its line."""
    width = max((len(name) for name in lines), default=0)
    return "\n".join([title, *(f"  {name:{width}}  {line}".rstrip() for name, line in lines.items())])


def setting_lines(settings: Mapping[str, Sequence[str]], prefix: str = "") -> list[str]:
    """`name=default  what it means (type)` for each setting, wrapped to the terminal."""
    heads = {name: f"  {prefix}{name}={default}" for name, (default, _) in settings.items()}
    indent = min(30, max(map(len, heads.values()), default=0) + 2)
    width = max(60, min(120, shutil.get_terminal_size((110, 24)).columns))
    lines = []
    for name, head in heads.items():
        wrapped = textwrap.wrap(settings[name][1], width - indent) or [""]
        first = f"{head:{indent}}{wrapped[0]}" if len(head) < indent else f"{head}\n{'':{indent}}{wrapped[0]}"
        lines += [first, *(f"{'':{indent}}{line}" for line in wrapped[1:])]
    return lines
