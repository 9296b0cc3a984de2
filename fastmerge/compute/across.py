"""Thresholds that span all tensors of a model: found in two or three readings of the files before
the merge, exactly, with nothing of a tensor's size in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from fastmerge import _C
from fastmerge.compute.cpu import CpuBackend
from fastmerge.compute.tensor import Trim
from fastmerge.errors import ModelError
from fastmerge.tree.nodes import Merge, Node, Stored

TILE_ENTRIES = 2048  # csrc/isa/table.h: tiles, which no index of a tensor may straddle


def find_trims(
    nodes: Sequence[tuple[Merge, int]], backend: CpuBackend, fetch: Callable[[Stored], _C.View]
) -> Mapping[Node, Trim]:
    """The trims of the merges of `spanning`, from all their tensors' weights."""
    if not nodes:
        return {}
    origins, end = [], 0
    for _, count in nodes:
        origins.append(end)
        end += -(-count // TILE_ENTRIES) * TILE_ENTRIES
    first = nodes[0][0]
    assert first.method.spec is not None
    total = sum(count for _, count in nodes)
    specs = first.method.spec(first.values, first.operand_values, total, [])
    chosen = backend.select_across(
        [[fetch(part) for part in node.operands if isinstance(part, Stored)] for node, _ in nodes],
        [fetch(node.base) for node, _ in nodes if isinstance(node.base, Stored)],
        origins,
        specs.sparsify,
    )
    if not all(math.isfinite(selection.rescale) for selection in chosen):
        raise ModelError(
            "trim: model with rescale: a model has NaN or infinite weights, which would reach "
            "every tensor; mend the model, or merge without rescale"
        )
    return {
        node: Trim(tuple(chosen), origin) for (node, _), origin in zip(nodes, origins, strict=True)
    }
