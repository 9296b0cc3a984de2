"""From a schedule to its models: the plan that checks them, and their Gram matrices, found once and
kept beside the run.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import chain
from pathlib import Path

from fastmerge import dtypes
from fastmerge.arguments import a_function, a_path
from fastmerge.compute.cpu import thread_count
from fastmerge.errors import FastmergeError, OutputError, brief
from fastmerge.methods.table import T
from fastmerge.planning.of_models import of_models
from fastmerge.planning.plan import Plan
from fastmerge.progress import Progress
from fastmerge.recipe.settings import extrapolations
from fastmerge.retrograde.moves import take
from fastmerge.retrograde.schedule import Schedule
from fastmerge.search.expressions import Model
from fastmerge.search.grams import cached_grams
from fastmerge.search.opening import positions, space_of
from fastmerge.search.space import Space, merged


def open_template(schedule: Schedule) -> Plan:
    """The plan of a linear merge of all models of the run: from headers, can they be merged? Raises
    FastmergeError, with the schedule's line, where they cannot.
    """
    places = [entry.at("model") for entry in (schedule.baseline, *schedule.pool)]
    if len(schedule.references) > len(places):
        places.append(schedule.at("base_model"))
    plan = of_models(
        schedule.references,
        places=places,
        where=schedule.where,
        out_dtype=schedule.output_dtype,
        arithmetic=dtypes.F32,
        base_folder=schedule.folder,
        text=schedule.text,
        tokenizer=schedule.tokenizer,
    )
    beyond = (extrapolations(step.t, T) for step in schedule.steps if step.t is not None)
    plan = replace(plan, notes=(*plan.notes, *dict.fromkeys(chain(*beyond))))
    if schedule.dtype is None or schedule.out_dtype is not None:
        return plan
    own = {item.dtype.name for item in merged(plan)}
    if own == {dtypes.parse(schedule.dtype).name}:
        return plan
    note = (
        f"{schedule.at('dtype')}: 'dtype' names the arithmetic, which is float32 whatever it says; "
        f"the model is written as {' and '.join(sorted(own))}, as its inputs are: for another type "
        "give 'out_dtype'"
    )
    return replace(plan, notes=(*plan.notes, note))


def check_steps(schedule: Schedule, template: Plan) -> None:
    """Raises FastmergeError where a step has no value for a tensor, before any step is taken."""
    bare = Space(template, None, positions(template), origin(schedule))
    for step in {id(step): step for step in schedule.steps}.values():
        bare.check(take(schedule, step, Model(0), Model(0), 0))
        near = step.partner in ("nearest", "farthest")
        if near and len(schedule.pool) == 1 and origin(schedule) == 1:
            step.refuse("partner", "the pool is base_model alone, which is neither near nor far")


def open_space(
    schedule: Schedule,
    *,
    cache: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Space:
    """The models' geometry: one pass over the weights, or none where ``cache`` holds its result.

    Raises FastmergeError where the models cannot be merged.
    """
    if not isinstance(schedule, Schedule):
        raise FastmergeError(f"schedule: must be what `load` gives, not {brief(schedule)}")
    if cache is not None:
        cache = a_path(cache, "cache")
        if os.path.isdir(cache) or not os.path.isdir(cache.parent):
            raise OutputError(f"{cache}: no file that can be written; name one in a folder")
    a_function(progress, "progress")
    thread_count(threads)
    template = open_template(schedule)
    known = {} if cache is None else cached_grams(cache, template)
    return space_of(
        template,
        known,
        origin=origin(schedule),
        cache=cache,
        threads=threads,
        progress=progress,
    )


def origin(schedule: Schedule) -> int:
    """The number of the model that angles are taken from: base_model, else the baseline (0)."""
    return 0 if schedule.base_model is None else schedule.model_index("base_model") or 0
