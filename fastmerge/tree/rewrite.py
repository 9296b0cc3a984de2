"""Whole trees at once: what follows from a node's inputs, other trees, digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastmerge.tree.nodes import HasInputs, Merge, Node, Rows, walk

N = TypeVar("N", bound=HasInputs)
R = TypeVar("R")


def fold(
    root: N,
    step: Callable[[N, Sequence[R]], R],
    known: MutableMapping[N, R] | None = None,
) -> R:
    """``step(node, results of its inputs)`` of ``root``, each node once, without recursion.

    ``known`` holds results that are there already, which end the way down, and takes the new ones.
    """
    made: MutableMapping[N, R] = {} if known is None else known
    for node in walk(root, stop=made):
        if node not in made:
            made[node] = step(node, [made[child] for child in node.inputs])
    return made[root]


def rewrite(root: Node, change: Callable[[Merge], Node]) -> Node:
    """The tree with ``change`` of every merge, whose inputs are rewritten by then."""

    def step(node: Node, inputs: Sequence[Node]) -> Node:
        if isinstance(node, Rows) and inputs:
            made = dict(zip(node.inputs, inputs, strict=True))
            return replace(node, sources=tuple(made.get(s, s) for s in node.sources))
        if not isinstance(node, Merge):
            return node
        base, operands = (None, inputs) if node.base is None else (inputs[0], inputs[1:])
        return change(replace(node, operands=tuple(operands), base=base))

    return fold(root, step)


def digest(root: Node, known: MutableMapping[Node, str]) -> str:
    """What decides the value of a tree, as text: leaves, methods, values, seeds.

    ``known`` holds the digests of nodes that several trees share.
    """

    def step(node: Node, inputs: Sequence[str]) -> str:
        if not isinstance(node, Merge):
            return " of ".join([node.key, *inputs])
        values: list[Any] = [sorted(node.values.items())]
        values.append([sorted(own.items()) for own in node.operand_values])
        draws = f"{node.seed} {node.name!r} {node.numbers}" if node.method.random else ""
        means = node.method.meaning(node.values, node.operand_values, node.base is not None)
        text = f"{means} {values} {draws} {node.base is None} {' '.join(inputs)}"
        return hashlib.sha256(text.encode()).hexdigest()

    if isinstance(root, Merge) and not any(node.inputs for node in root.inputs):
        # Most of 90 000 tensors: their leaves are nobody else's, and to remember them takes longer.
        return step(root, [step(node, ()) for node in root.inputs])
    return fold(root, step, known)
