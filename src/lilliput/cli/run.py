"""`lilliput run`: one run, a sweep of them, or a recipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lilliput.config import Settings, expanded, flat, from_file, words
from lilliput.config.shared import NEUTRAL

USAGE = "lilliput run [-m] [--config FILE] [--dry] [--count published] [--check] [--cfg] [--plain] [key=value ...]"


@dataclass
class Args:
    """The command line of `run`, sorted."""

    settings: list[str] = field(default_factory=list)
    hydra: list[str] = field(default_factory=list)
    config: str | None = None
    sweep: bool = False
    check: bool = False
    show: bool = False
    dry: bool = False
    count: str = "all"
    plain: bool = False
    help: str | None = None

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Args:
        """Raises ValueError for a flag there is not."""
        args, rest = cls(), list(argv)
        while rest:
            word = rest.pop(0)
            if word in _FLAGS:
                setattr(args, _FLAGS[word], True)
            elif word in ("-h", "--help"):
                args.help = rest.pop(0) if rest else ""
            elif word.partition("=")[0] in ("--config", "--count"):
                setattr(args, word.partition("=")[0].removeprefix("--"), _value(word, rest))
            elif word.startswith("-"):
                raise ValueError(_unknown(word, rest))
            elif word.startswith(("hydra.", "hydra/", "+hydra.", "++hydra.")):
                args.hydra.append(word)
            else:
                args.settings.append(word)
        if args.dry and args.sweep:
            raise ValueError("--dry tells of one run; leave -m out, and repeat the command for others")
        if args.hydra and not args.sweep:
            raise ValueError(f"{args.hydra[0]} says how to sweep; add -m")
        return args

    def layers(self, settings: Sequence[str]) -> list[dict[str, Any]]:
        """The configuration file, if any, and these words."""
        return [*([from_file(self.config)] if self.config else []), words(settings)]


_FLAGS = {"-m": "sweep", "--multirun": "sweep", "--dry": "dry", "--check": "check", "--cfg": "show", "--plain": "plain"}


def _value(word: str, rest: list[str]) -> str:
    name, sign, value = word.partition("=")
    if not sign and not rest:
        raise ValueError(f"{name} needs {'a file' if name == '--config' else 'all or published'}")
    return value if sign else rest.pop(0)


def _unknown(word: str, rest: Sequence[str]) -> str:
    name, sign, value = word.lstrip("-").partition("=")
    value = value if sign else rest[0] if rest else "..."
    setting = f"{name.replace('-', '_')}={value}"
    return f"there is no flag {word!r}; settings are written {setting}, flags are {', '.join(_FLAGS)}"


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    args = Args.parse(argv)
    if args.help is not None:
        from lilliput.cli.help import run_help

        print(run_help(args.help))
        return 0
    if args.sweep:
        from lilliput.cli.sweep import sweep

        return sweep(args)
    chosen = expanded(*args.layers(args.settings))
    if args.show:
        from lilliput.cli.folder import as_yaml

        print("---\n".join(map(as_yaml, chosen)), end="")
        return 0
    for s in chosen:
        for remark in s.notes.values():
            print(f"lilliput: note: {remark}", file=sys.stderr)
    if args.dry or chosen[0]["engine"] == "dry":
        from lilliput.cli.dry import dry

        return dry(chosen, args.count)
    if chosen[0]["recipe"] is not None:
        return recipe(chosen, args)
    if args.check:
        raise ValueError("--check compares with what was published; add recipe=..., see `lilliput list recipes`")
    from lilliput.cli.execute import start

    print(start(chosen[0], args.plain).folder)
    return 0


def recipe(chosen: Sequence[Settings], args: Args) -> int:
    """Run every row of a recipe that has not been run; with --check, say what came of it: 0 unless not reproduced."""
    from lilliput.cli.execute import describe, ensure
    from lilliput.recipes import find

    found = find(chosen[0]["recipe"])
    if args.check:
        _unchanged(chosen)
    measured: dict[str, float | None] = {}
    for s in chosen:
        outcome = ensure(s, args.plain)
        print(f"{s['case']}: {describe(outcome)}")
        measured[str(s["case"])] = found.value(outcome.rows)
    if not args.check:
        return 0
    version = found.version(chosen[0]["scale"])
    for case in version.cases:
        published = "" if case.published is None else f", published {case.published:g}"
        value = measured.get(case.name)
        got = "not run" if value is None else f"{value:.4f}"
        what = found.metric if found.until is None else found
        print(f"{case.name}: {what} {got}, expected {version.expectation(case)}{published}")
    verdict = version.verdict(measured)
    print(f"{found.name} ({chosen[0]['scale']}): {verdict}")
    return 1 if verdict in ("not reproduced", "not run") else 0


def _unchanged(chosen: Sequence[Settings]) -> None:
    """Raise ValueError if settings of the recipe were changed: its expectation would be of another experiment."""
    free = ("engine", "device", "profile", "folder")
    places = (("dataset", "folder"), ("dataset", "tokenizer"), ("model", "source"))  # of the same, on this machine
    for s in chosen:
        kept: dict[str, Any] = {key: s[key] for key in free}
        kept |= {f"{axis}.{name}": s.node(axis)[name] for axis, name in places if name in s.node(axis)}
        own = expanded({"recipe": s["recipe"], "scale": s["scale"], "case": s["case"], **kept})[0]
        if own.fingerprint() != s.fingerprint():
            mine, theirs = flat(s.as_dict()), flat(own.as_dict())
            key = next(k for k in mine if mine[k] != theirs.get(k) and k not in NEUTRAL)
            raise ValueError(f"{key}={mine[key]} is not the recipe's {theirs.get(key)}; leave it out, or --check")
