"""Adapters (LoRA): taken from two models, and merged with one another.

``extract_lora`` finds the adapter that turns a base into a tuned model, ``merge_adapters`` merges
several of one base; both write a folder that PEFT loads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmerge.arguments import a_flag, a_list, a_path, a_text
from fastmerge.dtypes import WITH_KERNELS
from fastmerge.dtypes import parse as parse_dtype
from fastmerge.engine.extract import Found, extract
from fastmerge.engine.merge_adapters import merge_adapter_plan
from fastmerge.engine.report import MergeReport
from fastmerge.errors import FastmergeError, argument, brief, enough_memory, is_whole
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.side_files import check_card
from fastmerge.models.summary import place_of
from fastmerge.planning.adapters import plan_adapters
from fastmerge.planning.extraction import Choice, Extraction, plan_extraction
from fastmerge.planning.planner import whole_seed
from fastmerge.progress import Shown, shown
from fastmerge.recipe.adapters import AdapterRecipe
from fastmerge.recipe.source import read


@enough_memory("extract-lora")
def extract_lora(
    tuned: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    max_rank: int | None = None,
    dtype: str | None = "float32",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    save_modules: Sequence[str] = (),
    embed_lora: bool = False,
    skip_undecomposable: bool = False,
    distribute_scale: bool = True,
    sv_epsilon: float = 0.0,
    power_iterations: int = 2,
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    keep_paths: bool = False,
    cache: str | Path | None = None,
    progress: Shown = None,
) -> Found:
    """Writes the adapter of ``rank`` that brings ``base`` nearest to ``tuned`` to the folder
    ``out``, for PEFT: truncated singular value decompositions of the differences, found by random
    projections, the nearest of that rank (Eckart and Young 1936; Halko et al. 2011,
    doi:10.1137/090771806). What each matrix came to is in fastmerge.json, too.

    ``tuned``, ``base``: folders or Hub ids of one architecture and vocabulary. ``out``: a path.
    ``rank``: of every matrix, whose sides must have it; or ``max_rank``: the same, or all that a
    smaller matrix has. ``dtype``: of the factors, None for the tuned model's own.

    As mergekit-extract-lora 0.1.5 chooses, matrices are decomposed, unless a pattern says
    otherwise: ``include``, ``exclude``: regular expressions, one or none of which is found in the
    module's name. Embeddings, heads, norms and ``save_modules`` are saved whole. ``embed_lora``:
    decompose embeddings, too; ``skip_undecomposable``: leave norms and the like out;
    ``save_modules``: names of modules, or their last parts. What is equal in both models is left
    out; a decomposed module's bias is stored whole where it differs. ``distribute_scale``: the
    roots of the singular values go into either factor, else all into A. ``sv_epsilon``: at least 0;
    singular values up to it are dropped. ``power_iterations``: 0 to 100; more bring the error
    nearer to the least. ``seed``: a whole number in [0, 2^64) for the random directions; the bits
    follow from NumPy's BLAS and how many threads that has, too. ``cache``: the Hub's, where it is
    not the usual one.

    ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU. ``overwrite``:
    replace an ``out`` that is there, once the new one is complete; ``fresh``: ignore what an
    interrupted run left. ``keep_paths``: what is written names the local folders as given.
    ``progress``: True for a bar on stderr, or a function of bytes done, bytes in all and a tensor's
    name.

    Returns the report and, for each module, rank, norm, relative error and singular values. Raises,
    before anything is written, FastmergeError for an argument, ModelError for models that do not
    fit, UnsupportedError for what no adapter says, OutputError for what stands at ``out``,
    ResourceError for what the machine lacks.
    """
    plan = plan_extract_lora(
        tuned,
        base,
        Choice(
            rank=_rank(rank, max_rank),
            at_most=max_rank is not None,
            dtype=None
            if dtype is None
            else parse_dtype(a_text(dtype, "dtype"), among=WITH_KERNELS),
            include=_patterns(include, "include"),
            exclude=_patterns(exclude, "exclude"),
            save=_texts(save_modules, "save_modules"),
            embed_lora=a_flag(embed_lora, "embed_lora"),
            skip_undecomposable=a_flag(skip_undecomposable, "skip_undecomposable"),
            distribute_scale=a_flag(distribute_scale, "distribute_scale"),
            sv_epsilon=_epsilon(sv_epsilon),
            power_iterations=_count(power_iterations, "power_iterations", 0, 100),
        ),
        seed=seed,
        keep_paths=a_flag(keep_paths, "keep_paths"),
        cache=None if cache is None else a_path(cache, "cache"),
    )
    folder = a_path(out, "out")
    with shown(progress, f"extracting to {folder.name or folder}") as told:
        return extract(
            plan,
            folder,
            threads=threads,
            overwrite=a_flag(overwrite, "overwrite"),
            fresh=a_flag(fresh, "fresh"),
            progress=told,
        )


@enough_memory("merge")
def merge_adapters(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float],
    method: str = "svd",
    rank: int | None = None,
    density: float | Sequence[float] | None = None,
    majority_sign_method: str | None = None,
    svd_clamp: float | None = None,
    normalize: bool = False,
    targets: str = "same",
    base_model: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    keep_paths: bool = False,
    progress: Shown = None,
) -> MergeReport:
    """Merges adapters of one base into one, in the folder ``out``, for PEFT; what a recipe does
    whose models are all adapters. Definitions are PEFT's, of its ``add_weighted_adapter``;
    arithmetic is in float64.

    ``adapters``: folders or Hub ids. ``out``: a path. ``weights``: one number each. ``method``:
    PEFT's combination types by its names ("linear", "cat", "svd", "ties", "dare_linear",
    "dare_ties", "magnitude_prune", and the last four with "_svd"), or "task_arithmetic", which is
    cat, or svd where a rank is given. As in PEFT, "linear" and others without "_svd" merge the
    factors entry by entry; cat and svd have the exact sum of the deltas ``weight * scale * B @ A``,
    an SVD by QR of the factors and not of their product. ``rank``: of an SVD, default the largest
    of the adapters'. ``density``: the fraction of entries that is kept, in [0, 1], one or one for
    each. ``majority_sign_method``: of ties, "total" or "frequency". ``svd_clamp``: the quantile of
    an SVD's factors that bounds their entries. ``normalize``: divide the weights by their sum.
    ``targets``: "same", or "any" to take each adapter where it is there. ``base_model``: the base
    of all, whatever they call it. ``dtype``: of the factors, default the first adapter's. ``seed``:
    a whole number in [0, 2^64) for methods that draw; by default it follows from the call.

    ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU. ``overwrite``:
    replace an ``out`` that is there, once the new one is complete; ``fresh``: ignore what an
    interrupted run left. ``keep_paths``: what is written names the local folders as given.
    ``progress``: True for a bar on stderr, or a function of bytes done, bytes in all and a tensor's
    name.

    Returns a `MergeReport`. Raises, before anything is written, RecipeError for the method or a
    value, ModelError for adapters that do not fit, UnsupportedError for a kind that is not merged,
    OutputError for what stands at ``out``, FastmergeError for another argument.
    """
    places = [
        str(a_path(item, f"adapters[{i}]")) for i, item in enumerate(a_list(adapters, "adapters"))
    ]
    each = [{"weight": weight} for weight in _for_each(weights, places, "weights")]
    shared: dict[str, Any] = {"normalize": normalize, "targets": targets}
    if isinstance(density, Sequence) and not isinstance(density, str):
        for own, value in zip(each, _for_each(density, places, "density"), strict=True):
            own["density"] = value
    elif density is not None:
        shared["density"] = density
    named = {"rank": rank, "svd_clamp": svd_clamp, "majority_sign_method": majority_sign_method}
    shared |= {name: value for name, value in named.items() if value is not None}
    source = {
        "merge_method": method,
        "models": [
            {"model": place, "parameters": own} for place, own in zip(places, each, strict=True)
        ],
        "parameters": shared,
        **({} if base_model is None else {"base_model": base_model}),
        **({} if dtype is None else {"dtype": dtype}),
    }
    documents, text, _ = read(source, "merge_adapters")
    plan = plan_adapters(
        AdapterRecipe.of(documents[0], text), None if seed is None else whole_seed(seed)
    )
    folder = a_path(out, "out")
    with shown(progress, f"merging to {folder.name or folder}") as told:
        return merge_adapter_plan(
            replace(plan, keep_paths=a_flag(keep_paths, "keep_paths")),
            folder,
            threads=threads,
            overwrite=a_flag(overwrite, "overwrite"),
            fresh=a_flag(fresh, "fresh"),
            progress=told,
        )


def _for_each(values: Sequence[Any], places: Sequence[str], where: str) -> list[Any]:
    found = a_list(values, where)
    if len(found) != len(places):
        raise FastmergeError(f"{where}: {len(found)} for {len(places)} adapters; give one for each")
    return found


def plan_extract_lora(
    tuned: str | Path,
    base: str | Path,
    choice: Choice,
    *,
    seed: int = 0,
    keep_paths: bool = False,
    cache: str | Path | None = None,
) -> Extraction:
    """What `extract_lora` would do."""
    references = (str(a_path(tuned, "tuned")), str(a_path(base, "base")))
    models = [Checkpoint.open(place_of(reference, cache=cache)) for reference in references]
    for model in models:
        check_card(model.folder)
    plan = plan_extraction(models[0], models[1], references, choice, whole_seed(seed))
    settings = {"tuned": references[0], "base": references[1], **choice.plain}
    lines = [f"  {key}: {json.dumps(value)}" for key, value in settings.items()]
    text = "\n".join(["extract_lora:", *lines, f"  seed: {plan.seed}", ""])
    return replace(plan, recipe_text=text, keep_paths=keep_paths)


def _rank(rank: int | None, max_rank: int | None) -> int:
    if (rank is None) == (max_rank is None):
        raise FastmergeError(f"{argument('rank')}: give it or {argument('max_rank')}, and not both")
    if rank is not None:
        return _count(rank, "rank", 1, 1 << 20)
    return _count(max_rank, "max_rank", 1, 1 << 20)


def _count(value: Any, where: str, low: int, high: int) -> int:
    if not is_whole(value) or not low <= value <= high:
        raise FastmergeError(
            f"{where}: must be a whole number from {low} to {high}, not {brief(value)}"
        )
    return int(value)


def _epsilon(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e300:
        raise FastmergeError(f"sv_epsilon: must be a number of at least 0, not {brief(value)}")
    return float(value)


def _texts(values: Sequence[str], where: str) -> tuple[str, ...]:
    return tuple(a_text(value, where) for value in a_list(values, where))


def _patterns(values: Sequence[str], where: str) -> tuple[str, ...]:
    found = _texts(values, where)
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            raise FastmergeError(
                f"{where}: {brief(pattern)} is no regular expression ({error})"
            ) from None
    return found
