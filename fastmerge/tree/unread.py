"""What a tree need not read: a model of weight 0, the far end of a ``t`` that is 0 or 1, and all
but one of equal tensors.

People write 0 for "not this model, here", and its numbers are then never asked for: their NaN has
no effect, and their bytes are not read. Tensors that training left alone come out as their bytes,
-inf, -0.0 and what rounding would touch included.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import replace

import numpy as np

from fastmerge.methods import Combination, Consensus, Pointwise
from fastmerge.tree.collapse import apply_rule
from fastmerge.tree.nodes import Merge, Node, walk
from fastmerge.tree.rewrite import fold


def without_unread(root: Node, known: MutableMapping[Node, Node] | None = None) -> Node:
    """The tree that gives the same numbers and reads no more than them; itself where it is that.

    ``known`` holds the results for nodes that several trees share.
    """
    if isinstance(root, Merge) and root.is_flat:
        return _reduced(root)  # what most of 36 000 tensors are, and every call of ops: no walk

    def step(node: Node, inputs: Sequence[Node]) -> Node:
        if not isinstance(node, Merge):
            return node
        if any(new is not old for new, old in zip(inputs, node.inputs, strict=True)):
            base, operands = node.parted(inputs)
            node = replace(node, operands=operands, base=base)
        return _reduced(node)

    return fold(root, step, known)


def keeps_equal(root: Node) -> bool:
    """Whether tensors that are equal in all inputs come out as they are, but for rounding: of every
    mean and of everything that is added to a base, but not of sums and scaled copies.
    """
    return all(_keeps_equal(node) for node in walk(root) if isinstance(node, Merge))


def _keeps_equal(node: Merge) -> bool:
    if isinstance(node.method, (Consensus, Pointwise)):
        return True
    if not isinstance(node.method, Combination):
        return False
    gram = np.ones((len(node.inputs),) * 2)
    if node.base is not None:  # [base, deltas], which are 0
        gram[1:], gram[:, 1:] = 0, 0
    factors = apply_rule(node, gram)
    if factors.divisor is not None:  # the coefficients' own sum
        return True
    size = np.abs(factors.coefficients).sum()
    return bool(abs(factors.coefficients.sum() - 1.0) <= 1e-9 * size)


def _reduced(node: Merge) -> Node:
    used, method = _used(node), node.method
    if isinstance(method, Consensus) and node.values.get("lambda") == 0:
        terms = method.spec(node.values, node.operand_values)
        used = used if terms.agreement.scale else []  # the base alone
    if isinstance(method, Pointwise) and node.values.get(method.gain or "") == 0:
        used = []
    if len(used) == len(node.operands):
        return node
    if isinstance(method, Consensus):
        if method.spanning(node.values, node.operand_values) is not None:
            return node  # its deltas count where the model is trimmed, whatever they weigh
        return node.base if not used and node.base is not None else _of(node, used)
    if isinstance(method, Pointwise) and node.base is not None:
        return _of(node, used) if used else node.base
    if not isinstance(method, Combination) or not used:
        return node
    # Of several, coefficients are 0 by chance: weights of 1 and -1, of vectors of equal length.
    single = _single(node) if len(used) == 1 else None
    if single is not None:
        return single
    return _of(node, used) if len(used) >= max(2, method.min_operands) else node


def _used(node: Merge) -> list[int]:
    """The operands whose numbers count."""
    for parameter in node.method.parameters:
        if parameter.fraction and node.values.get(parameter.name) in (0, 1):
            return [int(node.values[parameter.name])]
    return [i for i, own in enumerate(node.operand_values) if own.get("weight") != 0]


def _single(node: Merge) -> Node | None:
    """The one input that a combination then takes as it is, if it does."""
    inputs = node.inputs
    factors = apply_rule(node, np.eye(len(inputs))).weights
    chosen = np.flatnonzero(factors)
    return inputs[chosen[0]] if len(chosen) == 1 and factors[chosen[0]] == 1 else None


def _of(node: Merge, used: Sequence[int]) -> Merge:
    """The same merge of some of its operands, which keep what is drawn for them."""
    numbers = node.numbers or tuple(range(len(node.operands)))
    return replace(
        node,
        operands=tuple(node.operands[i] for i in used),
        operand_values=tuple(node.operand_values[i] for i in used),
        numbers=tuple(numbers[i] for i in used),
    )
