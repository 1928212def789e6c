"""`lilliput list`: everything that has a name, with a line on each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lilliput.cli.arguments import Line
from lilliput.cli.facts import facts
from lilliput.cli.help import section
from lilliput.core.registry import nearest, normal

HELP = """usage: lilliput list [KIND ...] [--markdown]

KIND is one or more of: {kinds}; all of them by default.
`lilliput run --help NAME` shows what can be set for a name.  --markdown prints the recipes as docs/reproduction.md."""


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    kinds = tables()
    if {"-h", "--help"} & set(argv):
        print(HELP.format(kinds=", ".join(kinds)))
        return 0
    flags, words = Line("--markdown").parse(argv)
    if flags["markdown"]:
        if words != ["recipes"]:
            raise ValueError("--markdown is for recipes: lilliput list recipes --markdown")
        from lilliput.recipes.markdown import markdown

        print(markdown(), end="")
        return 0
    print("\n\n".join(section(kind, kinds[kind]) for kind in [_kind(word, kinds) for word in words] or kinds))
    return 0


def tables() -> dict[str, dict[str, str]]:
    """What `list` lists: for each kind, its names with a line on each."""
    known = facts()
    names = {
        axis["plural"].replace(" ", ""): {name: told["line"] for name, told in axis["names"].items()}
        for axis in known["axes"].values()
    }
    return {**names, "recipes": known["recipes"]}


def _kind(word: str, kinds: Iterable[str]) -> str:
    word = {"methods": "algorithms", "method": "algorithms", "data": "datasets"}.get(word, word)
    for kind in kinds:
        if normal(word).rstrip("s") in (normal(kind).rstrip("s"), normal(kind)):
            return kind
    raise ValueError(f"there is nothing called {word!r} to list; {nearest(word, kinds)}")
