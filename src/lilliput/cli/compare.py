"""`lilliput compare`: tables and figures of finished runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

EXAMPLES = """examples:
  lilliput compare runs/                                 all runs, grouped by everything but the seed
  lilliput compare runs/ --by algorithm --target 0.9     what each method sent and took to reach 90 %
  lilliput compare runs/ --latex                         the table for a paper
  lilliput compare runs/ --figures figures/              accuracy against rounds, MB, simulated seconds and memory
  lilliput compare runs/ --figure figures.yaml           figures and tables as a file describes them"""


def parser() -> argparse.ArgumentParser:
    """What the command understands."""
    made = argparse.ArgumentParser(
        "lilliput compare", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compare runs on the same data: mean and spread over seeds of what each reached and what it cost.",
    )  # fmt: skip
    made.add_argument("folders", nargs="*", metavar="FOLDER", help="a run's folder, or one above several")
    made.add_argument("--by", metavar="KEY,KEY", help="group by these settings instead of all but the seed")
    made.add_argument("--metric", help="what to compare; accuracy where every run has it")
    made.add_argument("--target", help="a value to reach: 0.9, or loss<=0.5; shows rounds, MB and seconds until then")
    made.add_argument("--latex", action="store_true", help="print the table as LaTeX")
    made.add_argument("--csv", metavar="FILE", nargs="?", const="-", help="write every number as CSV, or print it")
    made.add_argument("--figures", metavar="FOLDER", help="draw figures there, as PDF and PNG")
    made.add_argument("--figure", metavar="FILE", help="draw those that a YAML file describes instead, and no table")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    args = parsed(parser(), argv)
    if args is None:
        return 0
    if args.figure:
        return _described(args)
    if not args.folders:
        raise ValueError("name a FOLDER with runs to compare; `lilliput compare --help` tells more")
    from lilliput.report import compare

    found = compare(args.folders, args.by.split(",") if args.by else None, args.target, args.metric)
    if args.csv not in (None, "-") and not Path(args.csv).absolute().parent.is_dir():
        raise ValueError(f"--csv {args.csv}: there is no folder {Path(args.csv).parent}; make it first")
    drawn = found.figures(args.figures) if args.figures else ()  # first: what it refuses must leave no other file
    if args.latex:
        print(found.latex())
    if args.csv == "-":
        print(found.csv(), end="")
    elif args.csv:
        Path(args.csv).write_text(found.csv(), encoding="utf-8")
    if not args.latex and args.csv != "-":
        found.console()
    for path in drawn:
        print(path)
    return 0


def _described(args: argparse.Namespace) -> int:
    from lilliput.report.figures import described

    for figure in described(args.figure):
        for path in figure.draw(Path(args.figures or "figures"), args.folders or None):
            print(path)
    return 0


def parsed(made: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace | None:
    """The arguments; None where help was asked for.  Raises ValueError for what does not parse."""
    if not argv or {"-h", "--help"} & set(argv):
        made.print_help()
        return None

    def refuse(message: str) -> NoReturn:  # argparse itself prints its usage and exits
        raise ValueError(f"{message}; `{made.prog} --help` tells more")

    made.error = refuse  # type: ignore[method-assign]
    return made.parse_args(argv)
