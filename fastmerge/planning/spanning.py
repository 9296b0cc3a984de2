"""Which merges are trimmed together, over all tensors of a model (``trim: model``).

The deltas of all tensors that one document merges count as one long vector (Yadav et al. 2023,
arXiv:2306.01708, section 4.1). `fastmerge.compute.across` finds the threshold.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from fastmerge.errors import UnsupportedError
from fastmerge.methods import Consensus
from fastmerge.methods.shapes import Spans
from fastmerge.tree.nodes import Leaf, Merge, Node


def is_spanning(node: Node) -> Spans | None:
    """Of a merge that is trimmed together with those of other tensors, what asks for it."""
    if not isinstance(node, Merge) or not isinstance(node.method, Consensus):
        return None
    return node.method.spanning(node.values, node.operand_values)


def spanning(tensors: Iterable[tuple[Iterable[Merge], int]]) -> dict[Merge, int]:
    """The merges that are trimmed together, in order, with their element counts. ``tensors``: the
    merges of each tensor's tree, and its elements.

    Raises FastmergeError where one threshold cannot be found for them.
    """
    found: dict[Merge, int] = {}
    asked: list[Spans] = []
    for merges, count in tensors:
        for node in merges:
            spans = is_spanning(node)
            if spans is not None:
                asked.append(spans)
                found.setdefault(node, count)
    if not asked:
        return found
    first, spans = next(iter(found)), asked[0]
    for node in found:
        if not all(isinstance(part, Leaf) and part.own for part in node.inputs):
            raise UnsupportedError(
                f"{spans}: '{node.name}' is merged from another document's result; it takes "
                "models that are there: write that result to a folder first"
            )
        lone = [name for name in spans.alike if _given(node, name) != _given(first, name)]
        if _models(node) != _models(first) or node.method != first.method:
            lone = ["models"]
        if lone:
            raise UnsupportedError(
                f"{spans}: the {lone[0]} of '{node.name}' and of '{first.name}' differ; a "
                "model is trimmed whole: no slices of others, no gradients, no filters"
            )
    if len({node.name for node in found}) < len(found):
        raise UnsupportedError(f"{spans}: only one document of a recipe can have it")
    return found


def check_whole(document: Iterable[Node], used: Container[Node]) -> None:
    """Raises FastmergeError where a document trims tensors that are not among those ``used``: the
    threshold would follow from what a later document takes.
    """
    for root in document:
        spans = is_spanning(root)
        if spans is not None and isinstance(root, Merge) and root not in used:
            raise UnsupportedError(
                f"{spans}: '{root.name}' is trimmed with the others and then left out; write "
                "the document to a folder first"
            )


def _models(node: Merge) -> list[int]:
    leaves = (part.own for part in node.inputs if isinstance(part, Leaf))
    return [own.model for own in leaves if own is not None]


def _given(node: Merge, name: str) -> list[Any]:
    """A parameter's value, or every operand's."""
    return [values.get(name) for values in (node.values, *node.operand_values)]
