"""`lilliput list`: everything that has a name, with a line on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.cli.arguments import Line

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
    print("\n\n".join(section(kind, tables()[kind]()) for kind in [_kind(word, kinds) for word in words] or kinds))
    return 0


def tables() -> dict[str, Any]:
    """What `list` lists: for each kind, a function that gives {name: line}."""
    from lilliput.config.axes import AXES

    return {axis.plural.replace(" ", ""): _lines(axis) for axis in AXES.values()} | {"recipes": _recipes}


def _lines(axis: Any) -> Any:
    def lines() -> dict[str, str]:
        from lilliput.config.fields import summary

        return {choice.name: summary(choice.target) for choice in axis.nodes()}

    return lines


def _recipes() -> dict[str, str]:
    from lilliput.recipes import RECIPES

    hours = {name: ", ".join(f"{s}: {v.hours:g} h" for s, v in r.versions.items()) for name, r in RECIPES.items()}
    return {name: f"{recipe.title} ({hours[name]})" for name, recipe in RECIPES.items()}


def _kind(word: str, kinds: Mapping[str, Any]) -> str:
    from lilliput.core.registry import nearest, normal

    word = {"methods": "algorithms", "method": "algorithms", "data": "datasets"}.get(word, word)
    for kind in kinds:
        if normal(word).rstrip("s") in (normal(kind).rstrip("s"), normal(kind)):
            return kind
    raise ValueError(f"there is nothing called {word!r} to list; {nearest(word, kinds)}")


def section(kind: str, lines: Mapping[str, str]) -> str:
    """One kind as text: its names, each with its line."""
    width = max((len(name) for name in lines), default=0)
    return "\n".join([kind, *(f"  {name:{width}}  {line}".rstrip() for name, line in lines.items())])
