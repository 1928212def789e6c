"""`lilliput resume`: continue an interrupted run exactly where it stopped."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lilliput.cli import folder as folders
from lilliput.cli.arguments import Line, folders_and_settings
from lilliput.cli.execute import describe, go_on, going_on


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    flags, typed = Line("--plain").parse(argv)
    places, changes = folders_and_settings(typed)
    waiting = [run for place in places for run in _waiting(place, changes)]
    for run in waiting:  # what any of them refuses is told before the first goes on
        if not _pretrained(run):
            going_on(run, changes)
    for run in waiting:
        if _pretrained(run):
            from lilliput.cli import pretrain  # which needs more than other runs do

            pretrain.go_on(run, changes, plain=flags["plain"])
        else:
            print(describe(go_on(run, changes, plain=flags["plain"])))
    return 0


def _waiting(place: Path, changes: Mapping[str, Any]) -> list[Path]:
    """The run at a place, or those below it that are not finished; none, and a word why, if nothing is left to do."""
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
    planned = folders.layer_of(run)
    longer = any(key in changes and (planned.get(key) or 0) > changes[key] for key in ("rounds", "steps"))
    if longer:
        print(f"{run}: planned for longer than that, left as it is", file=sys.stderr)
    return longer


def _more(run: Path, changes: Mapping[str, Any]) -> bool:
    """Whether changes give a finished run more to do: more rounds, or another rule where a rule had stopped it."""
    if _pretrained(run) or not changes:
        return bool(changes)
    planned = folders.layer_of(run)["rounds"]
    return going_on(run, changes)["rounds"] != planned or bool(folders.facts_of(run).get("stopped"))


def _pretrained(run: Path) -> bool:
    return folders.layer_of(run).get("program") == "pretrain"
