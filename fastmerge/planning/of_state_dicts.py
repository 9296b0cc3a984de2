"""A plan of tensors by their names alone: no layers are counted, no config is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmerge.collector import PLANNING, rarely_collected
from fastmerge.models import hub
from fastmerge.models.model import Model
from fastmerge.planning.build import Builder
from fastmerge.planning.inputs import View
from fastmerge.planning.opened import Opened
from fastmerge.planning.plan import Plan
from fastmerge.planning.planner import Planner, whole_seed
from fastmerge.recipe.document import Document, Recipe
from fastmerge.recipe.meaning import meaning


def of_state_dicts(
    recipe: Mapping[str, Any], models: Mapping[str, Model], seed: int | None
) -> Plan:
    """The plan of a recipe of whole ``models``, whose tensors are merged with their namesakes,
    whatever they are called. ``seed`` None: it follows from the recipe.

    Raises FastmergeError for names, shapes and parameters that do not fit.
    """
    loaded = Recipe.load(recipe)
    document = loaded.output
    assert isinstance(document, Document)  # it has a merge_method
    seed = None if seed is None else whole_seed(seed)
    opened = Opened(models, None, hub.resolve)
    planner = Planner(opened, loaded.text, seed, meaning(loaded.documents))
    with rarely_collected(PLANNING):
        part, stage_seed = planner.whole(document)
        build = Builder(
            document.output_dtype, stage_seed, opened.models, arithmetic=document.arithmetic
        )
        result = View("output", {}, build.whole(part), part.lead.view.donor)
        return planner.plan(result, sparing=True)
