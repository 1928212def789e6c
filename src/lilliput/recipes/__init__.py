"""Recipes: published experiments as settings, with the numbers that their sources report and those we expect."""

from __future__ import annotations

from typing import Any

from lilliput.core.registry import resolve
from lilliput.recipes.fedavg import CIFAR10_CNN
from lilliput.recipes.language import GPT2_E2E
from lilliput.recipes.pretraining import PRETRAINING
from lilliput.recipes.recipe import Case, Recipe, Verdict, Version
from lilliput.recipes.splitting import SPLIT
from lilliput.recipes.subspace import SUBSPACE

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (CIFAR10_CNN, *SPLIT, GPT2_E2E, *PRETRAINING, *SUBSPACE)
}

__all__ = ["RECIPES", "Case", "Recipe", "Verdict", "Version", "find"]


def find(name: str, command: str = "run") -> Recipe:
    """The recipe of this name, or your own at `file.py:NAME`, for a command.

    Raises ValueError with the nearest name, or with the command that the recipe is for.
    """
    recipe: Any = resolve("recipe", name, RECIPES)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{name} is a {type(recipe).__name__}, not a lilliput.recipes.Recipe")
    if recipe.command != command:
        raise ValueError(f"recipe {recipe.name} is for another command: `lilliput {recipe.command} recipe={name}`")
    return recipe
