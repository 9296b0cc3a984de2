"""Rules: from a Gram matrix to the coefficients of a linear combination, in float64.

Each rule follows mergekit 0.1.5's definition of the method; what mergekit does on whole weights
happens here on k x k matrices. Gram matrices may carry a leading axis of vectors (rows or columns);
results then do too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastmerge.errors import RecipeError
from fastmerge.methods.shapes import Factors
from fastmerge.methods.types import Float64, Values
from fastmerge.methods.weights import at_most_one, cancel, column, sum_to_zero

_STALLED = 32  # steps without a shorter one: karcher's angles are rounded to 1e-8
NORM_EPS = 1e-8  # slerp: a norm up to this counts as 1
LERP_ABOVE = 0.9995  # slerp: |cosine| above this interpolates linearly
LEAST_NORM, LEAST_SINE_SQUARED = 1e-7, 1e-16  # nuslerp: norms are at least so, flat up to this


def _present(gram: Float64 | None) -> Float64:
    if gram is None:
        raise ValueError("this rule reads the Gram matrix")
    return gram


def _with_base(delta: Float64, has_base: bool) -> Float64:
    """Coefficients over deltas as coefficients over [base, x_1 ... x_k]: the base takes 1 - sum."""
    if not has_base:
        return delta
    return np.concatenate([1.0 - delta.sum(axis=-1, keepdims=True), delta], axis=-1)


def _length(vector: Float64, gram: Float64) -> float:
    """The norm of a combination of the models; rounding may leave a tiny negative square."""
    return math.sqrt(max(float(vector @ gram @ vector), 0.0))


def _ratio(top: Float64, bottom: Float64) -> Float64:
    return np.asarray(np.divide(top, bottom, out=np.zeros_like(top), where=bottom != 0))


def linear(
    gram: Float64 | None, values: Values, operands: Sequence[Values], has_base: bool
) -> Factors:
    """out = sum_i w_i x_i, over sum_i w_i when ``normalize`` (Wortsman et al. 2022)."""
    return _linear(tuple(float(own["weight"]) for own in operands), bool(values["normalize"]))


@lru_cache(maxsize=256)  # of 90 000 tensors most have the same
def _linear(given: tuple[float, ...], normalize: bool) -> Factors:
    weights = np.array(given, dtype=np.float64)
    weights.flags.writeable = False  # shared by all that ask
    if not normalize:
        return Factors(weights)
    if cancel(weights):
        raise RecipeError(f"linear: {sum_to_zero(weights)}; change them or set normalize: false")
    weights = at_most_one(weights)
    total = np.float32(0)
    for weight in weights:  # fp32 and in order, as the kernel's accumulation
        total += np.float32(weight)
    return Factors(weights, float(total))


def passthrough(
    gram: Float64 | None, values: Values, operands: Sequence[Values], has_base: bool
) -> Factors:
    """out = scale * x."""
    scale = operands[0].get("scale")
    return Factors(np.array([1.0 if scale is None else scale], dtype=np.float64))


def slerp(
    gram: Float64 | None, values: Values, operands: Sequence[Values], has_base: bool
) -> Factors:
    """out = sin((1-t)a)/sin(a) x_0 + sin(ta)/sin(a) x_1, a the angle between them (Shoemake 1985).

    Norms up to 1e-8 count as 1, and |cos a| > 0.9995 interpolates linearly, as in mergekit 0.1.5.
    """
    g, t = _present(gram), float(values["t"])
    if t in (0, 1):  # the other model's numbers do not matter, NaN and Inf included
        return Factors(_alone(g, int(t)))
    if g.ndim == 2:
        return Factors(np.array(slerp_of_one(g.tolist(), values)))
    norms = np.sqrt(np.diagonal(g, axis1=-2, axis2=-1))
    cosine = _cosine(g, np.where(norms > NORM_EPS, norms, 1.0))
    return Factors(_arc(cosine, t, np.abs(cosine) > LERP_ABOVE))


def _cosine(g: Float64, norms: Float64) -> Float64:
    """Of the angle between two vectors of these norms; ``g``: (..., 2, 2)."""
    return np.asarray(np.clip(g[..., 0, 1] / (norms[..., 0] * norms[..., 1]), -1.0, 1.0))


def slerp_of_one(gram: Sequence[Sequence[float]], values: Values) -> tuple[float, float]:
    """`slerp` in Python's numbers: for one matrix, NumPy's take 60 us to these 0.5."""
    t = float(values["t"])
    first, second = math.sqrt(gram[0][0]), math.sqrt(gram[1][1])
    first = first if first > NORM_EPS else 1.0
    second = second if second > NORM_EPS else 1.0
    cosine = min(max(gram[0][1] / (first * second), -1.0), 1.0)
    if abs(cosine) > LERP_ABOVE:
        return 1.0 - t, t
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine


def _alone(gram: Float64, which: int) -> Float64:
    """Coefficients that take one input as it is."""
    return np.broadcast_to(np.eye(gram.shape[-1])[which], gram.shape[:-1]).copy()


def _arc(cosine: Float64, t: float, flat: NDArray[np.bool_]) -> Float64:
    """The two coefficients of a spherical interpolation; linear where ``flat``. Shape (..., 2)."""
    angle = np.arccos(np.where(flat, 0.0, cosine))
    sine = np.sin(angle)
    first = np.where(flat, 1.0 - t, np.sin((1.0 - t) * angle) / sine)
    second = np.where(flat, t, np.sin(t * angle) / sine)
    return np.stack([first, second], axis=-1)


def nuslerp(
    gram: Float64 | None, values: Values, operands: Sequence[Values], has_base: bool
) -> Factors:
    """SLERP at t = w_1 / (w_0 + w_1), of the models or of their deltas to a base; whole or by
    vector.

    t = 0.5 when |w_0 + w_1| < 1e-6; norms are at least 1e-7; linear where 1 - cos^2 <= 1e-16
    (mergekit 0.1.5).
    """
    g = _present(gram)
    w = column(operands, "weight")
    if 0 in w and w.any():
        return Factors(_alone(g, int(has_base) + int(w[0] == 0)))
    g = g[..., int(has_base) :, int(has_base) :]
    if abs(w.sum()) >= 1e-6 and cancel(w):
        raise RecipeError(f"nuslerp: {sum_to_zero(w)}; change them")
    t = float(w[1] / w.sum()) if abs(w.sum()) >= 1e-6 else 0.5
    if not -1 <= t <= 2:  # slerp's bounds
        raise RecipeError(
            f"nuslerp: the weights {w.tolist()} are t = {t:.4g}, and t must be in [-1, 2]; change "
            "them"
        )
    norms = np.sqrt(np.diagonal(g, axis1=-2, axis2=-1))
    cosine = _cosine(g, np.maximum(norms, LEAST_NORM))
    return Factors(_with_base(_arc(cosine, t, 1.0 - cosine**2 <= LEAST_SINE_SQUARED), has_base))


def nuslerp_axis(values: Values) -> int | None:
    """Whole tensor when flattened; else vectors along the last axis, or the first when row-wise."""
    if values["nuslerp_flatten"]:
        return None
    return 0 if values["nuslerp_row_wise"] else 1


def multislerp(
    gram: Float64 | None, values: Values, operands: Sequence[Values], has_base: bool
) -> Factors:
    """Weighted mean in the tangent space at the normalised mean of the unit vectors, scaled to the
    mean norm.

    u_i = x_i / (|x_i| + eps), m = sum w_i u_i / |.|, tau = sum w_i (u_i - <u_i, m> m), n = |tau| +
    eps, out = (m cos n + tau sin n / n) * sum w_i |x_i| (mergekit 0.1.5).
    """
    g = _present(gram)[int(has_base) :, int(has_base) :]
    count = len(g)
    if count == 1:
        return Factors(np.array([0.0, 1.0] if has_base else [1.0]))
    eps = float(values["eps"])
    w = column(operands, "weight")
    if values["normalize_weights"]:
        if cancel(w):
            raise RecipeError(
                f"multislerp: {sum_to_zero(w)}; change them or set normalize_weights: false"
            )
        w = w / w.sum()
    if np.count_nonzero(w) == 1:  # no mean of directions: the model, or its delta, times |w|
        return Factors(_with_base(np.abs(w) * np.cos(eps), has_base))
    # A model of weight 0 has no say, whatever its numbers are.
    g = np.where((w[:, None] == 0) | (w == 0), 0.0, g)
    norms = np.sqrt(np.diagonal(g))
    if not norms.any():  # nothing but zeros, or all equal to the base: no direction is needed
        return Factors(np.array([1.0, *np.zeros(count)]) if has_base else w)
    # Row i: u_i over the x. A zero delta has no direction: 1 / eps would be a coefficient of 1e8
    # that the base's must cancel, and fp32 cannot.
    units = np.diag(np.divide(1.0, norms + eps, out=np.zeros(count), where=norms > 0))
    mean = w @ units
    length = _length(mean, g)
    if length < eps or length == 0:
        if np.count_nonzero(w) != 2:
            raise RecipeError(
                "multislerp: the weighted mean direction of a tensor is zero (opposite models); "
                "change the weights"
            )
        return Factors(_with_base(w, has_base))
    mean = mean / length
    tangents = units - np.outer(units @ g @ mean, mean)
    tau = w @ tangents
    n = _length(tau, g) + eps
    slope = np.sin(n) / n if n else 1.0  # of equal directions, where eps is 0
    delta = (mean * np.cos(n) + tau * slope) * float(w @ norms)
    return Factors(_with_base(delta, has_base))


def karcher(
    gram: Float64 | None, values: Values, operands: Sequence[Values], has_base: bool
) -> Factors:
    """The point on the sphere with the least squared geodesic distance, scaled to the mean norm.

    u <- exp_u(sum_i a_i log_u(u_i)), equal a_i, from the normalised mean, until the step is below
    ``tol`` (Grove and Karcher 1973). Models with norm <= tol are left out of the direction, and
    models opposite to u do not move it, as in mergekit 0.1.5. Where all are, the result is their
    mean (mergekit's is 0).
    """
    g, tol = _present(gram), float(values["tol"])
    count = len(g)
    norms = np.sqrt(np.diagonal(g))
    alive = np.flatnonzero(norms > tol)
    if alive.size == 0:
        return Factors(np.full(count, 1.0 / count))
    units = np.zeros((alive.size, count))
    units[np.arange(alive.size), alive] = 1.0 / norms[alive]
    alpha = 1.0 / alive.size

    mean = alpha * units.sum(axis=0)
    size = _length(mean, g)
    point = units[0] if size < tol or size == 0 else mean / size
    shortest, stalled = math.inf, 0
    for _ in range(int(values["max_iter"])):
        step = np.zeros(count)
        for unit in units:
            cosine = float(np.clip(point @ g @ unit, -1.0, 1.0))
            angle = np.arccos(cosine)
            tangent = unit - cosine * point
            size = _length(tangent, g)
            # Opposite vectors (every pair of numbers with other signs is one) have no direction
            # between them: what is left of the tangent, about 1e-8, is rounding.
            if angle >= tol and size > 1e-6:
                step += alpha * angle / size * tangent
        size = _length(step, g)
        stalled = 0 if size < shortest else stalled + 1
        shortest = min(size, shortest)
        if size < tol or size == 0 or stalled == _STALLED:
            break
        point = np.cos(size) * point + np.sin(size) * step / size
        size = _length(point, g)
        if size > 0:
            point = point / size
    return Factors(point * float(norms.mean()))


def geometric_median(
    gram: Float64 | None, values: Values, operands: Sequence[Values], has_base: bool
) -> Factors:
    """The point with the least weighted sum of distances, by Weiszfeld's steps from the mean:
    y <- sum_i c_i x_i, c_i = w_i / |x_i - y| over their sum, until y moves by ``tol`` of the
    models' spread (Weiszfeld 1937; smoothed as by Pillutla et al. 2022, arXiv:1912.13445).
    """
    g = _present(gram)
    w = column(operands, "weight")
    if cancel(w) or w.min() < 0:
        raise RecipeError(
            f"geometric_median: the weights {w.tolist()} must not be negative, nor all 0"
        )
    share = w / w.sum()
    spread = math.sqrt(max(float(share @ np.diagonal(g) - share @ g @ share), 0.0))
    if spread == 0:
        return Factors(share)
    point = share
    for _ in range(int(values["max_iter"])):
        off = np.diagonal(g) - 2.0 * (g @ point) + point @ g @ point
        # A model at the point itself would have all the weight of an infinity.
        distance = np.maximum(np.sqrt(np.maximum(off, 0.0)), 1e-6 * spread)
        step = share / distance
        step /= step.sum()
        moved, point = _length(step - point, g), step
        if moved <= float(values["tol"]) * spread:
            break
    return Factors(point)


def model_stock(
    gram: Float64 | None, values: Values, operands: Sequence[Values], has_base: bool
) -> Factors:
    """out = r mean(x) + (1 - r) base, r = N c / (1 + (N - 1) c), c the mean cosine between deltas.

    Jang et al. 2024, eq. 2; r = 0 where |1 + (N-1) c| < 1e-6 (mergekit 0.1.5). One r per row when
    filter_wise.
    """
    g = _present(gram)[..., 1:, 1:]
    count = g.shape[-1]
    norms = np.sqrt(np.diagonal(g, axis1=-2, axis2=-1))
    first, second = np.triu_indices(count, 1)
    cosines = g[..., first, second] / np.maximum(norms[..., first] * norms[..., second], 1e-6)
    cosine = np.clip(cosines, -1.0, 1.0).mean(axis=-1)
    bottom = 1.0 + (count - 1) * cosine
    safe = np.where(np.abs(bottom) < 1e-6, 0.0, bottom)
    ratio = _ratio(np.asarray(count * cosine), np.asarray(safe))
    share = np.repeat((ratio / count)[..., None], count, axis=-1)
    return Factors(_with_base(share, True))


def model_stock_axis(values: Values) -> int | None:
    """Rows when filter_wise, else the whole tensor."""
    return 1 if values["filter_wise"] else None
