"""Thresholds that span all tensors of a model: found in two or three readings of the files before
the merge, exactly, with nothing of a tensor's size in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from fastmerge import _C
from fastmerge.compute.cpu import CpuBackend
from fastmerge.compute.tensor import Trim, consensus_terms
from fastmerge.errors import ModelError
from fastmerge.tree.nodes import Leaf, Merge, Node

TILE_ENTRIES = _C.tile_entries()  # no two tensors may share a tile


def find_trims(
    nodes: Mapping[Merge, int], backend: CpuBackend, fetch: Callable[[Leaf], _C.View]
) -> Mapping[Node, Trim]:
    """The trims of `Plan.spanning` (merges and element counts), from all their tensors' weights."""
    if not nodes:
        return {}
    origins, end = [], 0
    for count in nodes.values():
        origins.append(end)
        end += -(-count // TILE_ENTRIES) * TILE_ENTRIES
    terms = consensus_terms(next(iter(nodes)))  # what they keep is alike for all
    total = sum(nodes.values())
    chosen = backend.select_across(
        [[fetch(part) for part in node.operands if isinstance(part, Leaf)] for node in nodes],
        [fetch(node.base) for node in nodes if isinstance(node.base, Leaf)],
        origins,
        [keep.of((total,), 0) for keep in terms.keep],
    )
    chosen = list(terms.settled(chosen))
    if not all(math.isfinite(selection.rescale) for selection in chosen):
        raise ModelError(
            "trim: model with rescale: a model has NaN or infinite weights, which would reach "
            "every tensor; mend the model, or merge without rescale"
        )
    return {node: Trim(tuple(chosen), origin) for node, origin in zip(nodes, origins, strict=True)}
