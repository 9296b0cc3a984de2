"""Each rule, which works on a Gram matrix, against the method's textbook form on the weights in
float64.
"""

from __future__ import annotations

import numpy as np
import pytest

from fastmerge.errors import FastmergeError
from fastmerge.methods import METHODS, REQUIRED, find

VECTORS = np.random.default_rng(7).normal(size=(4, 301))


def defaults(name: str, **values):
    row = find(name)
    given = {p.name: p.default for p in row.parameters if not p.per_model}
    return {**given, **values}


def apply(name, x, weights=None, base=None, **values):
    """The rule's result on the weights: gram, coefficients, combination."""
    row = find(name)
    operands = [{"weight": 1.0 if weights is None else weights[i]} for i in range(len(x))]
    stack = x if base is None else np.vstack([base[None], x])
    deltas = stack.copy()
    if base is not None:
        deltas[1:] -= base
    result = row.rule(deltas @ deltas.T, defaults(name, **values), operands, base is not None)
    return result.coefficients @ stack / (1.0 if result.divisor is None else result.divisor)


def unit(v):
    return v / np.linalg.norm(v)


def slerp(a, b, t):
    angle = np.arccos(np.clip(unit(a) @ unit(b), -1, 1))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def test_linear():
    w = [0.3, 0.7, -0.2]
    np.testing.assert_allclose(
        apply("linear", VECTORS[:3], w), np.average(VECTORS[:3], axis=0, weights=w), rtol=1e-6
    )
    np.testing.assert_allclose(
        apply("linear", VECTORS[:3], w, normalize=False), np.array(w) @ VECTORS[:3], rtol=1e-12
    )


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 1.0])
def test_slerp(t):
    np.testing.assert_allclose(
        apply("slerp", VECTORS[:2], t=t), slerp(*VECTORS[:2], t), rtol=1e-12, atol=1e-13
    )
    swapped = apply("slerp", VECTORS[1::-1], t=1 - t)
    np.testing.assert_allclose(apply("slerp", VECTORS[:2], t=t), swapped, atol=1e-13)


def test_slerp_of_nearly_parallel_models_is_linear():
    a, b = VECTORS[0], VECTORS[0] + 1e-3 * VECTORS[1]
    np.testing.assert_allclose(apply("slerp", np.stack([a, b]), t=0.3), 0.7 * a + 0.3 * b)


def test_slerp_of_opposite_models_is_linear():
    a = VECTORS[0]
    np.testing.assert_allclose(apply("slerp", np.stack([a, -a]), t=0.25), 0.5 * a)


def test_slerp_with_a_zero_model_takes_a_right_angle():
    """mergekit 0.1.5: a zero vector has cosine 0, so t = 1/4 gives sin(pi/8) of the other."""
    x = np.stack([np.zeros(301), VECTORS[1]])
    np.testing.assert_allclose(apply("slerp", x, t=0.25), np.sin(np.pi / 8) * VECTORS[1])


@pytest.mark.parametrize("with_base", [False, True])
def test_nuslerp(with_base):
    a, b, base = VECTORS[:3]
    t = 0.6 / 0.8
    if with_base:
        expected = base + slerp(a - base, b - base, t)
        got = apply("nuslerp", np.stack([a, b]), [0.2, 0.6], base)
    else:
        expected = slerp(a, b, t)
        got = apply("nuslerp", np.stack([a, b]), [0.2, 0.6])
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_nuslerp_of_weights_that_cancel_is_halfway():
    np.testing.assert_allclose(
        apply("nuslerp", VECTORS[:2], [1.0, -1.0]), slerp(*VECTORS[:2], 0.5), atol=1e-12
    )


def test_nuslerp_by_row():
    """A Gram matrix for each row gives each row its own coefficients."""
    a, b = VECTORS[:2, :300].reshape(2, 3, 100)
    gram = np.einsum("irn,jrn->rij", np.stack([a, b]), np.stack([a, b]))
    rule = find("nuslerp").rule
    got = rule(gram, defaults("nuslerp"), [{"weight": 0.7}, {"weight": 0.3}], False).coefficients
    expected = np.stack([slerp(a[r], b[r], 0.3) for r in range(3)])
    np.testing.assert_allclose(got[:, :1] * a + got[:, 1:] * b, expected, atol=1e-12)


def test_nuslerp_axis():
    axis = find("nuslerp").axis
    assert axis({"nuslerp_flatten": True, "nuslerp_row_wise": False}) is None
    assert axis({"nuslerp_flatten": False, "nuslerp_row_wise": False}) == 1
    assert axis({"nuslerp_flatten": False, "nuslerp_row_wise": True}) == 0


def multislerp(x, w, eps=1e-8):
    w = np.array(w) / np.sum(w)
    norms = np.linalg.norm(x, axis=1)
    units = x / (norms[:, None] + eps)
    mean = w @ units
    mean = mean / np.linalg.norm(mean)
    tangents = units - (units @ mean)[:, None] * mean
    tau = w @ tangents
    n = np.linalg.norm(tau) + eps
    return (mean * np.cos(n) + tau * np.sin(n) / n) * (w @ norms)


