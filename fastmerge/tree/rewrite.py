"""Whole trees at once: what follows from a node's inputs, other trees, digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastmerge.dtypes import F32, F64
from fastmerge.tree.nodes import (
    HasInputs,
    Leaf,
    LowRank,
    Merge,
    Narrowed,
    Node,
    Rows,
    Stored,
    walk,
)

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
    """The tree with ``change`` of every merge, whose inputs are rewritten by then. Leaves that are
    made from none stay themselves, by which others know them.
    """

    def step(node: Node, inputs: Sequence[Node]) -> Node:
        if isinstance(node, Rows) and not _are(inputs, node.inputs):
            made = dict(zip(node.inputs, inputs, strict=True))
            return replace(node, sources=tuple(made.get(s, s) for s in node.sources))
        if not isinstance(node, Merge):
            return node
        base, operands = node.parted(inputs)
        return change(replace(node, operands=operands, base=base))

    return fold(root, step)


def _are(made: Sequence[Node], own: Sequence[Node]) -> bool:
    return all(a is b for a, b in zip(made, own, strict=True))


def narrowed(root: Node) -> Node:
    """The tree with float64 tensors rounded to float32 where they are read; the same where there
    are none, as a plan knows its trees by themselves.
    """

    def step(node: Node, inputs: Sequence[Node]) -> Node:
        if isinstance(node, Merge):
            if _are(inputs, node.inputs):
                return node
            base, operands = node.parted(inputs)
            return replace(node, operands=operands, base=base)
        if isinstance(node, Rows):
            made = dict(zip(node.inputs, inputs, strict=True))
            sources = tuple(made.get(source) or _narrowed(source) for source in node.sources)
            return node if sources == node.sources else replace(node, sources=sources, dtype=F32)
        return _narrowed(node)

    return fold(root, step) if isinstance(root, Merge) or root.inputs else step(root, ())


def _narrowed(leaf: Node) -> Node:
    if isinstance(leaf, LowRank):
        base = _narrowed(leaf.base)
        assert isinstance(base, Leaf)
        return replace(leaf, base=base)
    if isinstance(leaf, Stored) and leaf.dtype == F64:
        return Narrowed(leaf, leaf.shape)
    return leaf


class Digests:
    """What decides the values of a plan's trees; what several share is put into words once."""

    def __init__(self) -> None:
        self._known: dict[Node, str] = {}
        # Methods with their parameters, by the ids of what is kept beside the words.
        self._said: dict[tuple[int, ...], tuple[Merge, str]] = {}

    def of(self, root: Node) -> str:
        """As text: leaves, methods, values, seeds."""
        if isinstance(root, Merge) and root.is_flat:
            # Most of 90 000: their leaves are nobody else's, and to remember them takes longer.
            return self._digest(root, [node.key for node in root.inputs if isinstance(node, Leaf)])
        return fold(root, self._digest, self._known)

    def _digest(self, node: Node, inputs: Sequence[str]) -> str:
        if not isinstance(node, Merge):
            return " of ".join([node.key, *inputs])
        draws = f"{node.seed} {node.name!r} {node.numbers}" if node.method.random else ""
        text = f"{self._meaning(node)} {draws} {node.base is None} {' '.join(inputs)}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _meaning(self, node: Merge) -> str:
        has_base = node.base is not None
        key = (id(node.method), has_base, id(node.values), *map(id, node.operand_values))
        if key not in self._said:
            values: list[Any] = [sorted(node.values.items())]
            values.append([sorted(own.items()) for own in node.operand_values])
            means = node.method.meaning(node.values, node.operand_values, has_base)
            self._said[key] = node, f"{means} {values}"
        return self._said[key][1]
