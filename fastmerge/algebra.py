"""The algebra of merges: a tree of combinations is again one combination of its source tensors.

One output tensor is described by a tree of `Merge` nodes over `Source` leaves. As long as every node is
a combination (linear, SLERP, Karcher, ...), the tensor equals ``sum_i c_i x_i`` over the leaves, and the
``c_i`` follow from the leaves' own Gram matrix G = <x_i, x_j>: if A maps leaf vectors to a node's operands,
the operands' Gram matrix is A G A^T. So a chain of N merges needs one Gram pass, one combine pass and one rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from fastmerge.methods.types import Method

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Source:
    """One tensor of one input model: ``model`` indexes Plan.models, ``name`` is its name there."""

    model: int
    name: str


@dataclass(frozen=True, eq=False)
class Merge:
    """One merge of operands, in recipe order; ``base`` is kept apart unless the method takes it as an operand."""

    method: Method
    operands: tuple[Node, ...]
    base: Node | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    operand_values: tuple[Mapping[str, Any], ...] = ()
    seed: int | None = None  # random methods: the recipe's seed

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The base first, when there is one, then the operands: the order of the rule's coefficients."""
        return self.operands if self.base is None else (self.base, *self.operands)

    @property
    def axis(self) -> int | None:
        """Along what the method takes its vectors: None = whole tensor, 1 = rows, 0 = columns."""
        return self.method.axis(self.values)


Node = Union[Source, Merge]


def walk(root: Node) -> list[Node]:
    """Every node below ``root`` once, operands before the merges that use them (no recursion limit)."""
    order: list[Node] = []
    seen: set[int] = set()
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            if isinstance(node, Merge):
                stack.extend((child, False) for child in reversed(node.inputs))
    return order


def leaves(nodes: Node | Iterable[Node]) -> list[Source]:
    """The distinct source tensors below one or several nodes, in order of first use."""
    roots = [nodes] if isinstance(nodes, (Source, Merge)) else list(nodes)
    return list(
        dict.fromkeys(n for root in roots for n in walk(root) if isinstance(n, Source))
    )


def collapses(root: Node) -> bool:
    """Whether the whole tree is one combination of its leaves: all combinations along one axis."""
    merges = [node for node in walk(root) if isinstance(node, Merge)]
    axes = {node.axis for node in merges if node.method.needs_gram}
    return all(node.method.is_combination for node in merges) and len(axes) <= 1


def needs_gram(root: Node) -> bool:
    """Whether any rule in the tree reads inner products."""
    return any(isinstance(node, Merge) and node.method.needs_gram for node in walk(root))


def axis_of(root: Node) -> int | None:
    """The axis of a collapsing tree's vectors."""
    for node in walk(root):
        if isinstance(node, Merge) and node.method.needs_gram:
            return node.axis
    return None


def coefficients(
    root: Node, sources: Sequence[Source], gram: Float64 | None, reference: int | None = None
) -> Float64:
    """The coefficients of a collapsing tree over ``sources``: float64, shape (n,) or (vectors, n).

    ``gram`` holds the inner products of ``sources``, shape (n, n) or (vectors, n, n). With ``reference`` = r it
    is instead over [x_r, x_i - x_r for i != r in order]: the same space in a basis that keeps small deltas exact.
    Not needed (None) when no rule in the tree reads it.
    """
    count = len(sources)
    basis = np.eye(count) if reference is None else _delta_basis(count, reference)
    position = {source: index for index, source in enumerate(sources)}
    vectors: dict[int, Float64] = {}
    for node in walk(root):
        if isinstance(node, Source):
            vectors[id(node)] = np.eye(count)[position[node]]
        else:
            vectors[id(node)] = _merge_vector(node, vectors, basis, gram)
    return vectors[id(root)]


def _delta_basis(count: int, reference: int) -> Float64:
    """Rows: sources; columns: their coordinates over [x_r, x_i - x_r ...]."""
    others = [i for i in range(count) if i != reference]
    basis = np.zeros((count, count))
    basis[:, 0] = 1.0
    for column, i in enumerate(others, start=1):
        basis[i, column] = 1.0
    return basis


def _merge_vector(
    node: Merge, vectors: Mapping[int, Float64], basis: Float64, gram: Float64 | None
) -> Float64:
    rule = node.method.rule
    if rule is None:
        raise ValueError(f"{node.method.name} is not a combination")
    operands = np.stack(
        np.broadcast_arrays(*[vectors[id(n)] for n in node.inputs]), axis=-2
    )  # (..., m, n)
    local: Float64 | None = None
    if node.method.needs_gram:
        if gram is None:
            raise ValueError(f"{node.method.name} needs the Gram matrix")
        rows = operands.copy()
        if node.base is not None:
            rows[..., 1:, :] -= rows[..., :1, :]
        rows = rows @ basis
        local = rows @ gram @ np.swapaxes(rows, -1, -2)
    result = rule(local, node.values, node.operand_values, node.base is not None)
    weights = result.coefficients / (1.0 if result.divisor is None else result.divisor)
    return np.asarray((weights[..., None, :] @ operands)[..., 0, :], dtype=np.float64)
