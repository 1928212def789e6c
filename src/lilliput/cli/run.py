"""`lilliput run`: one run, a sweep of them, or a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from lilliput.cli.run_words import Args, tell
from lilliput.config import expanded
from lilliput.config.layers import given


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    args = Args.parse(argv)
    if args.sweep:
        from lilliput.cli.sweep import sweep

        return sweep(args)
    chosen = expanded(*given(args.settings, args.config))
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
        from lilliput.cli.recipe import reproduce

        return reproduce(chosen, args)
    if args.check:
        raise ValueError("--check compares with what was published; add recipe=..., see `lilliput list recipes`")
    from lilliput.cli.execute import start

    print(start(chosen[0], args.plain).folder)
    return 0
