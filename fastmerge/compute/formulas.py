"""The formulas of ``_C.pointwise`` in plain NumPy, readable and slow; see `reference`.

Deltas, counts and what is kept are exact; the rest is float64, or with ``arithmetic=np.float32``
the kernels' own operations in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.compute.reference import Array, survivors, widen
from fastmerge.methods.types import Float64
from fastmerge.selection import Selection

Deltas = Sequence[Array]  # of each model, flat
_KEYS = np.uint32(0x7FFFFFFF)


def pointwise(
    formula: str,
    inputs: Sequence[Array],
    base: Array,
    numbers: Sequence[float] = (),
    *,
    selection: Selection | None = None,
    factors: Float64 | None = None,
    arithmetic: type = np.float64,
) -> Array:
    """`_C.pointwise`, of the base's shape."""
    start = widen(base).ravel()
    deltas: list[Array] = [(widen(x).ravel() - start).astype(arithmetic) for x in inputs]
    given = [arithmetic(np.float32(number)) for number in numbers]
    if formula == "near_swap":
        return _near_swap(widen(inputs[0]).ravel(), start, given[0]).reshape(base.shape)
    if factors is not None:
        each = np.repeat(factors.astype(np.float32), base.size // max(len(factors), 1))
        found = _BY_ROW[formula](deltas[0], start, given, each.astype(arithmetic))
    else:
        keep = np.ones(base.size, bool)
        if selection is not None:
            keep = survivors(selection, _variance(deltas).view(np.uint32) & _KEYS)
        found = _FORMULAS[formula](deltas, start.astype(arithmetic), given, keep)
    return np.asarray(found).reshape(base.shape)


def divergences(x: Array, base: Array, cols: int) -> Float64:
    """`_C.divergences`."""
    p, q = (_softmax(widen(t).reshape(-1, cols).astype(np.float64)) + 1e-8 for t in (x, base))
    return np.asarray((p * np.log(p / q)).sum(axis=1))


def _softmax(rows: Float64) -> Float64:
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _near_swap(x: Array, base: Array, t: Any) -> Array:
    kind = type(t)
    distance = np.maximum(np.abs(base - x).astype(kind), kind(np.float32(1e-6)))
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


def _reinforced(deltas: Deltas, base: Array, numbers: Sequence[Any], _: Array) -> Array:
    each, count = _active(deltas, numbers[0])
    kind = deltas[0].dtype.type
    among = np.maximum(count, 1).astype(kind)
    terms = []
    for delta, active, gain in zip(deltas, each, numbers[1:], strict=True):
        own = delta * active.astype(kind)
        alone, several = (count == 1).astype(kind), (count > 1).astype(kind)
        terms.append(own * alone * gain + own * several / among)
    return np.asarray(base + _summed(terms))


def _variance(deltas: Deltas) -> NDArray[np.float32]:
    mean = squares = np.zeros(deltas[0].shape)
    for models, delta in enumerate(deltas, 1):
        off = delta.astype(np.float64) - mean
        mean = mean + off / models
        squares = squares + off * (delta - mean)
    return (squares / len(deltas)).astype(np.float32)


def _select_and_erase(deltas: Deltas, base: Array, weights: Sequence[Any], keep: Array) -> Array:
    kind = deltas[0].dtype.type
    chosen = [delta * keep.astype(kind) for delta in deltas]
    # The election is fp32's, as a bit decides it.
    majority = np.where(_summed([d.astype(np.float32) for d in chosen]) >= 0, 1, -1)
    used = [w * (np.sign(d) == majority).astype(kind) for d, w in zip(chosen, weights, strict=True)]
    merged = _summed([d * u for d, u in zip(chosen, used, strict=True)])
    share = np.maximum(_summed(used), kind(np.float32(1e-6)))
    return np.asarray(base + merged / share)


def _largest(deltas: Deltas, base: Array, numbers: Sequence[Any], _: Array) -> Array:
    best = deltas[0]
    for delta in deltas[1:]:
        best = np.where(np.abs(delta) > np.abs(best), delta, best)
    return np.asarray(base + best * numbers[0])


def _agreed(deltas: Deltas, base: Array, numbers: Sequence[Any], _: Array) -> Array:
    kind = deltas[0].dtype.type
    weights, factors = numbers[2::2], numbers[3::2]
    total = _summed([d * w for d, w in zip(deltas, weights, strict=True)])
    claims = [np.abs(d) >= np.abs(total - d) * f for d, f in zip(deltas, factors, strict=True)]
    agreed = (np.sum(claims, axis=0) >= numbers[0]).astype(kind)
    return np.asarray(base + total * agreed * numbers[1])


def _fuse(delta: Array, base: Array, numbers: Sequence[Any], factors: Array) -> Array:
    kept = np.abs(delta) * factors >= numbers[0]
    return np.asarray(base.astype(delta.dtype) + delta * kept.astype(delta.dtype))


_BY_ROW: dict[str, Callable[[Array, Array, Sequence[Any], Array], Array]] = {
    "importance": lambda delta, base, numbers, factors: np.abs(delta) * factors,
    "fuse": _fuse,
}
# Of the deltas, the base, the numbers, and which entries a selection of their variances keeps.
_FORMULAS: dict[str, Callable[[Deltas, Array, Sequence[Any], Array], Array]] = {
    "zero": lambda deltas, base, numbers, keep: np.zeros_like(base),
    "active": lambda deltas, base, numbers, keep: _active(deltas, numbers[0])[1] == numbers[1],
    "reinforced": _reinforced,
    "variance": lambda deltas, base, numbers, keep: _variance(deltas),
    "varied": lambda deltas, base, numbers, keep: keep,
    "varied_delta": lambda deltas, base, numbers, keep: (
        deltas[int(numbers[0])] * keep.astype(base.dtype)
    ),
    "select_and_erase": _select_and_erase,
    "largest": _largest,
    "agreed": _agreed,
}
