"""The algebra of merges: a tree of combinations is again one combination of its source tensors.

One output tensor is described by a tree of `Merge` nodes over leaves. As long as every
node is a combination (linear, SLERP, Karcher, ...), the tensor equals ``sum_i c_i x_i`` over the
leaves, and the ``c_i`` follow from the leaves' own Gram matrix G = <x_i, x_j>: if A maps leaf
vectors to a node's operands, the operands' Gram matrix is A G A^T. So a chain of N merges needs one
Gram pass, one combine pass and one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastmerge.methods import METHODS
from fastmerge.methods.shapes import Combination, Factors
from fastmerge.methods.types import Float64
from fastmerge.once import cached_property
from fastmerge.records import record
from fastmerge.tree.nodes import Leaf, Merge, Node
from fastmerge.tree.rewrite import fold


@record()
class Collapsed:
    """A tree as one combination of ``parts``: sources, and merges to be computed first."""

    root: Merge
    parts: tuple[Node, ...]
    axis: int | None
    needs_gram: bool
    # The part that deltas are taken to, where that keeps the Gram matrix exact.
    reference: int | None

    @property
    def is_measured(self) -> bool:
        """Whether the coefficients follow from inner products, to be read or read before."""
        return self.needs_gram or self.root.values == _MEASURED

    @cached_property
    def is_own(self) -> bool:
        """Whether the parts' Gram matrix is the root's rule's own: no other rule is in the tree."""
        own = None if self.root.base is None else 0  # what the rule takes it over
        return (self.parts, self.reference) == (self.root.inputs, own)

    @property
    def is_complete(self) -> bool:
        """Whether every part is a source, so that no intermediate tensor is needed."""
        return all(isinstance(part, Leaf) for part in self.parts)


def collapse(root: Merge) -> Collapsed:
    """The largest combination at the top of a tree.

    Merges below that are no combinations, or that take their vectors along another axis, are parts.
    """
    if root.is_flat and isinstance(root.method, Combination):
        return _alone(root, root.method.needs_gram)
    axis: int | None = None
    gram = False
    based: Node | None = None
    parts: dict[Node, None] = {}
    seen: set[Node] = {root}
    stack: list[Node] = [root]
    depth_one = True
    while stack:
        node = stack.pop()
        if isinstance(node, Merge) and isinstance(node.method, Combination):
            reads = node.method.needs_gram
            if not (gram and reads and node.axis != axis):
                if reads and not gram:
                    gram, axis = True, node.axis
                based = based or node.base
                depth_one = depth_one and node is root
                fresh = [child for child in dict.fromkeys(node.inputs) if child not in seen]
                seen.update(fresh)
                stack.extend(reversed(fresh))
                continue
        parts[node] = None
    order = tuple(parts)
    # A delta of norm 1e-5 |x| loses 10 of fp64's 16 digits in <x_i, x_j>; over [base, deltas] it
    # loses none.
    reference: int | None = None
    if len(order) == 1:
        pass  # x_0 alone: no deltas
    elif gram and based in parts:
        reference = order.index(based)
    elif gram and not depth_one:
        reference = 0
    return Collapsed(root, order, axis, gram, reference)


def _alone(root: Merge, gram: bool) -> Collapsed:
    """What `collapse` finds of a combination of leaves."""
    parts = tuple(dict.fromkeys(root.inputs))
    based = gram and root.base is not None and len(parts) > 1
    return Collapsed(root, parts, root.axis if gram else None, gram, 0 if based else None)


def coefficients(tree: Collapsed, gram: Float64 | None) -> Float64:
    """The coefficients of a collapsed tree over its parts: float64, shape (n,) or (vectors, n).

    ``gram`` holds the parts' inner products, shape (n, n) or (vectors, n, n): of the parts
    themselves, or with a ``reference`` r of [x_r, x_i - x_r for i != r in order]. None when no rule
    in the tree reads it.
    """
    root = tree.root
    if gram is not None and tree.is_own and _is_finite(gram):  # what follows multiplies by ones
        return apply_rule(root, gram).weights
    count = len(tree.parts)
    basis = np.eye(count) if tree.reference is None else _delta_basis(count, tree.reference)
    units: dict[Node, Float64] = dict(zip(tree.parts, np.eye(count), strict=True))

    def vector(node: Node, inputs: Sequence[Float64]) -> Float64:
        assert isinstance(node, Merge)  # leaves are parts
        return _merge_vector(node, inputs, basis, gram)

    return fold(tree.root, vector, units)


def coefficients_of_one(tree: Collapsed, gram: list[list[float]]) -> Sequence[float]:
    """`coefficients` of one matrix, in Python's numbers where the rule has them for it."""
    rule = combination(tree.root).of_one if tree.is_own and tree.reference is None else None
    if rule is not None and math.isfinite(sum(map(sum, gram))):
        return rule(gram, tree.root.values)
    numbers: list[float] = coefficients(tree, np.array(gram)).tolist()
    return numbers


def _is_finite(gram: Float64) -> bool:
    if gram.ndim == 2:  # NumPy's sum takes 2 us of a call
        return math.isfinite(sum(map(sum, gram.tolist())))
    return math.isfinite(gram.sum())


def _delta_basis(count: int, reference: int) -> Float64:
    """Rows: sources; columns: their coordinates over [x_r, x_i - x_r ...]."""
    others = [i for i in range(count) if i != reference]
    basis = np.zeros((count, count))
    basis[:, 0] = 1.0
    for column, i in enumerate(others, start=1):
        basis[i, column] = 1.0
    return basis


def _merge_vector(
    node: Merge, inputs: Sequence[Float64], basis: Float64, gram: Float64 | None
) -> Float64:
    operands = np.stack(np.broadcast_arrays(*inputs), axis=-2)  # (..., m, n)
    local: Float64 | None = None
    if combination(node).needs_gram:
        if gram is None:
            raise ValueError(f"{node.method.name} needs the Gram matrix")
        rows = operands.copy()
        if node.base is not None:
            rows[..., 1:, :] -= rows[..., :1, :]
        rows = rows @ basis
        with np.errstate(invalid="ignore", over="ignore"):  # infinite weights: counted when written
            local = rows @ gram @ np.swapaxes(rows, -1, -2)
    weights = apply_rule(node, local).weights
    return np.asarray((weights[..., None, :] @ operands)[..., 0, :], dtype=np.float64)


def apply_rule(node: Merge, gram: Float64 | None) -> Factors:
    """The rule of one combination node over its own inputs' Gram matrix, float64 (m, m), or a stack
    of them, (vectors, m, m); None where it reads none. Raises RecipeError for parameters that have
    no answer.
    """
    has_base = node.base is not None
    return combination(node).factors(gram, node.values, node.operand_values, has_base)


def combination(node: Merge) -> Combination:
    """The node's method; ValueError where it is of another shape."""
    if not isinstance(node.method, Combination):
        raise ValueError(f"{node.method.name} is not a combination")
    return node.method


AS_THEY_ARE: Mapping[str, Any] = {"normalize": False}  # linear: weights not divided by their sum
_MEASURED: Mapping[str, Any] = {**AS_THEY_ARE, "measured": True}


def weighted_sum(
    parts: Sequence[Node], weights: Iterable[float], *, measured: bool = False
) -> Merge:
    """One linear merge with these weights as they are; ``measured``: they were found from inner
    products, and the sum has the bits of the merge that they were found for.
    """
    each = tuple({"weight": float(weight)} for weight in weights)
    return Merge(
        METHODS["linear"], tuple(parts), None, _MEASURED if measured else AS_THEY_ARE, each
    )
