"""divergences: of each row the divergence of one softmax from another, in fp64 with the CPU's bits.

The CPU adds in an order that is fixed: eight lanes within a tile, a tree over them, tile after
tile. Every tile of every row goes to eight threads here, and what they find is added on the host.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from fastmerge.kernels.common import check, codes, fetch, lanes, launch, upload

TILE = 2048  # elements: csrc/isa/table.h's kTile, and its kSumLanes
SUM_LANES = 8
LARGEST, SUM, DIVERGENCE = range(3)  # what a launch finds in every tile


@triton.jit
def _exponential(x):
    """e^x for x <= 0, by csrc/kernels/divergence.inl's operations in their order."""
    x = tl.where(x < -708.0, -708.0, x)
    shifted = x * 1.4426950408889634 + 6755399441055744.0
    n = shifted - 6755399441055744.0
    r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10
    total = r * (1.0 / 479001600) + 1.0 / 39916800
    total = total * r + 1.0 / 3628800
    total = total * r + 1.0 / 362880
    total = total * r + 1.0 / 40320
    total = total * r + 1.0 / 5040
    total = total * r + 1.0 / 720
    total = total * r + 1.0 / 120
    total = total * r + 1.0 / 24
    total = total * r + 1.0 / 6
    total = total * r + 0.5
    total = total * r + 1.0
    total = total * r + 1.0
    exponent = tl.add(shifted.to(tl.int64, bitcast=True), 1023, sanitize_overflow=False)
    return total * (exponent << 52).to(tl.float64, bitcast=True)


@triton.jit
def _logarithm(x):
    """ln x of a normal x > 0, as the CPU's."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = tl.add(bits, 0x3FF0000000000000 - 0x3FE6A09E667F3BCD, sanitize_overflow=False) >> 52
    m = tl.sub(bits, (exponent - 1023) << 52, sanitize_overflow=False).to(tl.float64, bitcast=True)
    e = (exponent - 1023).to(tl.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    total = z * (1.0 / 21) + 1.0 / 19
    total = total * z + 1.0 / 17
    total = total * z + 1.0 / 15
    total = total * z + 1.0 / 13
    total = total * z + 1.0 / 11
    total = total * z + 1.0 / 9
    total = total * z + 1.0 / 7
    total = total * z + 1.0 / 5
    total = total * z + 1.0 / 3
    low = e * 1.90821492927058770002e-10 + (s * 2.0 + s * 2.0 * z * total)
    return e * 6.93147180369123816490e-01 + low


@triton.jit
def _add_lanes(values, UNITS: tl.constexpr):
    """((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)) of each row of (UNITS, 8)."""
    four = tl.sum(tl.reshape(values, [UNITS, 2, 4]), 1)
    return tl.sum(tl.sum(tl.reshape(four, [UNITS, 2, 2]), 1), 1)


@triton.jit
def divergence_kernel(
    table, largest, factors, found, rows, cols, tiles,
    WHAT: tl.constexpr, CODES: tl.constexpr, TILE: tl.constexpr, UNITS: tl.constexpr,
    SUM_LANES: tl.constexpr,
):  # fmt: skip
    """Of each of ``tiles`` tiles of a row, cut at multiples of TILE of the flat index, in found
    (rows, tiles): the largest element (0, fp32), the sum of e^(x - largest) (1, fp64), or that of
    p ln(p / q) (2, fp64) with p and q the softmax of both tensors plus 1e-8.

    table: the tensors' addresses. largest: fp32 (tensors, rows). factors: fp64, of the same shape.
    """
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    row = unit // tiles
    there = row < rows
    first = row * cols
    tile = (first // TILE + unit % tiles) * TILE
    begin = tl.maximum(first, tile)
    end = tl.where(there, tl.minimum(first + cols, tile + TILE), begin)
    lane = tl.arange(0, SUM_LANES).to(tl.int64)
    kind = tl.float32 if WHAT == 0 else tl.float64
    total = tl.zeros([UNITS, SUM_LANES], kind)
    address = tl.load(table)
    if WHAT == 0:
        total += float("-inf")
    else:
        most = tl.load(largest + row, mask=there, other=0.0).to(tl.float64)[:, None]
    if WHAT == 2:
        other = tl.load(table + 1)
        other_most = tl.load(largest + rows + row, mask=there, other=0.0).to(tl.float64)[:, None]
        factor = tl.load(factors + row, mask=there, other=0.0)[:, None]
        other_factor = tl.load(factors + rows + row, mask=there, other=0.0)[:, None]
    longest = tl.max(end - begin, 0)
    for step in range(0, longest, SUM_LANES):
        offsets = begin[:, None] + step + lane[None, :]
        mask = offsets < end[:, None]
        x = fetch(address, offsets, mask, CODES[0], False, True)
        if WHAT == 0:
            total = tl.where(mask & (x > total), x, total)
        else:
            value = _exponential(x.to(tl.float64) - most)
            if WHAT == 2:
                y = fetch(other, offsets, mask, CODES[1], False, True)
                p = value * factor + 1e-8
                q = _exponential(y.to(tl.float64) - other_most) * other_factor + 1e-8
                # A NaN's logarithm is by its bits a number.
                value = p * _logarithm(p / q) + (q - q)
            total += tl.where(mask, value, 0.0)
    if WHAT == 0:
        answer = tl.max(total, 1)
    else:
        answer = _add_lanes(total, UNITS)
    tl.store(found + unit, answer, mask=there)


def units(lanes: int) -> int:
    """Tiles that a program takes at a time."""
    return lanes // SUM_LANES


def divergences(x: torch.Tensor, base: torch.Tensor, cols: int) -> NDArray[np.float64]:
    """`_C.divergences` on the device; waits for it."""
    check([x], base, None)
    if cols < 1 or base.numel() % cols:
        raise ValueError("cols must divide the element count")
    device, rows = base.device, base.numel() // cols
    tiles = (cols + TILE - 2) // TILE + 1  # of a row that begins anywhere
    size = units(lanes())

    def each(
        what: int, tensors: list[torch.Tensor], largest: torch.Tensor, factors: torch.Tensor
    ) -> torch.Tensor:
        kind = torch.float32 if what == LARGEST else torch.float64
        found = torch.empty(rows, tiles, dtype=kind, device=device)
        table = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
        launch(
            divergence_kernel,
            -(-rows * tiles // size),
            device,
            upload(table, device),
            largest,
            factors,
            found,
            rows,
            cols,
            tiles,
            WHAT=what,
            CODES=codes(tensors),
            TILE=TILE,
            UNITS=size,
            SUM_LANES=SUM_LANES,
        )
        return found

    largest = torch.empty(2, rows, dtype=torch.float32, device=device)
    factors = torch.empty(2, rows, dtype=torch.float64, device=device)
    for i, tensor in enumerate([x, base]):
        largest[i] = each(LARGEST, [tensor], largest, factors).amax(dim=1)
        sums = _in_order(each(SUM, [tensor], largest[i], factors))
        factors[i] = upload(1.0 / sums, device)
    return _in_order(each(DIVERGENCE, [x, base], largest, factors))


def _in_order(partials: torch.Tensor) -> NDArray[np.float64]:
    """The sum of each row, one term after another."""
    found: NDArray[np.float64] = np.add.accumulate(partials.cpu().numpy(), axis=1)[:, -1]
    return found
