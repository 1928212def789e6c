"""`lilliput run recipe=...`: the rows of a published table, and what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lilliput.cli.execute import describe, ensure
from lilliput.cli.run_words import Args
from lilliput.config import Settings, expanded, flat
from lilliput.config.shared import NEUTRAL
from lilliput.recipes import find


def reproduce(chosen: Sequence[Settings], args: Args) -> int:
    """Run every row of a recipe that has not been run; with --check, say what came of it: 0 unless not reproduced."""
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
