"""A tree of combinations collapses: one Gram pass, one combine, and the value of the merges done
one by one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastmerge.compute.tensor import Computation
from fastmerge.methods import find
from fastmerge.tree import collapse, nodes
from fastmerge.tree.nodes import Merge
from fastmerge.tree.nodes import Stored as Source

SHAPE = (6, 50)
RNG = np.random.default_rng(11)
BASE = RNG.normal(size=SHAPE)
MODELS = [BASE + 0.2 * RNG.normal(size=SHAPE) for _ in range(3)]
A, B, C = (Source(i, "w") for i in range(3))


class Float64Backend:
    """Shape A in NumPy float64; counts the passes over the weights."""

    name = "float64"

    def __init__(self):
        self.grams = self.combines = 0

    def gram(self, inputs, base, vectors):
        axis, rows, cols = vectors.axis, vectors.rows, vectors.cols
        self.grams += 1
        x = [np.asarray(v) for v in inputs]
        x = x if base is None else [base, *(v - base for v in x)]
        stack = np.stack([v.reshape(rows, cols) for v in x])
        if axis is None:
            flat = stack.reshape(len(x), -1)
            return flat @ flat.T
        return np.einsum("irc,jrc->rij" if axis == 1 else "irc,jrc->cij", stack, stack)

    def combine(self, inputs, coefficients, out, *, divisor=None, vectors, **_):
        axis, rows, cols = vectors.axis, vectors.rows, vectors.cols
        self.combines += 1
        stack = np.stack([np.asarray(v).reshape(rows, cols) for v in inputs])
        pattern = {None: "i,irc->rc", 1: "ri,irc->rc", 0: "ci,irc->rc"}[axis]
        out.reshape(rows, cols)[:] = np.einsum(pattern, coefficients, stack) / (divisor or 1.0)
        return 0

    def is_fp32(self, _):
        return False

    def scratch(self, count):
        array = np.empty(count)
        return array, array


def merge(name, operands, base=None, per=None, **values):
    row = find(name)
    given = {p.name: values.get(p.name, p.default) for p in row.parameters if not p.per_model}
    per = per or [{} for _ in operands]
    return Merge(row, tuple(operands), base, given, tuple(per))


def weighted(name, operands, weights, base=None, **values):
    return merge(name, operands, base, [{"weight": w} for w in weights], **values)


def run(root, backend=None):
    backend = backend or Float64Backend()
    out = np.full(SHAPE, np.nan)
    outcome = Computation(backend, lambda s: MODELS[s.model], "w", SHAPE).run(root, out)
    return out, outcome, backend


def one_by_one(root):
    """Every merge of the tree on its own, its result an input of the next."""
    made = {s: MODELS[s.model] for s in (A, B, C)}
    for node in nodes.walk(root):
        if isinstance(node, Merge):
            local = Merge(
                node.method,
                tuple(Source(i, "") for i in range(len(node.operands))),
                None if node.base is None else Source(len(node.operands), ""),
                node.values,
                node.operand_values,
            )
            inputs = [*(made[n] for n in node.operands), *([made[node.base]] if node.base else [])]
            out = np.empty(SHAPE)
            Computation(Float64Backend(), lambda s, i=inputs: i[s.model], "w", SHAPE).run(
                local, out
            )
            made[node] = out
    return made[root]


def slerp_walk(steps):
    state = A
    for step in range(steps):
        state = merge("slerp", [state, (B, A, C)[step % 3]], t=0.35 if step % 2 == 0 else 0.6)
    return state


TREES = {
    "slerp chain": slerp_walk(10),
    "linear over slerp": weighted("linear", [slerp_walk(2), B, C], [0.5, 0.2, 0.3]),
    "nuslerp of deltas": weighted("nuslerp", [slerp_walk(3), C], [0.4, 0.6], base=A),
    "karcher of merges": merge("karcher", [slerp_walk(2), weighted("linear", [A, C], [1, 2]), B]),
    "multislerp": weighted("multislerp", [slerp_walk(1), B, C], [0.2, 0.5, 0.3], base=A),
    "model stock": merge("model_stock", [slerp_walk(1), C], base=A),
    "moving base": merge("model_stock", [B, C], base=slerp_walk(2)),
    "passthrough": merge("passthrough", [slerp_walk(1)], per=[{"scale": 0.5}]),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_collapses_to_the_same_value_in_two_passes(tree):
    got, outcome, backend = run(tree)
    np.testing.assert_allclose(got, one_by_one(tree), rtol=1e-9, atol=1e-11)
    assert (backend.grams, backend.combines) == (1, 1)
    total = sum(c * MODELS[s.model] for s, c in outcome.coefficients.items())
    np.testing.assert_allclose(total, got, rtol=1e-12)


def test_linear_chain_needs_no_gram_pass():
    chain = weighted("linear", [weighted("linear", [A, B], [1, 3]), C], [0.5, 0.5])
    got, outcome, backend = run(chain)
    assert (backend.grams, backend.combines) == (0, 1)
    assert outcome.coefficients == pytest.approx({A: 0.125, B: 0.375, C: 0.5})
    np.testing.assert_allclose(got, one_by_one(chain))


def test_shared_step_is_seen_once():
    step = slerp_walk(1)
    tree = merge("slerp", [step, weighted("linear", [step, C], [1, 1])], t=0.5)
    got, _, backend = run(tree)
    np.testing.assert_allclose(got, one_by_one(tree), rtol=1e-9)
    assert (backend.grams, backend.combines) == (1, 1)


def test_vectors_along_rows_collapse_with_their_own_coefficients():
    rows = {"nuslerp_flatten": False}
    tree = weighted("nuslerp", [weighted("nuslerp", [A, B], [1, 1], **rows), C], [0.3, 0.7], **rows)
    got, outcome, backend = run(tree)
    np.testing.assert_allclose(got, one_by_one(tree), rtol=1e-9, atol=1e-12)
    assert (backend.grams, backend.combines) == (1, 1) and outcome.coefficients is None


def test_another_axis_is_computed_first():
    columns = weighted("nuslerp", [A, B], [1, 1], nuslerp_flatten=False, nuslerp_row_wise=True)
    tree = merge("slerp", [columns, C], t=0.25)
    collapsed = collapse.collapse(tree)
    assert collapsed.parts == (columns, C) and not collapsed.is_complete
    got, outcome, backend = run(tree)
    np.testing.assert_allclose(got, one_by_one(tree), rtol=1e-9, atol=1e-12)
    assert (backend.grams, backend.combines) == (2, 2) and outcome.coefficients is None


def test_delta_basis_keeps_a_small_delta():
    """|delta| = 1e-7 |x|: the plain Gram matrix has lost its angle, [base, deltas] has not."""
    deltas = 1e-7 * RNG.normal(size=(2, BASE.size))
    tree = collapse.collapse(weighted("nuslerp", [B, C], [0.3, 0.7], base=A))
    assert tree.reference == tree.parts.index(A)
    stack = np.vstack([BASE.reshape(1, -1), deltas])
    got = collapse.coefficients(tree, stack @ stack.T)
    units = deltas / np.linalg.norm(deltas, axis=1)[:, None]
    angle = np.arccos(units[0] @ units[1])
    arc = np.sin(np.array([0.3, 0.7]) * angle) / np.sin(angle)
    np.testing.assert_allclose(got, [1 - arc.sum(), *arc], rtol=1e-9)


@pytest.mark.parametrize("reference", [None, 0, 1])
@pytest.mark.parametrize("based", [False, True])
def test_the_coefficients_are_the_same_over_any_gram_matrix(reference, based):
    """A walk has its sources' over [x_0, deltas], whatever basis the rule of one merge takes."""
    tree = (
        weighted("nuslerp", [B, C], [0.3, 0.7], base=A) if based else merge("slerp", [A, B], t=0.4)
    )
    collapsed = collapse.collapse(tree)
    xs = [MODELS[source.model].reshape(-1) for source in collapsed.parts]
    own = collapse.coefficients(collapsed, _gram_over(xs, collapsed.reference))
    other = replace(collapsed, reference=reference)
    got = collapse.coefficients(other, _gram_over(xs, reference))
    np.testing.assert_allclose(got, own, rtol=1e-9)


def _gram_over(xs, reference):
    if reference is not None:
        first = xs[reference]
        xs = [first, *(x - first for i, x in enumerate(xs) if i != reference)]
    stack = np.stack(xs)
    return stack @ stack.T


def test_a_thousand_steps_do_not_exhaust_the_stack():
    got, _, backend = run(slerp_walk(1000))
    assert np.isfinite(got).all() and (backend.grams, backend.combines) == (1, 1)


def test_leaves_are_distinct_and_in_order():
    assert nodes.leaves([slerp_walk(3), Source(0, "w"), Source(2, "w")]) == [A, B, C]