@pytest.mark.parametrize("with_base", [False, True])
def test_multislerp(with_base):
    w = [0.5, 0.2, 0.3]
    base = VECTORS[3] if with_base else None
    shift = 0 if base is None else base
    np.testing.assert_allclose(
        apply("multislerp", VECTORS[:3], w, base),
        shift + multislerp(VECTORS[:3] - shift, w),
        rtol=1e-9,
        atol=1e-11,
    )


def test_multislerp_of_opposite_models():
    x = np.stack([VECTORS[0], -VECTORS[0]])
    np.testing.assert_allclose(apply("multislerp", x, [0.5, 0.5]), np.zeros(301), atol=1e-12)
    with pytest.raises(FastmergeError, match="direction of a tensor is zero"):
        apply("multislerp", np.vstack([x, np.zeros((1, 301))]), [0.5, 0.5, 0.3])


def test_multislerp_without_eps_is_a_number():
    """What eps 0 divided by 0 was NaN: of equal models, and of opposite ones."""
    x = VECTORS[0]
    np.testing.assert_allclose(apply("multislerp", np.stack([x, x]), [0.5, 0.5], eps=0.0), x)
    opposite = apply("multislerp", np.stack([x, -x]), [0.5, 0.5], eps=0.0)
    np.testing.assert_allclose(opposite, np.zeros(301), atol=1e-12)


def karcher(x, iterations=10, tol=1e-5):
    norms = np.linalg.norm(x, axis=1)
    units = x / norms[:, None]
    u = unit(units.mean(axis=0))
    for _ in range(iterations):
        cosines = np.clip(units @ u, -1, 1)
        angles = np.arccos(cosines)
        step = (angles / np.sin(angles) / len(x)) @ (units - cosines[:, None] * u)
        size = np.linalg.norm(step)
        if size < tol:
            break
        u = unit(np.cos(size) * u + np.sin(size) * step / size)
    return norms.mean() * u


def test_karcher():
    np.testing.assert_allclose(apply("karcher", VECTORS), karcher(VECTORS), rtol=1e-9, atol=1e-11)


def test_karcher_is_the_point_with_no_pull():
    """At the Karcher mean the logarithms of the inputs cancel."""
    u = unit(apply("karcher", VECTORS, max_iter=200, tol=1e-14))
    cosines = (VECTORS / np.linalg.norm(VECTORS, axis=1)[:, None]) @ u
    logs = (np.arccos(cosines) / np.sin(np.arccos(cosines))) @ (
        VECTORS / np.linalg.norm(VECTORS, axis=1)[:, None] - cosines[:, None] * u
    )
    assert np.linalg.norm(logs) < 1e-6


def test_karcher_leaves_out_zero_models_and_survives_all_zero_ones():
    x = np.vstack([VECTORS[:1], np.zeros((1, 301))])
    np.testing.assert_allclose(apply("karcher", x), VECTORS[0] / 2, atol=1e-12)
    np.testing.assert_array_equal(apply("karcher", np.zeros((2, 301))), np.zeros(301))


def model_stock(x, base):
    d = x - base
    n = len(x)
    cosines = [unit(d[i]) @ unit(d[j]) for i in range(n) for j in range(i + 1, n)]
    c = np.mean(cosines)
    t = n * c / (1 + (n - 1) * c)
    return t * x.mean(axis=0) + (1 - t) * base


@pytest.mark.parametrize("count", [2, 3])
def test_model_stock(count):
    np.testing.assert_allclose(
        apply("model_stock", VECTORS[:count], base=VECTORS[3]),
        model_stock(VECTORS[:count], VECTORS[3]),
        rtol=1e-10,
        atol=1e-12,
    )


def test_model_stock_of_opposite_deltas_is_the_base():
    """1 + (N-1) cos = 0: mergekit 0.1.5 returns the base."""
    base, d = VECTORS[0], VECTORS[1]
    np.testing.assert_allclose(
        apply("model_stock", np.stack([base + d, base - d]), base=base), base, atol=1e-9
    )


def test_linear_refuses_weights_that_sum_to_zero():
    with pytest.raises(FastmergeError, match="sum to 0"):
        apply("linear", VECTORS[:2], [1.0, -1.0])


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_complete(name):
    row = METHODS[name]
    assert row.summary and row.paper and row.name == name
    assert len({p.name for p in row.parameters}) == len(row.parameters)
    for parameter in row.parameters:
        assert parameter.doc
        if parameter.default not in (REQUIRED, None):
            assert parameter.check(parameter.default, name) == parameter.default


@pytest.mark.parametrize(
    "name, parameter, value, message",
    [
        ("ties", "density", -0.1, r"in \[0, 1\]"),
        ("ties", "density", 1.5, r"in \[0, 1\]"),
        ("ties", "weight", "much", "must be a number"),
        ("ties", "weight", float("nan"), "must be finite"),
        ("ties", "normalize", "perhaps", "true or false"),
        ("karcher", "max_iter", 2.5, "whole number"),
        ("karcher", "max_iter", 0, "at least 1"),
    ],
)
def test_parameter_bounds(name, parameter, value, message):
    with pytest.raises(FastmergeError, match=message):
        find(name).parameter(parameter).check(value, "here")


def test_unknown_method_names_the_nearest():
    with pytest.raises(FastmergeError, match="did you mean 'slerp'"):
        find("slrep")
