"""combine: out = (sum_i c_i x_i) / divisor in one pass, one rounding; a batch of tensors in one
launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from fastmerge.errors import FastmergeError
from fastmerge.kernels.common import (
    CHUNK,
    HEAD,
    aligned,
    check,
    codes,
    fetch,
    group,
    lanes,
    launch,
    locate,
    partition,
    per_lane,
    put,
    register_limit,
    tally,
    upload,
    vectors,
)


@triton.jit
def _block(
    addresses, terms, divisor, start, end,
    CODES: tl.constexpr, OUT: tl.constexpr, DIVIDE: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One BLOCK of outputs; returns how many of them, lane by lane, are NaN or infinite."""
    K: tl.constexpr = len(CODES)
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < end
    # A single term starts from -0.0 and so is the product itself, sign of zero and all; more terms
    # start from +0.0, as mergekit 0.1.5's accumulator does. As bits: triton 3.6 takes the constant
    # -0.0 for 0.
    start_bits = tl.full([BLOCK], 0x80000000 if K == 1 else 0, tl.uint32)
    total = start_bits.to(tl.float32, bitcast=True)
    if WIDE:
        total = total.to(tl.float64)
    for i in tl.static_range(K):
        x = fetch(addresses[i], offsets, mask, CODES[i], ALIGNED, MASKED)
        if WIDE:
            total = total + x.to(tl.float64) * terms[i]
        else:
            total = tl.fma(x, tl.zeros_like(x) + terms[i], total)
    if DIVIDE:
        total = tl.div_rn(total, tl.zeros_like(total) + divisor)
    return put(addresses[K], offsets, mask, total.to(tl.float32), OUT, ALIGNED, MASKED)


