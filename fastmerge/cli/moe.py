"""``fastmerge moe``."""

from __future__ import annotations

from functools import update_wrapper
from typing import Any

from fastmerge.cli.app import command
from fastmerge.cli.merge import merge
from fastmerge.errors import RecipeError


def moe(**given: Any) -> None:
    """Make a mixture of experts as RECIPE says and write it to OUT."""
    from fastmerge.planning.adapter_plan import is_of_adapters
    from fastmerge.recipe.document import Recipe
    from fastmerge.recipe.mixture import Mixture
    from fastmerge.recipe.source import read

    documents, _, _ = read(given["recipe"], "recipe")
    if is_of_adapters(documents):
        raise RecipeError(
            f"{documents[0].where}: no mixture of experts: it merges adapters; run `fastmerge "
            "merge`"
        )
    recipe = Recipe.load(given["recipe"])
    if not isinstance(recipe.output, Mixture):
        raise RecipeError(
            f"{recipe.output.where}: no mixture of experts: it has no 'experts:'; run `fastmerge "
            "merge`"
        )
    merge(**{**given, "recipe": recipe})


# It takes what merge takes.
command(update_wrapper(moe, merge, assigned=("__annotations__",), updated=()))
