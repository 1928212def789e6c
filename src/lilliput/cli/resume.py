"""`lilliput resume`: continue an interrupted run exactly where it stopped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

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
    from lilliput.cli import folder as folders
    from lilliput.cli.execute import describe, go_on
    from lilliput.config import words

    flags = [word for word in argv if word.startswith("-")]
    if flags and flags != ["--plain"]:
        raise ValueError(f"there is no flag {flags[0]!r}; `lilliput resume --help` tells what there is")
    changes = words(word for word in argv if "=" in word)
    places = [Path(word) for word in argv if "=" not in word and word not in flags]
    for place in places:
        inside = [place] if (place / folders.CONFIG).exists() else list(folders.runs(place))
        if not inside:
            folders.read_config(place)  # says what is wrong with it
        waiting = [run for run in inside if changes or not folders.facts_of(run).get("finished")]
        if not waiting:
            print(f"{place}: finished already", file=sys.stderr)
        for run in waiting:
            if folders.layer_of(run).get("program") == "pretrain":
                from lilliput.cli import pretrain

                pretrain.go_on(run, changes, plain=bool(flags))
                continue
            print(describe(go_on(run, changes, plain=bool(flags))))
    return 0