@triton.jit
def combine_kernel(
    table, owners, coefficients, bad_counts,
    CODES: tl.constexpr, OUT: tl.constexpr, DIVIDE: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """coefficients: fp32, or WIDE fp64, (segments, k + 1), the divisor last. All CODES inputs have
    a non-zero coefficient.
    """
    K: tl.constexpr = len(CODES)
    TAIL: tl.constexpr = BLOCK // 8
    segment, row, begin, end = locate(table, owners, HEAD + K + 1, CHUNK)
    addresses = ()
    terms = ()
    for i in tl.static_range(K):
        addresses = addresses + (tl.load(row + HEAD + i),)
        terms = terms + (tl.load(coefficients + segment * (K + 1) + i),)
    addresses = addresses + (tl.load(row + HEAD + K),)
    divisor = tl.load(coefficients + segment * (K + 1) + K)
    whole = begin + (end - begin) // BLOCK * BLOCK
    bad = tl.zeros([BLOCK], tl.int32)
    for step in range(0, whole - begin, BLOCK):
        start = begin + step
        bad += _block(
            addresses, terms, divisor, start, end, CODES, OUT, DIVIDE, WIDE, ALIGNED, BLOCK, False
        )
    # The tail in narrow steps: a second whole block, masked, would double the registers.
    tail_bad = tl.zeros([TAIL], tl.int32)
    for step in range(0, end - whole, TAIL):
        start = whole + step
        tail_bad += _block(
            addresses, terms, divisor, start, end, CODES, OUT, DIVIDE, WIDE, ALIGNED, TAIL, True
        )
    count = tl.sum(bad, 0) + tl.sum(tail_bad, 0)
    tally(bad_counts + segment, count)


@triton.jit
def combine_vectors_kernel(
    table, coefficients, bad_counts, divisor, rows, cols,
    CODES: tl.constexpr, OUT: tl.constexpr, DIVIDE: tl.constexpr, WIDE: tl.constexpr,
    AXIS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Coefficients per row (AXIS 1) or column (AXIS 0): fp32, or WIDE fp64, (k, vectors). A zero
    coefficient skips its term.
    """
    K: tl.constexpr = len(CODES)
    tiles = tl.cdiv(cols, BLOCK_COLS)
    pid = tl.program_id(0).to(tl.int64)
    r = (pid // tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = (pid % tiles) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = (r < rows)[:, None] & (c < cols)[None, :]
    offsets = r[:, None] * cols + c[None, :]
    if AXIS == 1:
        vector, inside, count = r[:, None], (r < rows)[:, None], rows
    else:
        vector, inside, count = c[None, :], (c < cols)[None, :], cols
    used = tl.zeros_like(vector.to(tl.int32))
    own = coefficients + vector
    for _ in tl.static_range(K):
        used += (tl.load(own, mask=inside, other=0.0) != 0).to(tl.int32)
        own += count
    start_bits = tl.where(used == 1, 0x80000000, 0).to(tl.uint32)  # see _block
    total = start_bits.to(tl.float32, bitcast=True)
    total = tl.broadcast_to(total, [BLOCK_ROWS, BLOCK_COLS])
    if WIDE:
        total = total.to(tl.float64)
    own = coefficients + vector
    for i in tl.static_range(K):
        term = tl.load(own, mask=inside, other=0.0)
        term = tl.broadcast_to(term, [BLOCK_ROWS, BLOCK_COLS])
        own += count
        x = fetch(tl.load(table + HEAD + i), offsets, mask, CODES[i], False, True)
        if WIDE:
            added = total + x.to(tl.float64) * term
        else:
            added = tl.fma(x, term, total)
        total = tl.where(term == 0, total, added)
    if DIVIDE:
        total = tl.div_rn(total, tl.zeros_like(total) + divisor)
    bad = put(tl.load(table + HEAD + K), offsets, mask, total.to(tl.float32), OUT, False, True)
    found = tl.sum(tl.sum(bad, 1), 0)
    tally(bad_counts, found)


def _numbers(wide: bool) -> type:
    return np.float64 if wide else np.float32


def combine(
    inputs: Sequence[torch.Tensor],
    coefficients: np.ndarray,
    out: torch.Tensor,
    *,
    divisor: float | None = None,
    axis: int | None = None,
    rows: int = 1,
    cols: int = 0,
    wide: bool = False,
) -> int:
    """`_C.combine` on the device; waits for it."""
    if wide and divisor is not None:
        raise FastmergeError("a wide sum has no divisor; divide the coefficients")
    if axis is None:
        return int(CombineBatch([inputs], [out]).run([coefficients], [divisor], [wide])[0])
    check(inputs, None, out)
    count = vectors(out.numel(), axis, rows, cols)
    table = np.asarray(coefficients, dtype=np.float64)
    if table.shape != (count, len(inputs)):
        raise FastmergeError(f"coefficients have shape {table.shape}, not {(count, len(inputs))}")
    bad = torch.zeros(1, dtype=torch.int64, device=out.device)
    if out.numel():
        block_cols = min(1024, triton.next_power_of_2(cols))
        block_rows = min(per_lane(1) * lanes() // block_cols, triton.next_power_of_2(rows))
        launch(
            combine_vectors_kernel,
            triton.cdiv(rows, block_rows) * triton.cdiv(cols, block_cols),
            out.device,
            group([0], [[*inputs, out]]).table,
            upload(table.T.astype(_numbers(wide)), out.device),
            bad,
            float(np.float32(1.0 if divisor is None else divisor)),
            rows,
            cols,
            CODES=codes(inputs),
            OUT=codes([out])[0],
            DIVIDE=divisor is not None,
            WIDE=wide,
            AXIS=axis,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            HEAD=HEAD,
            registers=register_limit(len(inputs)),
        )
    return int(bad[0])


class CombineBatch:
    """`combine` of many tensors, one launch per mix of dtypes, as often as coefficients are given.

    Checks and tables are made once; the tensors must keep their memory.
    """

    def __init__(
        self, inputs: Sequence[Sequence[torch.Tensor]], outs: Sequence[torch.Tensor]
    ) -> None:
        for xs, out in zip(inputs, outs, strict=True):
            check(xs, None, out)
        self.inputs, self.outs = inputs, outs
        self._groups: dict[Any, list[tuple[Any, list[int], Any]]] = {}  # by what is used

    def run(
        self,
        coefficients: Sequence[np.ndarray],
        divisors: Sequence[float | None] | None = None,
        wide: Sequence[bool] | None = None,
    ) -> torch.Tensor:
        """Launches, does not wait; returns the NaN/Inf counts, int64 on the device. ``wide``: which
        are summed in float64.
        """
        divisors = [None] * len(self.outs) if divisors is None else divisors
        wide = [False] * len(self.outs) if wide is None else wide
        terms = [
            np.asarray(c, dtype=np.float64).astype(_numbers(is_wide)).ravel()
            for c, is_wide in zip(coefficients, wide, strict=True)
        ]
        for xs, c in zip(self.inputs, terms, strict=True):
            if c.size != len(xs):
                raise FastmergeError(f"{c.size} coefficients for {len(xs)} inputs; give one each")
        given = tuple(d is not None for d in divisors)
        used = tuple((c != 0).tobytes() for c in terms), given, tuple(wide)
        if used not in self._groups:
            self._groups[used] = self._grouped(terms, divisors, wide)
        device = self.outs[0].device if self.outs else None
        bad = torch.zeros(len(self.outs), dtype=torch.int64, device=device)
        for key, members, batch in self._groups[used]:
            last = [1.0 if divisors[i] is None else divisors[i] for i in members]
            if not key[0]:
                for i, divisor in zip(members, last, strict=True):  # +0, divided
                    value = np.float32(0) / np.float32(divisor)
                    self.outs[i].fill_(float(value))
                    bad[i] = self.outs[i].numel() if np.isnan(value) else 0
                continue
            numbers = [[*terms[i][terms[i] != 0], d] for i, d in zip(members, last, strict=True)]
            counts = torch.zeros(len(members), dtype=torch.int64, device=device)
            launch(
                combine_kernel,
                batch.chunks,
                bad.device,
                batch.table,
                batch.owners,
                upload(np.array(numbers, dtype=_numbers(key[3])), bad.device),
                counts,
                CODES=key[0],
                OUT=key[1],
                DIVIDE=key[2],
                WIDE=key[3],
                ALIGNED=key[4],
                CHUNK=CHUNK,
                BLOCK=per_lane(len(key[0])) * lanes(),
                HEAD=HEAD,
                registers=register_limit(len(key[0])),
            )
            bad.index_copy_(0, batch.members, counts)
        return bad

    def _grouped(
        self,
        terms: Sequence[np.ndarray],
        divisors: Sequence[float | None],
        wide: Sequence[bool],
    ) -> list[tuple[Any, list[int], Any]]:
        """(compile-time choices, members, table) of each launch; empty tensors are in none."""
        rows = [
            [*(x for x, c in zip(xs, factors, strict=True) if c != 0), out]
            for xs, factors, out in zip(self.inputs, terms, self.outs, strict=True)
        ]
        keys = [
            (codes(row[:-1]), codes(row[-1:])[0], divisor is not None, is_wide, aligned(row))
            for row, divisor, is_wide in zip(rows, divisors, wide, strict=True)
        ]
        groups = []
        for key, positions in partition(keys).items():
            members = [i for i in positions if rows[i][-1].numel()]
            if members:
                batch = group(members, [rows[i] for i in members]) if key[0] else None
                groups.append((key, members, batch))
        return groups


def combine_many(
    inputs: Sequence[Sequence[torch.Tensor]],
    coefficients: Sequence[np.ndarray],
    outs: Sequence[torch.Tensor],
    *,
    divisors: Sequence[float | None] | None = None,
) -> torch.Tensor:
    """`combine` of many tensors: 300 norms and biases cost one latency. See `CombineBatch.run`."""
    return CombineBatch(inputs, outs).run(coefficients, divisors)
