"""The models' weights as one list: whether their sum can be divided by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np

from fastmerge.errors import RecipeError
from fastmerge.methods.types import Float64, Values

# Weights whose sum is this small beside them cancel: what is left of it in fp32 is rounding, and
# the quotient would be a hundred thousand times the inputs.
_CANCEL = 1e-5
_LEAST = 2.0**-64  # below it fp32 rounds a small one among the weights, and from 2**-149 all
_UNDIVIDED = 1e-8  # mergekit 0.1.5: deltas are not divided by a sum of all weights below it
_MOST_SUBSETS = 12  # of so many models every subset is looked at


def column(operands: Sequence[Values], name: str) -> Float64:
    """One parameter of every operand: float64 (k,)."""
    return np.array([values[name] for values in operands], dtype=np.float64)


def cancel(weights: Float64) -> bool:
    """Whether the sum of ``weights`` (k,) is 0, or next to nothing beside their sizes."""
    return bool(abs(weights.sum()) <= _CANCEL * np.abs(weights).sum())


def sum_to_zero(weights: Float64) -> str:
    """ "the weights [...] sum to 0", with what rounding leaves of it."""
    total = weights.sum()
    rest = f" but for {total:.1g}, next to nothing beside them" if total else ""
    return f"the weights {weights.tolist()} sum to 0{rest}"


def at_most_one(weights: Float64) -> Float64:
    """``weights`` times the power of two that keeps every sum of what they weigh in fp32's range
    until it is divided by theirs, and them themselves: exact, so the quotient is the same.
    """
    size = float(np.abs(weights).sum())
    if _LEAST <= size <= 1 or size == 0:
        return weights
    return np.asarray(np.ldexp(weights, -math.frexp(size)[1]))


def undivided(weights: Float64) -> bool:
    """Whether the sum of ``weights`` (k,) is 0 as fp32 adds it, and counts as 1."""
    return cancel(weights) and bool(abs(np.cumsum(weights, dtype=np.float32)[-1]) < _UNDIVIDED)


@lru_cache(maxsize=256)  # of 36 000 tensors most have the same
def check_divisors(weights: tuple[float, ...], elect: bool) -> None:
    """Raises RecipeError where deltas would be divided by a sum of ``weights`` that is rounding:
    of all of them, or with ``elect`` of any that agree on a sign. Weights that are all 0 are fine:
    they leave the base as it is.
    """
    used = np.array([weight for weight in weights if weight], dtype=np.float64)
    if not elect:
        if used.size and cancel(used) and not undivided(used):
            raise RecipeError(f"{sum_to_zero(used)}; change them or set normalize: false")
        return
    if not (used > 0).any() or not (used < 0).any():
        return
    counts = range(2, len(used) + 1) if len(used) <= _MOST_SUBSETS else [len(used)]
    for count in counts:
        for some in combinations(used, count):
            own = np.array(some)
            # What is exactly 0 counts as 1, as in mergekit 0.1.5.
            if cancel(own) and np.cumsum(own, dtype=np.float32)[-1] != 0:
                raise RecipeError(f"{sum_to_zero(own)}; change them or set normalize: false")
