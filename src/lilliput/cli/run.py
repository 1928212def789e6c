"""`lilliput run`: one run, a sweep of them, or a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lilliput.cli.run_words import Args, tell
from lilliput.config import Settings, expanded, flat
from lilliput.config.shared import NEUTRAL


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    asked = next((i for i, word in enumerate(argv) if word in ("-h", "--help")), None)
    if asked is not None:
        from lilliput.cli.help import run_help

        print(run_help(argv[asked + 1] if asked + 1 < len(argv) else ""))
        return 0
    args = Args.parse(argv)
    if args.sweep:
        from lilliput.cli.sweep import sweep

        return sweep(args)
    chosen = expanded(*args.layers(args.settings))
    if args.cfg:
        from lilliput.cli.folder import as_yaml

        print("---\n".join(map(as_yaml, chosen)), end="")
        return 0
    for s in chosen:
        tell(s.notes.values())
    if args.dry or chosen[0]["engine"] == "dry":
        from lilliput.cli.dry import dry

        return dry(chosen, args.count or "all")
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
