"""The device side of select: counting against a window, the n-th of some values, L1 masses."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmerge.kernels.common import fetch, locate, magnitude_key, mix32, order_of, tally
from fastmerge.kernels.consensus import survives

# What is ranked: magnitudes, or the complement of the order of the entries whose magnitude is the
# tie key (so that the largest value is the first order). SKIP leaves a delta out.
SKIP: tl.constexpr = tl.constexpr(0)
BY_KEY: tl.constexpr = tl.constexpr(1)
BY_MIXED: tl.constexpr = tl.constexpr(2)
BY_INDEX: tl.constexpr = tl.constexpr(3)


@triton.jit
def _rank_block(
    packed, row, windows, gathered, buffer, offsets, mask,
    CODES: tl.constexpr, RANKED: tl.constexpr, SAMPLE: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr,
    HEAD: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Gathers one block's values inside each delta's window; returns the counts at its edges added
    to packed.
    """
    base = fetch(tl.load(row + HEAD), offsets, mask, CODES[0], ALIGNED, MASKED)
    added = ()
    for i in tl.static_range(len(RANKED)):
        counts = packed[i]
        if RANKED[i] != SKIP:
            x = fetch(tl.load(row + HEAD + 1 + i), offsets, mask, CODES[1 + i], ALIGNED, MASKED)
            key = magnitude_key(x - base)
            if RANKED[i] == BY_KEY:
                value = key.to(tl.uint64) if WIDE else key
                present = mask
            else:
                value = ~order_of(offsets, RANKED[i] == BY_INDEX, WIDE)
                present = mask & (key == tl.load(windows + WINDOW * i + 2).to(tl.uint32))
            low = tl.load(windows + WINDOW * i).to(value.dtype)
            high = tl.load(windows + WINDOW * i + 1).to(value.dtype)
            if SAMPLE:
                inside = present & (value >= low) & (value <= high)
            else:
                inside = present & (value > low) & (value < high)
                edge = tl.where(value == high, 1 << 10, tl.where(value == low, 1 << 20, 0))
                edge = tl.where(value > high, 1, edge)
                edge = tl.where(present, edge, 0)
                counts = counts + tl.sum(tl.reshape(edge, [LANES, STEP // LANES]), 1)
            flags = inside.to(tl.int32)
            found = tl.sum(flags, 0)
            if found > 0:
                place = (
                    tl.atomic_add(gathered + 4 * i, found.to(tl.int64), sem="relaxed")
                    + tl.cumsum(flags, 0)
                    - 1
                )
                inside = inside & (place < tl.load(windows + WINDOW * i + 4))
                place += tl.load(windows + WINDOW * i + 3)
                tl.store(
                    buffer + place, value.to(buffer.dtype.element_ty, bitcast=True), mask=inside
                )
        added = added + (counts,)
    return added


@triton.jit
def rank_kernel(
    table, owners, strides, windows, counts, buffer,
    CODES: tl.constexpr, RANKED: tl.constexpr, SAMPLE: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr,
    SECTOR: tl.constexpr, HEAD: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Counts every delta of every segment against its window.

    windows: int64 (segments, k, WINDOW). counts: int64 (segments, k, 4): gathered (may exceed the
    room), above high, at high, at low. SAMPLE: only one sector in strides[s], both edges gathered
    too, nothing else counted; the table's count is then that of the samples and strides (segments,
    2) holds (stride, real count).
    """
    K: tl.constexpr = len(RANKED)
    segment, row, begin, end = locate(table, owners, HEAD + K + 1, CHUNK)
    windows += segment * (K * WINDOW)
    counts += segment * (K * 4)
    # Per lane: above + at high * 2**10 + at low * 2**20; a lane sees CHUNK / LANES < 2**10 entries.
    packed = ()
    for _ in tl.static_range(K):
        packed = packed + (tl.zeros([LANES], tl.int32),)
    if SAMPLE:
        stride, total = tl.load(strides + 2 * segment), tl.load(strides + 2 * segment + 1)
        for step in range(0, end - begin, STEP):
            start = begin + step
            lane = start + tl.arange(0, STEP)
            sector = lane // SECTOR
            place = mix32(sector.to(tl.uint32)).to(tl.int64) % stride
            offsets = (sector * stride + place) * SECTOR + lane % SECTOR
            packed = _rank_block(
                packed, row, windows, counts, buffer, offsets, (lane < end) & (offsets < total),
                CODES, RANKED, True, WIDE, ALIGNED, True, STEP, LANES, HEAD, WINDOW,
            )  # fmt: skip
    else:
        whole = begin + (end - begin) // STEP * STEP
        for step in range(0, whole - begin, STEP):
            start = begin + step
            offsets = start + tl.arange(0, STEP)
            packed = _rank_block(
                packed, row, windows, counts, buffer, offsets, tl.full([STEP], 1, tl.int1), CODES,
                RANKED, False, WIDE, ALIGNED, False, STEP, LANES, HEAD, WINDOW,
            )  # fmt: skip
        if whole < end:
            offsets = whole + tl.arange(0, STEP)
            packed = _rank_block(
                packed, row, windows, counts, buffer, offsets, offsets < end, CODES, RANKED, False,
                WIDE, ALIGNED, True, STEP, LANES, HEAD, WINDOW,
            )  # fmt: skip
        for i in tl.static_range(K):
            if RANKED[i] != SKIP:
                above = tl.sum(packed[i] & 1023, 0)
                at_high = tl.sum((packed[i] >> 10) & 1023, 0)
                at_low = tl.sum(packed[i] >> 20, 0)
                tally(counts + 4 * i + 1, above)
                tally(counts + 4 * i + 2, at_high)
                tally(counts + 4 * i + 3, at_low)


@triton.jit
def nth_kernel(buffer, queries, answers, BITS: tl.constexpr, STEP: tl.constexpr):
    """The rank-th largest of some buffered values, by four or eight 256-bin histograms from the top
    digit down.

    queries: int64 (n, 3): first, count, rank from 1. answers: int64 (n, 3): the value, values above
    it, values equal to it.
    """
    query = tl.program_id(0).to(tl.int64)
    first, count = tl.load(queries + 3 * query), tl.load(queries + 3 * query + 1)
    rank = tl.load(queries + 3 * query + 2)
    bins = tl.arange(0, 256)
    kind = tl.uint32 if BITS == 32 else tl.uint64
    prefix = tl.zeros([], kind)
    above = rank * 0
    equal = rank * 0
    shift = tl.full([], BITS, tl.int32)
    for _ in range(BITS // 8):
        shift -= 8
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, count, STEP):
            at = start + tl.arange(0, STEP)
            raw = tl.load(buffer + first + at, mask=at < count, other=0)
            value = raw.to(kind, bitcast=True) >> shift.to(kind)
            live = (at < count) & ((value >> 8) == prefix)
            histogram += tl.histogram((value & 255).to(tl.int32), 256, mask=live)
        over = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)  # values of a larger digit
        left = (rank - above).to(tl.int32)
        here = (over < left) & (left <= over + histogram)
        prefix = (prefix << 8) | tl.sum(tl.where(here, bins, 0), 0).to(kind)
        above += tl.sum(tl.where(here, over, 0), 0)
        equal = tl.sum(tl.where(here, histogram, 0), 0).to(tl.int64)
    tl.store(answers + 3 * query, prefix.to(tl.int64))
    tl.store(answers + 3 * query + 1, above)
    tl.store(answers + 3 * query + 2, equal)


@triton.jit
def _measure_block(
    sums, row, rule, start, end, delta: tl.constexpr,
    CODES: tl.constexpr, MODES: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """sums plus one block's |delta|, kept |delta| and kept entries, by lane."""
    offsets = start + tl.arange(0, STEP)
    mask = offsets < end
    base = fetch(tl.load(row + HEAD), offsets, mask, CODES[0], ALIGNED, MASKED)
    address = tl.load(row + HEAD + 1 + delta)
    change = fetch(address, offsets, mask, CODES[1 + delta], ALIGNED, MASKED) - base
    kept = survives(change, start, offsets, rule, MODES[delta], WIDE, STEP)
    size = tl.abs(change).to(tl.float64)
    if MASKED:  # outside the mask both tensors read as 0, and so does their difference
        kept = kept & mask
    return (
        sums[0] + tl.sum(tl.reshape(size, [LANES, STEP // LANES]), 1),
        sums[1] + tl.sum(tl.reshape(tl.where(kept, size, 0.0), [LANES, STEP // LANES]), 1),
        sums[2] + tl.sum(tl.reshape(kept.to(tl.int32), [LANES, STEP // LANES]), 1),
    )


@triton.jit
def measure_kernel(
    table, owners, rules, partials, kept_counts,
    CODES: tl.constexpr, MODES: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr, HEAD: tl.constexpr,
    RULE: tl.constexpr,
):  # fmt: skip
    """partials: float64 (chunks, 2 k): sums of |delta| over all and over the kept entries of each
    delta.
    """
    K: tl.constexpr = len(MODES)
    segment, row, begin, end = locate(table, owners, HEAD + K + 1, CHUNK)
    rules += segment * (K * RULE)
    out = partials + tl.program_id(0).to(tl.int64) * (2 * K)
    whole = begin + (end - begin) // STEP * STEP
    for i in tl.static_range(K):
        rule = rules + RULE * i
        sums = (
            tl.zeros([LANES], tl.float64),
            tl.zeros([LANES], tl.float64),
            tl.zeros([LANES], tl.int32),
        )
        for step in range(0, whole - begin, STEP):
            start = begin + step
            sums = _measure_block(
                sums,
                row,
                rule,
                start,
                end,
                i,
                CODES,
                MODES,
                WIDE,
                ALIGNED,
                False,
                STEP,
                LANES,
                HEAD,
            )
        if whole < end:
            sums = _measure_block(
                sums, row, rule, whole, end, i, CODES, MODES, WIDE, ALIGNED, True, STEP, LANES, HEAD
            )
        tl.store(out + 2 * i, tl.sum(sums[0], 0))
        tl.store(out + 2 * i + 1, tl.sum(sums[1], 0))
        found = tl.sum(sums[2], 0)
        tally(kept_counts + segment * K + i, found)
