"""What `--help` says of commands, and `lilliput run --help NAME` of settings and of names; torch need not be there."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lilliput.cli import usage
from lilliput.cli.facts import facts
from lilliput.core.registry import is_path, spelled


def help_on(command: str, words: Sequence[str]) -> str | None:
    """The help that these words of a command ask for, if any; some commands have nothing to do without words."""
    asked = next((i for i, word in enumerate(words) if word in ("-h", "--help")), None)
    if asked is None and (words or command not in ("resume", "evaluate", "new")):
        return None
    if command == "run":
        return run_help(words[asked + 1] if asked is not None and asked + 1 < len(words) else "")
    if command == "list":
        return usage.LIST.format(kinds=", ".join(kinds(facts())))
    if command == "memory":
        return usage.MEMORY.format(settings="\n".join(setting_lines(facts()["memory"])))
    return {"resume": usage.RESUME, "evaluate": usage.EVALUATE, "new": usage.NEW, "doctor": usage.DOCTOR}.get(command)


def kinds(known: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What `lilliput list` lists: for each kind, its names with a line on each."""
    names = {
        axis["plural"].replace(" ", ""): {name: told["line"] for name, told in axis["names"].items()}
        for axis in known["axes"].values()
    }
    return {**names, "recipes": known["recipes"]}


def run_help(name: str) -> str:
    """The help of `run`, or of one name or setting.  Raises ValueError for what has none."""
    if is_path(name):
        from lilliput.config.facts import of_path

        return _name(*of_path(name))
    known = facts()
    if not name:
        return usage.RUN.format(settings="\n".join(_grouped(known["settings"])))
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
