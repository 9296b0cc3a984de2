"""gram: float64 inner products of k tensors, or of a base and k deltas to it, in one read; batched.

Products and sums are float64 (a product of two fp32 values is exact there). Each program sums one
fixed chunk in a fixed order and stores its partial sums; a second kernel adds those in chunk order.
No float atomics: the same bits on every run of the same GPU model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from fastmerge.kernels.common import (
    CHUNK,
    HEAD,
    Group,
    aligned,
    check,
    codes,
    fetch,
    group,
    lanes,
    launch,
    locate,
    partition,
    register_limit,
    upload,
    vectors,
)

# Sums for m vectors take m (m + 1) registers a thread; beyond 6 vectors the pairs are done in tiles
# of 4 x 4.
ONE_TILE, TILE = 6, 4
# The products are exact in float64, so that fusing them with the sums moves no bit and halves the
# float64 instructions.
FUSED = True


@triton.jit
def _vector(
    row, i: tl.constexpr, base, offsets, mask,
    CODES: tl.constexpr, BASED: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
    HEAD: tl.constexpr,
):  # fmt: skip
    """Vector i of the Gram matrix: the base itself, an input, or fp32(input - base); as float64."""
    if BASED and i == 0:
        x = base
    else:
        x = fetch(tl.load(row + HEAD + i), offsets, mask, CODES[i], ALIGNED, MASKED)
        x = x - base if BASED else x
    return x.to(tl.float64)


@triton.jit
def _add_tile(
    sums, row, offsets, mask,
    CODES: tl.constexpr, BASED: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
    TILE: tl.constexpr, AXIS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """sums plus this block's products, summed along AXIS. TILE = (a0, a1, b0, b1): rows and columns
    of G.
    """
    A0: tl.constexpr = TILE[0]
    A1: tl.constexpr = TILE[1]
    B0: tl.constexpr = TILE[2]
    B1: tl.constexpr = TILE[3]
    base = fetch(tl.load(row + HEAD), offsets, mask, CODES[0], ALIGNED, MASKED) if BASED else 0.0
    right = ()
    for j in tl.static_range(B0, B1):
        right = right + (_vector(row, j, base, offsets, mask, CODES, BASED, ALIGNED, MASKED, HEAD),)
    added = ()
    for i in tl.static_range(A0, A1):
        if A0 == B0:  # on the diagonal the two sides are the same vectors
            left = right[i - B0]
        else:
            left = _vector(row, i, base, offsets, mask, CODES, BASED, ALIGNED, MASKED, HEAD)
        for j in tl.static_range(B0, B1):
            if j <= i:
                added = added + (sums[len(added)] + tl.sum(left * right[j - B0], AXIS),)
    return added


@triton.jit
def _zeros(TILE: tl.constexpr, LANES: tl.constexpr):
    A0: tl.constexpr = TILE[0]
    A1: tl.constexpr = TILE[1]
    B0: tl.constexpr = TILE[2]
    B1: tl.constexpr = TILE[3]
    sums = ()
    for i in tl.static_range(A0, A1):
        for j in tl.static_range(B0, B1):
            if j <= i:
                sums = sums + (tl.zeros([LANES], tl.float64),)
    return sums


@triton.jit
def gram_kernel(
    table, owners, partials,
    CODES: tl.constexpr, BASED: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, CHUNK: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """partials: float64 (chunks, m (m + 1) / 2), lower triangle by rows. LANES x VECTOR elements a
    step.
    """
    M: tl.constexpr = len(CODES)
    A0: tl.constexpr = TILE[0]
    A1: tl.constexpr = TILE[1]
    B0: tl.constexpr = TILE[2]
    B1: tl.constexpr = TILE[3]
    BLOCK: tl.constexpr = LANES * VECTOR
    _, row, begin, end = locate(table, owners, HEAD + M, CHUNK)
    within = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    whole = begin + (end - begin) // BLOCK * BLOCK
    sums = _zeros(TILE, LANES)
    for step in range(0, whole - begin, BLOCK):
        start = begin + step
        sums = _add_tile(
            sums, row, start + within, True, CODES, BASED, ALIGNED, False, TILE, 1, HEAD
        )
    if whole < end:
        offsets = whole + within
        sums = _add_tile(
            sums, row, offsets, offsets < end, CODES, BASED, ALIGNED, True, TILE, 1, HEAD
        )
    out = partials + tl.program_id(0).to(tl.int64) * (M * (M + 1) // 2)
    for i in tl.static_range(A0, A1):
        for j in tl.static_range(B0, B1):
            if j <= i:
                tl.store(out + i * (i + 1) // 2 + j, tl.sum(sums[0], 0))
                sums = sums[1:]


@triton.jit
def gram_vectors_kernel(
    table, result, rows, cols,
    CODES: tl.constexpr, BASED: tl.constexpr, TILE: tl.constexpr, AXIS: tl.constexpr,
    LANES: tl.constexpr, STEP: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """One Gram matrix per row (AXIS 1, one program each) or column (AXIS 0, LANES columns a
    program).
    """
    M: tl.constexpr = len(CODES)
    A0: tl.constexpr = TILE[0]
    A1: tl.constexpr = TILE[1]
    B0: tl.constexpr = TILE[2]
    B1: tl.constexpr = TILE[3]
    pid = tl.program_id(0).to(tl.int64)
    sums = _zeros(TILE, LANES)
    none = pid * 0  # in 64 bits the last step's end does not overflow
    if AXIS == 1:
        within = tl.arange(0, LANES)[:, None] * STEP + tl.arange(0, STEP)[None, :]
        for start in range(none, cols, LANES * STEP):
            c = start + within
            sums = _add_tile(
                sums, table, pid * cols + c, c < cols, CODES, BASED, False, True, TILE, 1, HEAD
            )
    else:
        c = pid * LANES + tl.arange(0, LANES)
        for start in range(none, rows, STEP):
            r = start + tl.arange(0, STEP)
            mask = (r < rows)[:, None] & (c < cols)[None, :]
            offsets = r[:, None].to(tl.int64) * cols + c[None, :]
            sums = _add_tile(sums, table, offsets, mask, CODES, BASED, False, True, TILE, 0, HEAD)
    PAIRS: tl.constexpr = M * (M + 1) // 2
    for i in tl.static_range(A0, A1):
        for j in tl.static_range(B0, B1):
            if j <= i:
                pair = i * (i + 1) // 2 + j
                if AXIS == 1:
                    tl.store(result + pid * PAIRS + pair, tl.sum(sums[0], 0))
                else:
                    tl.store(result + c * PAIRS + pair, sums[0], mask=c < cols)
                sums = sums[1:]


@triton.jit
def reduce_kernel(
    partials, firsts, result, PAIRS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr
):
    """result (segments, PAIRS): each segment's partial sums, added in chunk order, STEP chunks at a
    time.
    """
    segment = tl.program_id(0).to(tl.int64)
    first, last = tl.load(firsts + segment), tl.load(firsts + segment + 1)
    pair = tl.arange(0, WIDTH)
    sums = tl.zeros([STEP, WIDTH], tl.float64)
    for step in range(0, last - first, STEP):
        chunk = first + step + tl.arange(0, STEP)
        mask = (chunk < last)[:, None] & (pair < PAIRS)[None, :]
        sums += tl.load(partials + chunk[:, None] * PAIRS + pair[None, :], mask=mask, other=0.0)
    tl.store(result + segment * PAIRS + pair, tl.sum(sums, 0), mask=pair < PAIRS)


def gram(
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None = None,
    *,
    axis: int | None = None,
    rows: int = 1,
    cols: int = 0,
) -> NDArray[np.float64]:
    """`_C.gram` on the device; waits for it."""
    if axis is None:
        return gram_many([inputs], [base])[0]
    check(inputs, base, None)
    count = vectors(inputs[0].numel(), axis, rows, cols)
    xs = [*([base] if base is not None else []), *inputs]
    m = len(xs)
    result = torch.zeros(count, m * (m + 1) // 2, dtype=torch.float64, device=xs[0].device)
    if inputs[0].numel():
        table = group([0], [xs]).table
        width, step = (lanes(), 4) if axis == 1 else (32, 32)
        for tile in _tiles(m):
            launch(
                gram_vectors_kernel,
                count if axis == 1 else triton.cdiv(count, width),
                result.device,
                table,
                result,
                rows,
                cols,
                CODES=codes(xs),
                BASED=base is not None,
                TILE=tile,
                AXIS=axis,
                LANES=width,
                STEP=step,
                HEAD=HEAD,
            )
    return _square(result.cpu().numpy(), m)


class GramBatch:
    """`gram` of many tensors, two launches per mix of dtypes; checks and tables are made once."""

    def __init__(
        self,
        inputs: Sequence[Sequence[torch.Tensor]],
        bases: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        bases = [None] * len(inputs) if bases is None else bases
        rows: list[list[torch.Tensor]] = []
        for xs, base in zip(inputs, bases, strict=True):
            check(xs, base, None)
            rows.append([*([base] if base is not None else []), *xs])
        keys = [(codes(xs), b is not None, aligned(xs)) for xs, b in zip(rows, bases, strict=True)]
        self._count = len(rows)
        self._groups = [
            (key, group(members, [rows[i] for i in members]))
            for key, members in partition(keys).items()
        ]

    def run(self) -> list[NDArray[np.float64]]:
        """The Gram matrices, float64 (m, m) each; waits for the device once."""
        pending = [(batch, len(key[0]), _sums(batch, *key)) for key, batch in self._groups]
        found: list[NDArray[np.float64]] = [np.empty(0)] * self._count
        for batch, m, sums in pending:
            for i, matrix in zip(batch.indices, _square(sums.cpu().numpy(), m), strict=True):
                found[i] = matrix
        return found


def gram_many(
    inputs: Sequence[Sequence[torch.Tensor]], bases: Sequence[torch.Tensor | None] | None = None
) -> list[NDArray[np.float64]]:
    """`gram` of many tensors, two launches per mix of dtypes and one wait for all."""
    return GramBatch(inputs, bases).run()


def _sums(batch: Group, kinds: tuple[int, ...], based: bool, straight: bool) -> torch.Tensor:
    """The lower triangles of one batch, float64 (segments, pairs), on the device."""
    return _reduced(_partials(batch, kinds, based, straight), batch.first_chunks)


def _partials(batch: Group, kinds: tuple[int, ...], based: bool, straight: bool) -> torch.Tensor:
    """The lower triangles of each chunk, float64 (chunks, pairs), on the device."""
    m, device = len(kinds), batch.table.device
    partials = torch.empty(batch.chunks, m * (m + 1) // 2, dtype=torch.float64, device=device)
    for tile in _tiles(m):
        launch(
            gram_kernel,
            batch.chunks,
            device,
            batch.table,
            batch.owners,
            partials,
            CODES=kinds,
            BASED=based,
            ALIGNED=straight,
            TILE=tile,
            LANES=lanes(),
            VECTOR=vector_elements(kinds),
            CHUNK=CHUNK,
            HEAD=HEAD,
            registers=register_limit(2 * m),
            fused=FUSED,
        )
    return partials


def _reduced(partials: torch.Tensor, first_chunks: NDArray[np.int64]) -> torch.Tensor:
    """Each segment's partial sums added in chunk order: float64 (segments, pairs)."""
    segments, pairs = len(first_chunks) - 1, partials.shape[1]
    result = torch.zeros(segments, pairs, dtype=torch.float64, device=partials.device)
    width = triton.next_power_of_2(pairs)
    launch(
        reduce_kernel,
        segments,
        partials.device,
        partials,
        upload(first_chunks, partials.device),
        result,
        PAIRS=pairs,
        WIDTH=width,
        STEP=max(1, 1024 // width),
    )
    return result


def gram_partials(
    inputs: Sequence[torch.Tensor], base: torch.Tensor | None = None
) -> NDArray[np.float64]:
    """The sums of each CHUNK elements, (chunks, pairs). `gram_total` of those of a tensor's pieces,
    end to end, is `gram` of the tensor, bit for bit, where all but the last are whole chunks.
    """
    check(inputs, base, None)
    xs = [*([base] if base is not None else []), *inputs]
    partials = _partials(group([0], [xs]), codes(xs), base is not None, aligned(xs))
    return np.asarray(partials.cpu().numpy())


def gram_total(partials: NDArray[np.float64], device: str | torch.device) -> NDArray[np.float64]:
    """The Gram matrix that a tensor's partial sums, (chunks, pairs), come to."""
    firsts = np.array([0, len(partials)], dtype=np.int64)
    sums = _reduced(upload(partials, torch.device(device)), firsts)
    return _square(sums.cpu().numpy(), math.isqrt(2 * partials.shape[1]))[0]


def vector_elements(kinds: tuple[int, ...]) -> int:
    """Elements a lane takes at once: 16 bytes of the narrower types, but no more than 8."""
    return 4 if all(kind == 0 for kind in kinds) else 8


def _tiles(m: int) -> list[tuple[int, int, int, int]]:
    """(a0, a1, b0, b1) ranges that cover the lower triangle of an m x m matrix."""
    if m <= ONE_TILE:
        return [(0, m, 0, m)]
    cuts = [(a, min(m, a + TILE)) for a in range(0, m, TILE)]
    return [(*a, *b) for a in cuts for b in cuts if b <= a]


def _square(lower: NDArray[np.float64], m: int) -> NDArray[np.float64]:
    """(n, m (m + 1) / 2) lower triangles to (n, m, m) symmetric matrices."""
    full = np.empty((lower.shape[0], m, m))
    i, j = np.tril_indices(m)
    full[:, i, j] = lower
    full[:, j, i] = lower
    return full
