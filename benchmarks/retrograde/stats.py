"""Statistics of the protocol: paired bootstrap in a seed, t across seeds, Holm over families."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval and two-sided p value (NaN where there is none)."""

    mean: float
    low: float
    high: float
    p: float = math.nan


def paired_bootstrap(ours: Floats, theirs: Floats, seed: int) -> Interval:
    """The difference of two scorings of the same items, items resampled within each skill.

    ours, theirs: shape (skills, items), 0 to 1. Returns percentage points.
    """
    difference = 100 * (ours.astype(np.float64) - theirs.astype(np.float64))
    skills, items = difference.shape
    rng = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES)
    for row in difference:
        total += row[rng.integers(0, items, (RESAMPLES, items))].mean(1)
    low, high = np.percentile(total / skills, [2.5, 97.5])
    return Interval(float(difference.mean()), float(low), float(high))


def t_tail(t: float, df: int) -> float:
    """P(T > t) for t >= 0: the density integrated by Simpson's rule after t = tan(angle) sqrt(df).

    The substitution turns the density into cos(angle)^(df - 1) on [0, pi / 2): smooth and bounded.
    """
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    angle = np.linspace(math.atan(t / math.sqrt(df)), math.pi / 2, 2001)
    weight = np.ones(2001)
    weight[1:-1:2], weight[2:-1:2] = 4, 2
    step = angle[1] - angle[0]
    return float(constant * step / 3 * np.sum(weight * np.cos(angle) ** (df - 1)))


def t_quantile(tail: float, df: int) -> float:
    """The t with P(T > t) = tail, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > tail else (low, middle)
    return low


def across_seeds(values: Sequence[float]) -> Interval:
    """Mean, 95 % t interval and two-sided p value (mean = 0) of one number per seed."""
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        raise ValueError("an interval across seeds needs at least two seeds")
    mean, error = float(sample.mean()), float(sample.std(ddof=1)) / math.sqrt(len(sample))
    df = len(sample) - 1
    half = t_quantile(0.025, df) * error
    if error == 0:  # every seed gave the same number
        return Interval(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    return Interval(mean, mean - half, mean + half, min(1.0, 2 * t_tail(abs(mean) / error, df)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment (Scandinavian Journal of Statistics 6, 1979)."""
    adjusted: dict[str, float] = {}
    floor = 0.0
    ranked = sorted(p_values.items(), key=lambda item: item[1])
    for rank, (name, p) in enumerate(ranked):
        floor = max(floor, min(1.0, (len(ranked) - rank) * p))
        adjusted[name] = floor
    return {name: adjusted[name] for name in p_values}
