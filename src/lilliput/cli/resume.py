"""`lilliput resume`: continue an interrupted run exactly where it stopped."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lilliput.cli.arguments import Line, folders_and_settings

HELP = """usage: lilliput resume FOLDER [FOLDER ...] [key=value ...] [--plain]

Continues the run in a folder from its last checkpoint; it ends with the same bits as a run that was not interrupted.
A folder above several runs stands for those of them that are not finished.  Settings change how it goes on: where it
runs (engine=workers), how long (rounds=100), when it stops (target=0.9).

  lilliput resume runs/fedavg/mlp/digits-iid/2026-01-31_12-00-00
  lilliput resume runs/                    every interrupted run
  lilliput resume runs/my-run rounds=100   a finished run, longer"""


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP)
        return 0
    from lilliput.cli.execute import describe, go_on, going_on

    flags, typed = Line("--plain").parse(argv)
    places, changes = folders_and_settings(typed)
    waiting = [run for place in places for run in _waiting(place, changes)]
    for run in waiting:  # what any of them refuses is told before the first goes on
        if not _pretrained(run):
            going_on(run, changes)
    for run in waiting:
        if _pretrained(run):
            from lilliput.cli import pretrain

            pretrain.go_on(run, changes, plain=flags["plain"])
        else:
            print(describe(go_on(run, changes, plain=flags["plain"])))
    return 0


def _waiting(place: Path, changes: Mapping[str, Any]) -> list[Path]:
    """The run at a place, or those below it that are not finished; none, and a word why, if nothing is left to do."""
    from lilliput.cli import folder as folders

    if not (place / folders.CONFIG).exists():
        inside = list(folders.runs(place))
        if not inside:
            folders.read_config(place)  # says what is wrong with it
        found = [run for run in inside if not folders.facts_of(run).get("finished") and not _longer(run, changes)]
    else:
        found = [place] if not folders.facts_of(place).get("finished") or _more(place, changes) else []
    if not found:
        print(f"{place}: finished already", file=sys.stderr)
    return found


def _longer(run: Path, changes: Mapping[str, Any]) -> bool:
    """Whether a run below a folder is planned for longer than all of them are asked to go on for."""
    from lilliput.cli import folder as folders

    planned = folders.layer_of(run)
    longer = any(key in changes and (planned.get(key) or 0) > changes[key] for key in ("rounds", "steps"))
    if longer:
        print(f"{run}: planned for longer than that, left as it is", file=sys.stderr)
    return longer


def _more(run: Path, changes: Mapping[str, Any]) -> bool:
    """Whether changes give a finished run more to do: more rounds, or another rule where a rule had stopped it."""
    from lilliput.cli import folder as folders

    if _pretrained(run) or not changes:
        return bool(changes)
    planned = folders.layer_of(run)["rounds"]
    from lilliput.cli.execute import going_on

    return going_on(run, changes)["rounds"] != planned or bool(folders.facts_of(run).get("stopped"))


def _pretrained(run: Path) -> bool:
    from lilliput.cli import folder as folders

    return folders.layer_of(run).get("program") == "pretrain"
