"""Specs: which delta entries survive and how the survivors are merged.

The arithmetic itself (mask, weigh, elect, average, add) is one fused kernel, ``consensus``; see
csrc/ and kernels/.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastmerge.errors import RecipeError
from fastmerge.methods.shapes import Keep, Terms
from fastmerge.methods.types import Values
from fastmerge.methods.weights import at_most_one, check_divisors, column, undivided
from fastmerge.primitives import FREQUENCY, PLAIN, WEIGHTED, Agreement
from fastmerge.selection import ALL, INDEX, MAGNITUDE, MIXED, RANDOM, RANKED

_VOTES = {"weighted": WEIGHTED, "plain": PLAIN, "frequency": FREQUENCY}


def _terms(values: Values, operands: Sequence[Values], kind: int, *, elect: bool) -> Terms:
    weights, normalize = column(operands, "weight"), bool(values["normalize"])
    counted = values.get("divisor") == "count"
    votes = _VOTES[values.get("votes", "weighted")]
    if normalize and not counted:
        check_divisors(tuple(weights.tolist()), elect)
        normalize = elect or not undivided(weights)
        # Of both signs some may sum to 0, which an election counts as 1 whatever their size.
        if normalize and (not elect or not (weights.min() < 0 < weights.max())):
            weights = at_most_one(weights)
    return Terms(
        keep=tuple(_keep(values, operand, kind) for operand in operands),
        weights=tuple(weights.tolist()),
        agreement=Agreement(
            elect, normalize, float(values["lambda"]), votes=votes, counted=counted
        ),
    )


def _keep(values: Values, operand: Values, kind: int) -> Keep:
    """MAGNITUDE: the int(density * count) largest of a delta (Yadav et al. 2023, section 4.1).

    With ``gamma`` that fraction of all, the largest, is dropped before (Davari and Belilovsky 2023,
    section 3). RANDOM: each entry with probability ``density`` (Yu et al. 2023, section 3.2).
    RANKED: with a probability that rises with the entry's rank in its row, from ``density -
    epsilon`` to ``density + epsilon`` (Deep et al. 2024, section 3.1). Any may restore the delta's
    L1 norm, as in mergekit, or be divided by the density (Yu et al. 2023, equation 2).
    """
    if kind == ALL or operand["density"] >= 1:
        return Keep(ALL)
    ties = values.get("ties", "mixed")
    rescale, gamma = values["rescale"], operand.get("gamma")
    density, epsilon = operand["density"], operand.get("epsilon", 0.0)
    factor = 1.0
    if rescale == "density" and density > 0:
        factor = 1 / density
    if not density:
        epsilon = 0.0  # nothing is kept, whatever its rank
    elif kind == RANKED and not 0 < density - epsilon <= density + epsilon < 1:
        raise RecipeError(
            f"density {density:g} with epsilon {epsilon:g}: entries would be kept with chances of "
            f"{density - epsilon:g} to {density + epsilon:g}, which must lie between 0 and 1; "
            f"give an epsilon below {min(density, 1 - density):g}"
        )
    every = kind == MAGNITUDE and ties == "all"
    if every and rescale is True:
        raise RecipeError(
            "ties: all with rescale: l1: how much is kept is not counted; use ties: mixed"
        )
    order = INDEX if ties == "index" else MIXED
    return Keep(kind, density, order, rescale is True, gamma, epsilon, factor, every)


def task_arithmetic(values: Values, operands: Sequence[Values]) -> Terms:
    """out = base + lambda * sum_i w_i (x_i - base) (Ilharco et al. 2022)."""
    return _terms(values, operands, ALL, elect=False)


def ties(values: Values, operands: Sequence[Values]) -> Terms:
    """Trim, elect the sign of the weighted sum, average the entries that agree."""
    return _terms(values, operands, MAGNITUDE, elect=True)


def dare_linear(values: Values, operands: Sequence[Values]) -> Terms:
    """Drop at random, rescale, add."""
    return _terms(values, operands, RANDOM, elect=False)


def dare_ties(values: Values, operands: Sequence[Values]) -> Terms:
    """Drop at random, rescale, elect a sign, merge what agrees."""
    return _terms(values, operands, RANDOM, elect=True)


def breadcrumbs(values: Values, operands: Sequence[Values]) -> Terms:
    """Drop the largest and the smallest entries, add (Davari and Belilovsky 2023)."""
    return _terms(values, operands, MAGNITUDE, elect=False)


def breadcrumbs_ties(values: Values, operands: Sequence[Values]) -> Terms:
    """Drop the largest and the smallest entries, elect a sign, merge what agrees."""
    return _terms(values, operands, MAGNITUDE, elect=True)


def della(values: Values, operands: Sequence[Values]) -> Terms:
    """Drop at random, the smaller the likelier; rescale, elect a sign, merge what agrees (Deep et
    al. 2024).
    """
    return _terms(values, operands, RANKED, elect=True)


def della_linear(values: Values, operands: Sequence[Values]) -> Terms:
    """Drop at random, the smaller the likelier; rescale, add."""
    return _terms(values, operands, RANKED, elect=False)
