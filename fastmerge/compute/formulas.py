"""The formulas of ``_C.pointwise`` in plain NumPy, readable and slow; see `reference`.

Deltas, counts and what is kept are exact; the rest is float64, or with ``arithmetic=np.float32``
the kernels' own operations in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.compute.reference import Array, keys_of, survivors, widen
from fastmerge.methods.entries import Program, maximum, minimum, where
from fastmerge.methods.types import Float64
from fastmerge.selection import Selection

Deltas = Sequence[Array]  # of each model, flat


def pointwise(
    formula: str,
    inputs: Sequence[Array],
    base: Array,
    numbers: Sequence[float] = (),
    *,
    selection: Selection | None = None,
    factors: Float64 | None = None,
    arithmetic: type = np.float64,
    first: int = 0,
) -> Array:
    """`_C.pointwise`, of the base's shape; ``first``: the flat index of the first entry."""
    start = widen(base).ravel()
    kind = start.dtype.type
    deltas: list[Array] = [
        (widen(x).ravel() - start).astype(arithmetic, copy=False) for x in inputs
    ]
    given = [arithmetic(kind(number)) for number in numbers]
    if formula == "near_swap":
        made = _near_swap(widen(inputs[0]).ravel(), start, given[0], kind(1e-6))
        return made.reshape(base.shape)
    if factors is not None:
        each = np.repeat(factors.astype(kind), base.size // max(len(factors), 1))
        found = _BY_ROW[formula](deltas[0], start, given, each.astype(arithmetic))
    else:
        keep = np.ones(base.size, bool)
        if selection is not None:
            keep = survivors(selection, keys_of(_variance(deltas, kind)), first)
        found = _FORMULAS[formula](deltas, start.astype(arithmetic, copy=False), given, keep, kind)
    return np.asarray(found).reshape(base.shape)


def divergences(
    x: Array,
    base: Array,
    cols: int,
    *,
    exp: Callable[[Array], Array] = np.exp,
    log: Callable[[Array], Array] = np.log,
) -> Float64:
    """`_C.divergences`; NumPy's own functions differ between machines in the last bit."""
    p, q = (_softmax(widen(t).reshape(-1, cols).astype(np.float64), exp) + 1e-8 for t in (x, base))
    return np.asarray((p * log(p / q)).sum(axis=1))


def _softmax(rows: Float64, exp: Callable[[Array], Array]) -> Float64:
    powers = exp(rows - rows.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


_OPERATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "copy": lambda a, b, c: a,
    "add": lambda a, b, c: a + b,
    "subtract": lambda a, b, c: a - b,
    "multiply": lambda a, b, c: a * b,
    "divide": lambda a, b, c: a / b,
    "negative": lambda a, b, c: -a,
    "absolute": lambda a, b, c: np.abs(a),
    "minimum": lambda a, b, c: minimum(a, b),
    "maximum": lambda a, b, c: maximum(a, b),
    "less": lambda a, b, c: (a < b).astype(a.dtype),
    "less_equal": lambda a, b, c: (a <= b).astype(a.dtype),
    "where": lambda a, b, c: where(a, b, c),
}


def expression(program: Program, tensors: Sequence[Array]) -> Array:
    """`_C.pointwise`'s expression of the models and the base, of their own type."""
    places = dict(enumerate(tensors))
    found = tensors[0]
    for name, to, a, b, c in program.operations:
        if name == "constant":
            found = np.full_like(tensors[0], program.numbers[a])
        else:
            found = _OPERATIONS[name](places[a], places[b], places[c])
        places[to] = found
    return found


def _near_swap(x: Array, base: Array, t: Any, least: Any) -> Array:
    kind = type(t)
    distance = np.maximum(np.abs(base - x).astype(kind), kind(least))
    weight = np.minimum(np.maximum(kind(1) / distance * t, kind(0)), kind(1))
    return np.asarray(weight * x.astype(kind) + (kind(1) - weight) * base.astype(kind))


def _summed(terms: Sequence[Array]) -> Array:
    """From +0 and in order."""
    total = np.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def _active(deltas: Deltas, least: Any) -> tuple[list[NDArray[np.bool_]], NDArray[np.int64]]:
    each = [np.abs(delta) > least for delta in deltas]
    return each, np.sum(each, axis=0)


def _reinforced(
    deltas: Deltas, base: Array, numbers: Sequence[Any], _: Array, _kind: type
) -> Array:
    each, count = _active(deltas, numbers[0])
    kind = deltas[0].dtype.type
    among = np.maximum(count, 1).astype(kind)
    terms = []
    for delta, active, gain in zip(deltas, each, numbers[1:], strict=True):
        own = delta * active.astype(kind)
        alone, several = (count == 1).astype(kind), (count > 1).astype(kind)
        terms.append(own * alone * gain + own * several / among)
    return np.asarray(base + _summed(terms))


def _variance(deltas: Deltas, kind: type) -> Array:
    mean = squares = np.zeros(deltas[0].shape)
    for models, delta in enumerate(deltas, 1):
        off = delta.astype(np.float64, copy=False) - mean
        mean = mean + off / models
        squares = squares + off * (delta - mean)
    return np.asarray((squares / len(deltas)).astype(kind, copy=False))


def _select_and_erase(
    deltas: Deltas, base: Array, weights: Sequence[Any], keep: Array, of: Any
) -> Array:
    kind = deltas[0].dtype.type
    chosen = [delta * keep.astype(kind) for delta in deltas]
    # The election is of the tensors' own numbers, as a bit decides it.
    majority = np.where(_summed([d.astype(of, copy=False) for d in chosen]) >= 0, 1, -1)
    used = [w * (np.sign(d) == majority).astype(kind) for d, w in zip(chosen, weights, strict=True)]
    merged = _summed([d * u for d, u in zip(chosen, used, strict=True)])
    share = np.maximum(_summed(used), kind(of(1e-6)))
    return np.asarray(base + merged / share)


def _largest(deltas: Deltas, base: Array, numbers: Sequence[Any], _: Array, _kind: type) -> Array:
    best = deltas[0]
    for delta in deltas[1:]:
        best = np.where(np.abs(delta) > np.abs(best), delta, best)
    return np.asarray(base + best * numbers[0])


def _agreed(deltas: Deltas, base: Array, numbers: Sequence[Any], _: Array, _kind: type) -> Array:
    kind = deltas[0].dtype.type
    weights, factors = numbers[2::2], numbers[3::2]
    total = _summed([d * w for d, w in zip(deltas, weights, strict=True)])
    claims = [np.abs(d) >= np.abs(total - d) * f for d, f in zip(deltas, factors, strict=True)]
    agreed = (np.sum(claims, axis=0) >= numbers[0]).astype(kind)
    return np.asarray(base + total * agreed * numbers[1])


def _fuse(delta: Array, base: Array, numbers: Sequence[Any], factors: Array) -> Array:
    kept = np.abs(delta) * factors >= numbers[0]
    return np.asarray(base.astype(delta.dtype, copy=False) + delta * kept.astype(delta.dtype))


_BY_ROW: dict[str, Callable[[Array, Array, Sequence[Any], Array], Array]] = {
    "importance": lambda delta, base, numbers, factors: np.abs(delta) * factors,
    "fuse": _fuse,
}
# Of the deltas, the base, the numbers, which entries a selection of their variances keeps, and the
# type of the tensors' own numbers.
_FORMULAS: dict[str, Callable[[Deltas, Array, Sequence[Any], Array, Any], Array]] = {
    "zero": lambda deltas, base, numbers, keep, kind: np.zeros_like(base),
    "active": lambda deltas, base, numbers, keep, kind: (
        _active(deltas, numbers[0])[1] == numbers[1]
    ),
    "reinforced": _reinforced,
    "variance": lambda deltas, base, numbers, keep, kind: _variance(deltas, kind),
    "varied": lambda deltas, base, numbers, keep, kind: keep,
    "varied_delta": lambda deltas, base, numbers, keep, kind: (
        deltas[int(numbers[0])] * keep.astype(base.dtype)
    ),
    "select_and_erase": _select_and_erase,
    "largest": _largest,
    "agreed": _agreed,
}
