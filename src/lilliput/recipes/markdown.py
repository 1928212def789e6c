"""docs/reproduction.md, written from the recipes: what was published, what we expect, and what we measured."""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.recipes import RECIPES
from lilliput.recipes.recipe import Recipe, Version

HEAD = """# Reproduction

Published experiments as recipes.  This page is generated: `lilliput list recipes --markdown > docs/reproduction.md`.

`lilliput run recipe=NAME` runs what is missing of a recipe, and with `--check` says what came of it: *reproduced*
(every row within its tolerance), *same ordering* (the rows stand as in the source, at other values), *not reproduced*,
or *not run*.  Data sets that are not embedded need their folder, such as `cifar10.folder=data/cifar10`.
"""


def markdown() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(line for recipe in RECIPES.values() for line in _recipe(recipe))]).rstrip() + "\n"


def _recipe(recipe: Recipe) -> Iterator[str]:
    yield f"## {recipe.name}\n"
    yield f"{recipe.title}.  Source: {recipe.source}.{f'  {recipe.note}' if recipe.note else ''}\n"
    for scale, version in recipe.versions.items():
        command = (
            f"lilliput {recipe.command} recipe={recipe.name}{'' if scale == 'full' else f' scale={scale}'} --check"
        )
        measured = {case.name: case.measured for case in version.cases}
        yield f"`{command}`: {version.hours:g} h on {version.hardware}; {version.verdict(measured)}.\n"
        if any(case.expected is not None or case.mib for case in version.cases):
            yield from _table(recipe, version)


def _table(recipe: Recipe, version: Version) -> Iterator[str]:
    columns = ["published", "expected", "measured", *["mib"][: any(case.mib for case in version.cases)]]
    heads = [{"mib": "MiB a round"}.get(name, name) for name in columns]
    yield f"| {recipe} | {' | '.join(heads)} |"
    yield f"|---{'|---' * len(columns)}|"
    for case in version.cases:
        expected = "" if case.expected is None else version.expectation(case)
        numbers = [expected if name == "expected" else _number(getattr(case, name)) for name in columns]
        yield f"| {case.name} | {' | '.join(numbers)} |"
    yield ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
