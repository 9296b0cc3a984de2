"""Averages of any number of checkpoints: a linear merge with a weight each, in one pass.

Sums are fp32 in the order of the models (fused multiply-adds, divided once), the result is rounded
once: against the exact average the error is below n 2^-24 of the mean magnitude for n models, a
thousandth of bfloat16's own rounding for 64. There is no limit on n.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge import api
from fastmerge.arguments import a_list, a_path, a_text
from fastmerge.engine.report import MergeReport
from fastmerge.errors import (
    MODELS_ALONE,
    FastmergeError,
    UnsupportedError,
    brief,
    enough_memory,
    in_words,
    is_whole,
)
from fastmerge.models.adapter import is_adapter
from fastmerge.models.folder import SINGLE
from fastmerge.models.series import check_order, check_series, ema_weights, find_series
from fastmerge.recipe.document import typed

if TYPE_CHECKING:
    from typing_extensions import Unpack

# What errors say where weights are an argument.
AVERAGING = {
    **MODELS_ALONE,
    r"^recipe\.models\[(\d+)\]\.parameters\.weight: 'weight' ": r"weights[\1]: ",
    r"^recipe\.models: linear: the weights (.*); change them or .*": r"weights: \1; change them",
}
Models = str | Path | Sequence[str | Path]
"""Checkpoints: a folder, a file or a Hub id, or several of them."""


@enough_memory("average")
def average(
    models: Models,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    last: int | None = None,
    ema: float | None = None,
    pattern: str | None = None,
    dtype: str | None = None,
    **options: Unpack[api.MergeOptions],
) -> MergeReport:
    """Writes the average of ``models`` to the new folder ``out``: sum w_i x_i / sum w_i (Wortsman
    et al. 2022, arXiv:2203.05482), in fp32 and rounded once. Config and tokenizer are the first
    model's.

    ``models``: folders, .safetensors files, PyTorch distributed checkpoints (``.distcp``) or Hub
    ids. ``out``: a path or URL. ``weights``: one number each, default 1. ``last``: how many of the
    last count. ``ema``: in place of weights a decay d between 0 and 1, m_i = d m_{i-1} + (1 - d)
    x_i from m_0 = x_0 on. ``pattern``: ``models`` are folders of checkpoints, of which those whose
    names fit take part, in natural order (``checkpoint-*``). ``dtype``: of the output, default the
    models' own (of codes in fp8 or MXFP4 what their config names; "as_base" writes codes and scales
    again). ``options``: the keyword arguments of `merge`, which it is, of the recipe that
    `average_recipe` makes.

    Returns a `MergeReport`. Raises FastmergeError for models, weights or a decay that do not go
    together, UnsupportedError for an adapter, and the errors of `merge`: RecipeError, ModelError,
    OutputError, ResourceError.
    """
    recipe = average_recipe(
        models, weights=weights, last=last, ema=ema, pattern=pattern, dtype=dtype
    )
    with in_words(AVERAGING):
        return api.merge(recipe, out, **options)


def average_recipe(
    models: Models,
    *,
    weights: Sequence[float] | None = None,
    last: int | None = None,
    ema: float | None = None,
    pattern: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """The recipe of `average`, whose arguments it takes; reads no more than names of files."""
    chosen = _chosen(models, pattern)
    if pattern is not None and not (last is None and ema is None and weights is None):
        check_series(chosen)
    elif last is not None or ema is not None:
        check_order(chosen)
    if last is not None:
        if not is_whole(last) or last < 1:
            raise FastmergeError(f"last: {brief(last)} is not a number of models of 1 or more")
        if last > len(chosen):
            raise FastmergeError(f"last: {brief(last)} of {len(chosen)} models; give fewer")
        chosen = chosen[-int(last) :]
    _check_once(chosen)
    for name in chosen:
        if is_adapter(Path(name)):  # whose factors' average is not that of what they add
            raise UnsupportedError(
                f"{name}: a LoRA adapter, not a model; name it behind its base, BASE+{name}, or "
                "merge adapters alone by a recipe (merge_method: svd)"
            )
    each = _weights(weights, ema, len(chosen))
    recipe: dict[str, Any] = {
        "merge_method": "linear",
        "models": [
            {"model": name, "parameters": {"weight": weight}}
            for name, weight in zip(chosen, each, strict=True)
        ],
        "parameters": {"normalize": True},
    }
    if dtype is not None:
        recipe |= typed(a_text(dtype, "dtype"))
    return recipe


def _is_in_memory(model: object) -> bool:
    """Whether it is a state dictionary, or a module that has one."""
    return isinstance(model, Mapping) or callable(getattr(model, "state_dict", None))


def _chosen(models: Models, pattern: str | None) -> list[str]:
    if _is_in_memory(models):
        raise FastmergeError("models: one model in memory; average takes several, on disk")
    given = [models] if isinstance(models, (str, os.PathLike)) else a_list(models, "models")
    for at, name in enumerate(given):
        if _is_in_memory(name):
            raise FastmergeError(
                f"models[{at}]: a {type(name).__name__} in memory; average takes models on disk, "
                "merge_state_dicts(models, 'linear') state dictionaries and modules"
            )
        a_path(name, f"models[{at}]")
    names = [os.fspath(name) for name in given]  # a URL's two slashes are one in a Path
    if pattern is not None:
        text = a_text(pattern, "pattern")
        names = [str(found) for name in names for found in find_series(name, text)]
    if not names:
        raise FastmergeError("models: none; give one or more")
    return names


def _check_once(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        place = os.path.realpath(name)
        if os.path.basename(place) == SINGLE:  # of a folder, which may be named as well
            place = os.path.dirname(place)
        if place in seen and os.path.exists(place):
            raise FastmergeError(f"{name}: is there twice; keep one, and give it a larger weight")
        seen[place] = name


def _weights(weights: Sequence[float] | None, ema: float | None, count: int) -> list[float]:
    if ema is not None:
        if weights is not None:
            raise FastmergeError("ema and weights: both say how the models count; give one")
        if not _is_number(ema) or not 0 < ema < 1:
            raise FastmergeError(f"ema: {brief(ema)} is not a decay between 0 and 1")
        return ema_weights(float(ema), count)
    if weights is None:
        return [1.0] * count
    given = a_list(weights, "weights")
    for value in given:
        if not _is_number(value) or not math.isfinite(value):
            raise FastmergeError(f"weights: {brief(value)} is not a finite number")
    if len(given) != count:
        raise FastmergeError(f"weights: {len(given)} for {count} models; give one each")
    return [float(value) for value in given]


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, (bool, str, bytes)) and float(value) == float(value)
    except (TypeError, ValueError, OverflowError):
        return False
