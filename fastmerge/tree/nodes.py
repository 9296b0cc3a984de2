"""The tree that one output tensor is made by: `Merge` nodes over `Source` leaves."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fastmerge.methods.types import Method


@dataclass(frozen=True)
class Source:
    """One tensor of one input model: ``model`` indexes Plan.models, ``name`` is its name there."""

    model: int
    name: str


@dataclass(frozen=True, eq=False)
class Merge:
    """One merge of operands, in recipe order; ``base`` apart unless the method takes it as one."""

    method: Method
    operands: tuple[Node, ...]
    base: Node | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    operand_values: tuple[Mapping[str, Any], ...] = ()
    seed: int | None = None  # random methods: the recipe's seed
    # The tensor it makes in its own document, for which random methods draw; "" where that is the
    # output's. Another document may use it under other names, but must find it as it was drawn.
    name: str = ""

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The base, when there is one, then the operands: the order of a rule's coefficients."""
        return self.operands if self.base is None else (self.base, *self.operands)

    @property
    def axis(self) -> int | None:
        """Along what the method takes its vectors: None = whole tensor, 1 = rows, 0 = columns."""
        return self.method.axis(self.values)


Node: TypeAlias = "Source | Merge"


def walk(root: Node, stop: Container[Node] = ()) -> list[Node]:
    """Every node below ``root`` once, inputs before the merges that use them; not below ``stop``.

    An explicit stack: a schedule of a thousand steps is a tree a thousand deep.
    """
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if isinstance(node, Merge) and node not in stop:
                stack.extend((child, False) for child in reversed(node.inputs))
    return order


def leaves(roots: Iterable[Node]) -> list[Source]:
    """The distinct source tensors below ``roots``, in order of first use."""
    found = (node for root in roots for node in walk(root) if isinstance(node, Source))
    return list(dict.fromkeys(found))
