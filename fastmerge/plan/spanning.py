"""Which merges are trimmed together, over all tensors of a model (``trim: model``).

The deltas of all tensors that one document merges count as one long vector (Yadav et al. 2023,
arXiv:2306.01708, section 4.1). `fastmerge.compute.across` finds the threshold.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastmerge.errors import UnsupportedError
from fastmerge.tree.nodes import Merge, Node, Stored, walk

Sized = tuple[Node, int]  # a tensor's tree and its element count


def is_spanning(node: Node) -> bool:
    """Whether a merge is trimmed together with those of other tensors."""
    if not isinstance(node, Merge) or node.method.spec is None:
        return False
    # Of 36 000 tensors the specs would take a while, and few methods have such a trim.
    return (
        "trim" in node.values
        and node.method.spec(node.values, node.operand_values, 1, [0] * len(node.operands)).across
    )


def spanning(tensors: Iterable[Sized]) -> list[tuple[Merge, int]]:
    """The merges of a plan that are trimmed together, in order, with their element counts.

    Raises FastmergeError where one threshold cannot be found for them.
    """
    found: dict[Merge, int] = {}
    for root, count in tensors:
        for node in walk(root):
            if isinstance(node, Merge) and is_spanning(node):
                found.setdefault(node, count)
    nodes = list(found.items())
    if not nodes:
        return []
    first = nodes[0][0]
    for node, _ in nodes:
        if not all(isinstance(part, Stored) for part in node.inputs):
            raise UnsupportedError(
                f"trim: model: '{node.name}' is merged from another document's result; it takes "
                "models that are there: write that result to a folder first"
            )
        for what, same in (
            ("models", _models(node) == _models(first)),
            ("density", _densities(node) == _densities(first)),
            ("rescale", node.values.get("rescale") == first.values.get("rescale")),
            ("ties", node.values.get("ties") == first.values.get("ties")),
        ):
            if not same:
                raise UnsupportedError(
                    f"trim: model: the {what} of '{node.name}' and of '{first.name}' differ; a "
                    "model is trimmed whole: no slices of others, no gradients, no filters"
                )
    if len({node.name for node, _ in nodes}) < len(nodes):
        raise UnsupportedError("trim: model: only one document of a recipe can have it")
    return nodes


def check_whole(document: Iterable[Node], used: Iterable[tuple[Merge, int]]) -> None:
    """Raises FastmergeError where a document trims tensors that are not among those ``used``: the
    threshold would follow from what a later document takes.
    """
    known = {node for node, _ in used}
    for root in document:
        if isinstance(root, Merge) and is_spanning(root) and root not in known:
            raise UnsupportedError(
                f"trim: model: '{root.name}' is trimmed with the others and then left out; write "
                "the document to a folder first"
            )


def _models(node: Merge) -> list[int]:
    return [part.model for part in node.inputs if isinstance(part, Stored)]


def _densities(node: Merge) -> list[float]:
    return [values["density"] for values in node.operand_values]
