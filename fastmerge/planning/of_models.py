"""A plan of models alone, without a recipe: their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastmerge.collector import PLANNING, rarely_collected
from fastmerge.dtypes import DType
from fastmerge.methods import METHODS
from fastmerge.models import hub
from fastmerge.planning.inputs import Input
from fastmerge.planning.opened import Opened
from fastmerge.planning.plan import Plan
from fastmerge.planning.planner import Planner
from fastmerge.recipe.settings import constant
from fastmerge.recipe.tokenizer import TokenizerSection
from fastmerge.tree.collapse import AS_THEY_ARE


def of_models(
    references: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    places: Sequence[str] | None = None,
    where: str = "models",
    out_dtype: DType | None = None,
    arithmetic: DType | None = None,
    base_folder: Path | None = None,
    text: str = "",
    tokenizer: TokenizerSection | None = None,
) -> Plan:
    """The plan of sum_i w_i x_i over whole models, the weights as they are (1 each by default).

    references: folders or hub names, looked for as `make_plan` does; the first gives config and
    tokenizer. places: what an error about each begins with, where the user named it (default:
    "models[0]" ...); where: about all. out_dtype: default the models' own. arithmetic: as of
    `planning.build.Builder`. text: recorded beside
    the output. tokenizer: whose tokens order the rows; the first model is the base. Raises
    FastmergeError where the models cannot be merged.
    """
    linear = METHODS["linear"]
    places = [f"{where}[{i}]" for i in range(len(references))] if places is None else places
    weight = linear.parameter("weight")
    assert weight is not None
    planner = Planner(Opened({}, base_folder, hub.resolve), text, None)
    with rarely_collected(PLANNING):
        inputs = [
            Input(
                planner.view(reference, place),
                0,
                place,
                {"weight": constant(weight.check(value, place))},
            )
            for reference, place, value in zip(
                references, places, weights or [1.0] * len(references), strict=True
            )
        ]
        levels = [{name: constant(value) for name, value in AS_THEY_ARE.items()}]
        part = planner.part(linear, inputs, None, levels, where=where, of=where)
        return planner.plan(
            planner.merged(
                [part], inputs[0].view, dtype=out_dtype, arithmetic=arithmetic, tokenizer=tokenizer
            )
        )
