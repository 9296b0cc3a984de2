"""Leaves on a GPU: stored tensors as they are, all others as the fp32 numbers that kernels make."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastmerge import _C
from fastmerge.compute.cpu import CpuBackend
from fastmerge.compute.lane import Lane
from fastmerge.compute.leaves import factors_of, lengthened, matrices, thin
from fastmerge.tree.nodes import Dequantised, Leaf, LowRank, Stored

if TYPE_CHECKING:
    import torch


def upload(
    leaf: Leaf, lane: Lane, cpu: CpuBackend, fetch: Callable[[Stored], _C.View]
) -> torch.Tensor:
    """The leaf's elements on the lane's device, flat. ``cpu`` widens an adapter's factors."""
    if isinstance(leaf, Stored):
        return lane.upload(fetch(leaf))
    from fastmerge.kernels import leaves

    if isinstance(leaf, Dequantised):
        rows, cols, block = matrices(leaf.coding, leaf.shape)
        codes, scales = (lane.upload(fetch(stored)) for stored in leaf.stored)
        numbers: torch.Tensor = leaves.dequantised(
            leaf.coding.code, codes, scales,
            rows=rows, cols=cols, block_rows=block[0], block_cols=block[1],
        )  # fmt: skip
        return numbers
    assert isinstance(leaf, LowRank)
    base = upload(leaf.base, lane, cpu, fetch)
    left, right = thin(leaf, cpu, fetch)
    factors = (lane.backend.tensor(each.copy()) for each in (left, right))  # off the mapped file
    made: torch.Tensor = leaves.low_rank(base, *factors, leaf.scale)
    if leaf.magnitude is not None:
        vectors = lengthened(leaf, left, right)
        squares = lane.backend.gram([made], None, vectors).reshape(-1)
        lengths = factors_of(cpu.array(fetch(leaf.magnitude)), squares)
        by_row = lane.backend.tensor(lengths).view((1, -1) if leaf.transposed else (-1, 1))
        made.view(vectors.rows, vectors.cols).mul_(by_row)
    return made


def made_bytes(leaf: Leaf) -> int:
    """Device memory beyond what a leaf stores: its numbers, those below an adapter, its factors."""
    if isinstance(leaf, Stored):
        return 0
    own = 4 * math.prod(leaf.shape)
    if not isinstance(leaf, LowRank):
        return own
    thin_bytes = 4 * (math.prod(leaf.a.shape) + math.prod(leaf.b.shape))
    return own + made_bytes(leaf.base) + thin_bytes + 8 * max(leaf.shape)
