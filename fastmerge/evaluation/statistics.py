"""Intervals and tests over the items of an evaluation: percentile bootstrap, paired, and Holm.

A score is the mean over tasks of the mean over a task's parts of the mean over items; a resample
draws items within each part (Efron and Tibshirani 1993, chapter 13). A percentile interval of few
items is too narrow: under a true null, p < 0.05 came out for 50 % of pairs of 2 normal items, 16 %
of 5, 10 % of 10, 8 % of 20, 6 % of 30 and of 50. So fewer than `MIN_ITEMS`, or than
`MIN_PART_ITEMS` in any part, get none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastmerge.evaluation.scores import Scores
from fastmerge.methods.types import Float64

LEVEL = 0.95
MIN_ITEMS, MIN_PART_ITEMS = 20, 5
_BLOCK = 200_000  # resampled items held at once


class Interval(NamedTuple):
    """A value in percent with its 95 % bootstrap interval, and a two-sided p-value against 0."""

    value: float
    low: float
    high: float
    p: float = float("nan")


def interval(scores: Scores, *, resamples: int, seed: int) -> Interval | None:
    """The score's interval over items; None where a task has no scores by item, or too few, and
    where the score is NaN.
    """
    draws = _draws([scores], resamples, seed)
    if draws is None:
        return None
    low, high = _bounds(draws[0])
    return Interval(scores.value, low, high)


def difference(a: Scores, b: Scores, *, resamples: int, seed: int) -> Interval | None:
    """The interval of a - b with the same items drawn for both; None where items do not match, or
    as for `interval`.
    """
    draws = _draws([a, b], resamples, seed)
    if draws is None:
        return None
    delta = draws[0] - draws[1]
    low, high = _bounds(delta)
    below, above = np.sum(delta <= 0), np.sum(delta >= 0)
    p = min(1.0, 2.0 * (min(below, above) + 1) / (resamples + 1))
    return Interval(a.value - b.value, low, high, float(p))


def untested(a: Scores, b: Scores) -> str:
    """Why `difference` gives none, in words."""
    if not (math.isfinite(a.value) and math.isfinite(b.value)):
        return "a score is no number"
    parts = [
        None if task.items is None else {name: len(part) for name, part in task.items.items()}
        for scores in (a, b)
        for _, task in sorted(scores.tasks.items())
    ]
    if any(part is None for part in parts):
        return "there are no scores by item"
    if parts[: len(parts) // 2] != parts[len(parts) // 2 :]:
        return "the items are not the same"
    return f"that takes {MIN_ITEMS} items, and {MIN_PART_ITEMS} of each part"


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values (Holm 1979); NaN stays and does not count."""
    known = [i for i, p in enumerate(values) if not np.isnan(p)]
    adjusted = [float("nan")] * len(values)
    running = 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: values[i])):
        running = max(running, min(1.0, (len(known) - rank) * values[i]))
        adjusted[i] = running
    return adjusted


def _bounds(draws: Float64) -> tuple[float, float]:
    tail = 50.0 * (1.0 - LEVEL)
    low, high = np.percentile(draws, [tail, 100.0 - tail])
    return float(low), float(high)


def _draws(many: Sequence[Scores], resamples: int, seed: int) -> list[Float64] | None:
    """Each score resampled, float64 (resamples,), the same draws for all."""
    first = many[0]
    if any(set(scores.tasks) != set(first.tasks) for scores in many) or not first.tasks:
        return None
    if not all(math.isfinite(scores.value) for scores in many):
        return None
    totals = [np.zeros(resamples) for _ in many]
    items = 0
    for number, name in enumerate(sorted(first.tasks)):
        columns = [scores.tasks[name].items for scores in many]
        parts = columns[0]
        if parts is None or not parts:
            return None
        for part_number, part in enumerate(sorted(parts)):
            values = [np.array(column[part]) for column in columns if column and part in column]
            count = len(values[0]) if values else 0
            if len(values) < len(many) or any(len(v) != count for v in values):
                return None
            if count < MIN_PART_ITEMS or not all(np.isfinite(v).all() for v in values):
                return None
            items += count
            share = 1.0 / (len(parts) * len(first.tasks))
            rng = np.random.default_rng([seed, number, part_number])
            for total, means in zip(totals, _means(values, resamples, rng), strict=True):
                total += share * means
    return totals if items >= MIN_ITEMS else None


def _means(values: Sequence[Float64], resamples: int, rng: np.random.Generator) -> list[Float64]:
    count = len(values[0])
    step = max(1, _BLOCK // count)
    parts: list[list[Float64]] = [[] for _ in values]
    for begin in range(0, resamples, step):
        index = rng.integers(0, count, (min(step, resamples - begin), count))
        for found, column in zip(parts, values, strict=True):
            found.append(column[index].mean(axis=1))
    return [np.concatenate(found) for found in parts]
