"""`lilliput list`: everything that has a name, with a line on each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lilliput.cli.arguments import Line
from lilliput.cli.facts import facts
from lilliput.cli.help import kinds, section
from lilliput.core.registry import nearest, normal


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    flags, words = Line("--markdown").parse(argv)
    if flags["markdown"]:
        if words != ["recipes"]:
            raise ValueError("--markdown is for recipes: lilliput list recipes --markdown")
        from lilliput.recipes.markdown import markdown

        print(markdown(), end="")
        return 0
    listed = kinds(facts())
    print("\n\n".join(section(kind, listed[kind]) for kind in [_kind(word, listed) for word in words] or listed))
    return 0


def _kind(word: str, known: Iterable[str]) -> str:
    word = {"methods": "algorithms", "method": "algorithms", "data": "datasets"}.get(word, word)
    for kind in known:
        if normal(word).rstrip("s") in (normal(kind).rstrip("s"), normal(kind)):
            return kind
    raise ValueError(f"there is nothing called {word!r} to list; {nearest(word, known)}")
