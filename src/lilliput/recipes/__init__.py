"""Recipes: published experiments as settings, with what their sources report and what we expect."""

from __future__ import annotations

from typing import Any

from lilliput.recipes.fedavg import CIFAR10_CNN
from lilliput.recipes.recipe import Case, Recipe, Verdict, Version
from lilliput.registry import resolve

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (CIFAR10_CNN,)}

__all__ = ["RECIPES", "Case", "Recipe", "Verdict", "Version", "find"]


def find(name: str) -> Recipe:
    """The recipe of a name, or a user's own at `file.py:NAME`.  Raises ValueError with the nearest one."""
    recipe: Any = resolve("recipe", name, RECIPES)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{name} is a {type(recipe).__name__}, not a lilliput.recipes.Recipe")
    return recipe
