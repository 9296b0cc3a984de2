"""Trims whose threshold spans all tensors of a model (``trim: model``), as the TIES paper has it.

The deltas of all tensors that one document merges are trimmed as one long vector (Yadav et al.
2023, arXiv:2306.01708, section 4.1): one exact threshold, found in two or three readings of the
files before the merge, and exactly int(density * n) entries kept of all n. Nothing of a tensor's
size is held in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from fastmerge import _C, algebra
from fastmerge.algebra import Merge, Node, Source
from fastmerge.backends import CpuBackend
from fastmerge.compute import Trim
from fastmerge.errors import FastmergeError

_ALIGN = 2048  # csrc/table.h: tiles, which no index of a tensor may straddle


Sized = tuple[Node, int]  # a tensor's tree and its element count


def spanning(tensors: Iterable[Sized]) -> list[tuple[Merge, int]]:
    """The merges of a plan that are trimmed together, in order, with their element counts.

    Raises FastmergeError where one threshold cannot be found for them.
    """
    found: dict[Merge, int] = {}
    for root, count in tensors:
        for node in algebra.walk(root):
            if isinstance(node, Merge) and node.values.get("trim") == "model":
                found.setdefault(node, count)
    nodes = list(found.items())
    if not nodes:
        return []
    first = nodes[0][0]
    names = {node.name for node, _ in nodes}
    for node, _ in nodes:
        if not all(isinstance(part, Source) for part in node.inputs):
            raise FastmergeError(
                f"trim: model: '{node.name}' is merged from another document's result; it takes "
                "models that are there: write that result to a folder first"
            )
        if _densities(node) != _densities(first):
            raise FastmergeError(
                f"trim: model: the densities of '{node.name}' and '{first.name}' differ; one "
                "threshold for a model takes one density, without gradients and filters"
            )
    if len(names) < len(nodes):
        raise FastmergeError("trim: model: only one document of a recipe can have it")
    return nodes


def _densities(node: Merge) -> list[float]:
    return [values["density"] for values in node.operand_values]


def find(
    nodes: Sequence[tuple[Merge, int]], backend: CpuBackend, fetch: Callable[[Source], _C.View]
) -> Mapping[Node, Trim]:
    """The trims of the merges of `spanning`, from all their tensors' weights."""
    if not nodes:
        return {}
    origins, end = [], 0
    for _, count in nodes:
        origins.append(end)
        end += -(-count // _ALIGN) * _ALIGN
    first = nodes[0][0]
    assert first.method.spec is not None
    total = sum(count for _, count in nodes)
    specs = first.method.spec(first.values, first.operand_values, total, [])
    chosen = backend.select_across(
        [[fetch(part) for part in node.operands if isinstance(part, Source)] for node, _ in nodes],
        [fetch(node.base) for node, _ in nodes if isinstance(node.base, Source)],
        origins,
        specs.sparsify,
    )
    return {
        node: Trim(tuple(chosen), origin) for (node, _), origin in zip(nodes, origins, strict=True)
    }
