"""Writes docs/reproduction.md from the recipes: what was published, what we expect, and what we measured."""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.recipes import RECIPES
from lilliput.recipes.recipe import Case, Recipe, Version

HEAD = """# Reproduction

Published experiments as recipes.  This page is generated: `lilliput list recipes --markdown > docs/reproduction.md`.

`lilliput run recipe=NAME` runs the missing runs of a recipe, and with `--check` reports the outcome: *reproduced*
(every row is within its tolerance), *same ordering* (the rows have the order of the source, with other values), *not
reproduced*, or *not run*.  Data sets that are not built in need their folder, such as `cifar10.folder=data/cifar10`.
"""


METRIC = ("published", "expected", "measured")  # columns in the unit of the recipe's metric


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
    columns = _columns(version)
    head = recipe if columns[0] in METRIC else ""
    yield f"| {head} | {' | '.join({'mib': 'MiB a round'}.get(name, name) for name in columns)} |"
    yield f"|---{'|---' * len(columns)}|"
    for case in version.cases:
        yield f"| {case.name} | {' | '.join(_cell(version, case, name) for name in columns)} |"
    yield ""


def _columns(version: Version) -> list[str]:
    """The columns of a table: the numbers of the metric that exist, rounds if they differ, and traffic."""
    compared = any(case.expected is not None for case in version.cases)
    metric = [name for name in METRIC if compared or any(getattr(case, name) is not None for case in version.cases)]
    differ = len({case.settings.get("rounds") for case in version.cases}) > 1
    return [*metric, *["rounds"][:differ], *["mib"][: any(case.mib for case in version.cases)]]


def _cell(version: Version, case: Case, column: str) -> str:
    if column == "expected":
        return "" if case.expected is None else version.expectation(case)
    return f"{case.settings['rounds']:,}" if column == "rounds" else _number(getattr(case, column))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
