"""divergences: of each row the divergence of one softmax from another, with the CPU's bits: rows
that moved little by fp32 terms, others in fp64 (csrc/kernels/divergence.inl says why).

The CPU adds in an order that is fixed: eight lanes within a tile, a tree over them, tile after
tile. Every tile of every row goes to eight threads here, and what they find is added on the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from fastmerge.kernels.common import check, codes, fetch, lanes, launch, upload

TILE = 2048  # elements: csrc/isa/table.h's kTile, kSumLanes and kMoveLanes
SUM_LANES = 8
MOVE_LANES = 32
LARGEST, SUM, DIVERGENCE = range(3)  # what a launch finds in every tile
FAR, WEIGHTS, PRODUCTS, TERMS = range(4)  # the same of rows that moved little


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
def _power(x):
    """e^x in fp32, by csrc/kernels/divergence.inl's operations in their order; _moved's too."""
    shifted = x * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    total = r * (1.0 / 720) + 1.0 / 120
    total = total * r + 1.0 / 24
    total = total * r + 1.0 / 6
    total = total * r + 0.5
    total = total * r + 1.0
    total = total * r + 1.0
    exponent = tl.add(shifted.to(tl.int32, bitcast=True), 127, sanitize_overflow=False)
    return total * (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _moved(d):
    """e^d - 1 of small d."""
    total = d * (1.0 / 120) + 1.0 / 24
    total = total * d + 1.0 / 6
    total = total * d + 0.5
    total = total * d + 1.0
    return total * d


@triton.jit
def _term(weight, moved, mean, gain, added):
    change = (moved - mean) * gain * weight
    v = tl.div_rn(change, ((weight + weight) + added) + change)
    total = v * (1.0 / 7) + 1.0 / 7
    total = total * v + 1.0 / 5
    total = total * v + 1.0 / 5
    total = total * v + 1.0 / 3
    total = total * v + 1.0 / 3
    total = total * v + 1.0
    return change * v * total


@triton.jit
def _add_lanes(values, UNITS: tl.constexpr):
    """((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)) of each row of (UNITS, 8)."""
    four = tl.sum(tl.reshape(values, [UNITS, 2, 4]), 1)
    return tl.sum(tl.sum(tl.reshape(four, [UNITS, 2, 2]), 1), 1)


@triton.jit
def moves_kernel(
    table, row_numbers, found, rows, cols, tiles,
    WHAT: tl.constexpr, CODES: tl.constexpr, TILE: tl.constexpr, UNITS: tl.constexpr,
    MOVE_LANES: tl.constexpr,
):  # fmt: skip
    """As `divergence_kernel`, of x and the base: how many entries are too far (0), the sums of the
    weights e^base (1), of their products with what moved (2), or of p ln(p / q) - p + q times the
    row's weight (3). row_numbers: fp32 (3, rows): the mean, the gain and what is added to twice a
    weight. found: fp64.
    """
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    row = unit // tiles
    there = row < rows
    first = row * cols
    tile = (first // TILE + unit % tiles) * TILE
    begin = tl.maximum(first, tile)
    end = tl.where(there, tl.minimum(first + cols, tile + TILE), begin)
    lane = tl.arange(0, MOVE_LANES).to(tl.int64)
    total = tl.zeros([UNITS, MOVE_LANES], tl.float64)
    address = tl.load(table)
    other = tl.load(table + 1)
    if WHAT == 3:
        mean = tl.load(row_numbers + row, mask=there, other=0.0)[:, None]
        gain = tl.load(row_numbers + rows + row, mask=there, other=0.0)[:, None]
        added = tl.load(row_numbers + 2 * rows + row, mask=there, other=0.0)[:, None]
    longest = tl.max(end - begin, 0)
    for step in range(0, longest, MOVE_LANES):
        offsets = begin[:, None] + step + lane[None, :]
        mask = offsets < end[:, None]
        base = fetch(other, offsets, mask, CODES[1], False, True)
        value = base
        if WHAT != 1:
            delta = fetch(address, offsets, mask, CODES[0], False, True) - base
        if WHAT == 0:
            near = (tl.abs(delta) <= 0.125) & (tl.abs(base) <= 64.0)
            value = tl.where(near, 0.0, 1.0)
        elif WHAT == 1:
            value = _power(base)
        elif WHAT == 2:
            value = _power(base) * _moved(delta)
        else:
            value = _term(_power(base), _moved(delta), mean, gain, added)
        total += tl.where(mask, value.to(tl.float64), 0.0)
    half = tl.sum(tl.reshape(total, [UNITS, 2, MOVE_LANES // 2]), 1)
    eight = tl.sum(tl.reshape(half, [UNITS, 2, MOVE_LANES // 4]), 1)
    tl.store(found + unit, _add_lanes(eight, UNITS), mask=there)


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


def moved_units(lanes: int) -> int:
    """The same of `moves_kernel`."""
    return lanes // MOVE_LANES


def divergences(x: torch.Tensor, base: torch.Tensor, cols: int) -> NDArray[np.float64]:
    """`_C.divergences` on the device; waits for it."""
    check([x], base, None)
    if cols < 1 or base.numel() % cols:
        raise ValueError("cols must divide the element count")
    tiles = _Tiles(x, base, base.numel() // cols, cols)
    far = _in_order(tiles.moves(FAR)) > 0
    if far.all():
        return _far(tiles)
    found = _near(tiles)
    return np.where(far, _far(tiles), found) if far.any() else found


class _Tiles:
    """The launches over both tensors' tiles; each gives (rows, tiles)."""

    def __init__(self, x: torch.Tensor, base: torch.Tensor, rows: int, cols: int) -> None:
        self.tensors = [x, base]
        self.device, self.rows, self.cols = base.device, rows, cols
        self.count = (cols + TILE - 2) // TILE + 1  # of a row that begins anywhere

    def _launch(
        self, kernel: Any, tensors: list[torch.Tensor], kind: torch.dtype, size: int,
        given: list[torch.Tensor], **constants: int,
    ) -> torch.Tensor:  # fmt: skip
        found = torch.empty(self.rows, self.count, dtype=kind, device=self.device)
        table = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
        launch(
            kernel,
            -(-self.rows * self.count // size),
            self.device,
            upload(table, self.device),
            *given,
            found,
            self.rows,
            self.cols,
            self.count,
            CODES=codes(tensors),
            TILE=TILE,
            UNITS=size,
            **constants,
        )
        return found

    def moves(self, what: int, numbers: NDArray[np.float32] | None = None) -> torch.Tensor:
        """By `moves_kernel`."""
        given = np.zeros((3, 1), np.float32) if numbers is None else numbers
        return self._launch(
            moves_kernel, self.tensors, torch.float64, moved_units(lanes()),
            [upload(given, self.device)], WHAT=what, MOVE_LANES=MOVE_LANES,
        )  # fmt: skip

    def softmaxes(
        self,
        what: int,
        tensors: list[torch.Tensor],
        largest: torch.Tensor,
        factors: torch.Tensor,
    ) -> torch.Tensor:
        """By `divergence_kernel`."""
        kind = torch.float32 if what == LARGEST else torch.float64
        return self._launch(
            divergence_kernel, tensors, kind, units(lanes()), [largest, factors], WHAT=what,
            SUM_LANES=SUM_LANES,
        )  # fmt: skip


def _near(tiles: _Tiles) -> NDArray[np.float64]:
    weights = _in_order(tiles.moves(WEIGHTS))
    with np.errstate(all="ignore"):  # rows that are too far have any numbers
        mean = _in_order(tiles.moves(PRODUCTS)) / weights
        numbers = np.stack([mean, 1 / (1 + mean), 2e-8 * weights]).astype(np.float32)
        return np.asarray(_in_order(tiles.moves(TERMS, numbers)) / weights)


def _far(tiles: _Tiles) -> NDArray[np.float64]:
    largest = torch.empty(2, tiles.rows, dtype=torch.float32, device=tiles.device)
    factors = torch.empty(2, tiles.rows, dtype=torch.float64, device=tiles.device)
    for i, tensor in enumerate(tiles.tensors):
        largest[i] = tiles.softmaxes(LARGEST, [tensor], largest, factors).amax(dim=1)
        sums = _in_order(tiles.softmaxes(SUM, [tensor], largest[i], factors))
        factors[i] = upload(1.0 / sums, tiles.device)
    return _in_order(tiles.softmaxes(DIVERGENCE, tiles.tensors, largest, factors))


def _in_order(partials: torch.Tensor) -> NDArray[np.float64]:
    """The sum of each row, one term after another."""
    found: NDArray[np.float64] = np.add.accumulate(partials.cpu().numpy(), axis=1)[:, -1]
    return found
