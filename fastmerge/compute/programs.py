"""Merges as programs of C++ alone: what calls of `fastmerge.ops` repeat on tensors like each other.

A `Computation` of small tensors is mostly Python between two kernels: 5 us of a linear merge, 15 of
TIES, whose kernels take 1 and 4. What does not depend on the tensors' numbers is said here once; of
what does, Python has the rules that make coefficients of inner products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastmerge import _C
from fastmerge.compute.tensor import Step, is_wide, named, sums_wide
from fastmerge.errors import FastmergeError
from fastmerge.methods import Consensus
from fastmerge.selection import RANKED
from fastmerge.tree.collapse import Collapsed, coefficients_of_one
from fastmerge.tree.nodes import Node, Stored


def program_of(
    order: Sequence[Step], name: str, shape: tuple[int, ...], *, count: int, to_fp32: bool
) -> _C.Program | None:
    """The program of a tree that these are the steps of, whose leaves' models are the places of a
    call's ``count`` tensors, or one more, the zeros that deltas have for a base; None where more is
    to do than one sum or one vote, or an error to raise. ``to_fp32``: what the output is; the
    inputs are as well.
    """
    if len(order) != 1:
        return None
    try:
        if order[0].tree is not None:
            return _sum(order[0], order[0].tree, name, count, to_fp32)
        if isinstance(order[0].node.method, Consensus):
            return _vote(order[0], name, shape)
    except FastmergeError:
        return None  # the computation's to raise, where no tensor is refused before
    return None


def _places(parts: Sequence[Node | None]) -> list[int] | None:
    """Of the tensors in the call."""
    if any(type(part) is not Stored for part in parts):
        return None
    return [part.model for part in parts if isinstance(part, Stored)]


def _sum(step: Step, tree: Collapsed, name: str, count: int, to_fp32: bool) -> _C.Program | None:
    places = _places(tree.parts)
    if places is None or tree.axis is not None or any(place >= count for place in places):
        return None
    if step.fixed is None:
        rule = partial(_measured, tree, name, to_fp32)
        return _C.Sum(places, rule=rule, reference=tree.reference)
    factors, divisor = step.fixed
    if factors.ndim > 1 or is_wide(tree, factors, to_fp32):
        return None
    return _C.Sum(places, factors.tolist(), divisor=divisor)


def _measured(
    tree: Collapsed, name: str, to_fp32: bool, gram: list[list[float]]
) -> tuple[Sequence[float], bool]:
    """The coefficients of this Gram matrix, and whether they are summed in float64."""
    try:
        numbers = coefficients_of_one(tree, gram)
    except FastmergeError as error:
        raise named(error, name) from None
    return numbers, sums_wide(tree, numbers, to_fp32)


def _vote(step: Step, name: str, shape: tuple[int, ...]) -> _C.Program | None:
    terms = step.terms
    wanted = step.requests(name, shape)
    if (
        _places((*step.node.operands, step.node.base)) != list(range(len(wanted) + 1))
        or step.spans is not None
        or not all(terms.weights)
        or any(spec.kind == RANKED for spec in wanted)
    ):
        return None
    factors = [keep.factor for keep in terms.keep]
    return _C.Vote(wanted, terms.weights, factors, **vars(terms.agreement))
