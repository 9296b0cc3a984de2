"""The device side of select: counting against a window, the n-th of some values, L1 masses."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmerge.kernels.common import fetch, locate, tally
from fastmerge.kernels.masks import load_rule, magnitude_key, mix32, rank_of, survives

# The rule that ranks entries of one magnitude. SKIP leaves a delta out.
SKIP: tl.constexpr = tl.constexpr(0)
BY_MIXED: tl.constexpr = tl.constexpr(1)
BY_INDEX: tl.constexpr = tl.constexpr(2)
VECTOR: tl.constexpr = tl.constexpr(8)  # elements a lane takes at a time: 16 bytes of bf16


@triton.jit
def _columns(x, LANES: tl.constexpr):
    """A (LANES, VECTOR) block as its eight columns; no data moves where each lane holds a row, as
    it does after loads of one width.
    """
    even, odd = tl.split(tl.reshape(x, [LANES, 4, 2]))
    a, c = tl.split(tl.reshape(even, [LANES, 2, 2]))
    b, d = tl.split(tl.reshape(odd, [LANES, 2, 2]))
    a0, a1 = tl.split(a)
    b0, b1 = tl.split(b)
    c0, c1 = tl.split(c)
    d0, d1 = tl.split(d)
    return a0, b0, c0, d0, a1, b1, c1, d1


@triton.jit
def _clear(buffer, place, left, GRANULE: tl.constexpr):
    """Fills the left free slots of a granule with a value below every other."""
    slot = tl.arange(0, GRANULE)
    tl.store(buffer + place + slot, tl.zeros([GRANULE], tl.int64), mask=slot < left)


@triton.jit
def _gather(
    values, within, place, left, buffer, room, granules, LANES: tl.constexpr, GRANULE: tl.constexpr
):  # fmt: skip
    """Writes the values within the window from place on, where left slots are free, or to new
    granules; returns (found, place, left). Granules past the room all lie at its end, where there
    is space for what one step takes.

    A program asks for granules when its last is full and not at every step: the answer of an
    atomic takes longer than all else that a step does.
    """
    flags = within.to(tl.int32)
    by_lane = tl.sum(flags, 1)
    found = tl.sum(by_lane, 0)
    if found > left:
        _clear(buffer, place, left, GRANULE)
        wanted = (found + GRANULE - 1) // GRANULE
        taken = tl.atomic_add(granules, wanted.to(tl.int64), sem="relaxed")
        place = tl.minimum(taken * GRANULE, room).to(tl.int32)
        left = wanted * GRANULE
    slot = (place + tl.cumsum(by_lane, 0) - by_lane)[:, None] + tl.cumsum(flags, 1) - flags
    slots, masks = _columns(slot, LANES), _columns(within, LANES)
    columns = _columns(values.to(tl.int64, bitcast=True), LANES)
    # By column: a store of the whole block would first move it through shared memory.
    for i in tl.static_range(VECTOR):
        tl.store(buffer + slots[i], columns[i], mask=masks[i])
    return found, place + found, left - found


@triton.jit
def _rank_block(
    state, addresses, limits, buffers, offsets, mask,
    CODES: tl.constexpr, RANKED: tl.constexpr, SAMPLE: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, LANES: tl.constexpr, GRANULE: tl.constexpr,
):  # fmt: skip
    """Gathers one (LANES, VECTOR) block's values inside each delta's window; returns the state
    after it, which is per delta: values above the window by lane, values inside, place, left (see
    _gather).
    """
    base = fetch(addresses[0], offsets, mask, CODES[0], ALIGNED, MASKED)
    after = ()
    for i in tl.static_range(len(RANKED)):
        above = state[4 * i]
        inside = state[4 * i + 1]
        place = state[4 * i + 2]
        left = state[4 * i + 3]
        if RANKED[i] != SKIP:
            low, high, room = limits[3 * i], limits[3 * i + 1], limits[3 * i + 2]
            x = fetch(addresses[1 + i], offsets, mask, CODES[1 + i], ALIGNED, MASKED)
            value = rank_of(magnitude_key(x - base), offsets, RANKED[i] == BY_INDEX, WIDE)
            over = value > high
            within = (value >= low) & (value <= high)
            if MASKED:
                over = over & mask
                within = within & mask
            if not SAMPLE:
                above += tl.sum(over.to(tl.int32), 1)
            found, place, left = _gather(
                value, within, place, left, buffers[2 * i], room, buffers[2 * i + 1], LANES, GRANULE
            )
            inside += found
        after = after + (above, inside, place, left)
    return after


@triton.jit
def rank_kernel(
    table, owners, strides, windows, counts, buffer,
    CODES: tl.constexpr, RANKED: tl.constexpr, SAMPLE: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, SECTOR: tl.constexpr,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, COUNTS: tl.constexpr, GRANULE: tl.constexpr,
):  # fmt: skip
    """Counts every delta of every segment against its window and gathers what lies inside.

    windows: int64 (segments, k, WINDOW): low, high (uint64, both inside), first slot, slots.
    counts: int64 (segments, k, COUNTS): granules taken (may exceed the slots), values inside,
    values above. SAMPLE: only one sector in strides[s], and nothing is counted above; the table's
    count is then that of the samples and strides (segments, 2) holds (stride, real count).
    """
    K: tl.constexpr = len(RANKED)
    STEP: tl.constexpr = VECTOR * LANES
    segment, row, begin, end = locate(table, owners, HEAD + K + 1, CHUNK)
    windows += segment * (K * WINDOW)
    counts += segment * (K * COUNTS)
    addresses = (tl.load(row + HEAD),)
    limits = ()
    buffers = ()
    state = ()
    none = tl.program_id(0) * 0
    for i in tl.static_range(K):
        addresses = addresses + (tl.load(row + HEAD + 1 + i),)
        low = tl.load(windows + WINDOW * i).to(tl.uint64, bitcast=True)
        high = tl.load(windows + WINDOW * i + 1).to(tl.uint64, bitcast=True)
        room = tl.load(windows + WINDOW * i + 3)
        limits = limits + (low, high, room)
        first = tl.load(windows + WINDOW * i + 2)
        buffers = buffers + (buffer + first, counts + COUNTS * i)
        state = state + (tl.zeros([LANES], tl.int32), none, none, none)
    within = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    if SAMPLE:
        stride, total = tl.load(strides + 2 * segment), tl.load(strides + 2 * segment + 1)
        for step in range(0, end - begin, STEP):
            start = begin + step
            lane = start + within
            sector = lane // SECTOR
            place = mix32(sector.to(tl.uint32)).to(tl.int64) % stride
            offsets = (sector * stride + place) * SECTOR + lane % SECTOR
            state = _rank_block(
                state, addresses, limits, buffers, offsets, (lane < end) & (offsets < total),
                CODES, RANKED, True, WIDE, ALIGNED, True, LANES, GRANULE,
            )  # fmt: skip
    else:
        whole = begin + (end - begin) // STEP * STEP
        for step in range(0, whole - begin, STEP):
            start = begin + step
            state = _rank_block(
                state, addresses, limits, buffers, start + within, True, CODES, RANKED, False, WIDE,
                ALIGNED, False, LANES, GRANULE,
            )  # fmt: skip
        if whole < end:
            offsets = whole + within
            state = _rank_block(
                state, addresses, limits, buffers, offsets, offsets < end, CODES, RANKED, False,
                WIDE, ALIGNED, True, LANES, GRANULE,
            )  # fmt: skip
    for i in tl.static_range(K):
        if RANKED[i] != SKIP:
            _clear(buffers[2 * i], state[4 * i + 2], state[4 * i + 3], GRANULE)
            above = tl.sum(state[4 * i], 0)
            tally(counts + COUNTS * i + 1, state[4 * i + 1])
            tally(counts + COUNTS * i + 2, above)


@triton.jit
def _narrowed(histogram, rank, above, prefix, digits):
    """The prefix by one digit longer, the values above all that begin with it, and how many do."""
    larger = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
    wanted = (rank - above).to(tl.int32)
    here = (larger < wanted) & (wanted <= larger + histogram)
    digit = tl.sum(tl.where(here, tl.arange(0, 256), 0), 0)
    prefix = (prefix << digits.to(tl.uint64)) | digit.to(tl.uint64)
    above += tl.sum(tl.where(here, larger, 0), 0)
    return prefix, above, tl.sum(tl.where(here, histogram, 0), 0)


@triton.jit(do_not_specialize=["level"])
def nth_kernel(
    buffer, queries, owners, histograms, answers, level,
    QUERY: tl.constexpr, LEVELS: tl.constexpr, PART: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One level of the search for the rank-th largest of some gathered values, no two of which are
    equal (but for empty slots): 256-bin histograms from the top digit down, until one value is
    left, which the launch after looks up. A query has a program for each PART of its slots: they
    add to the histogram of this level, and all follow those of the levels before.

    queries: int64 (n, QUERY): first slot, slots, rank from 1, bits (a value's bits above these are
    the same in all that can be the answer), those bits, first program. owners: int32, the query of
    each program. histograms: int32 (n, LEVELS, 256), zeros at first. answers: int64 (n,), too.
    """
    query = tl.load(owners + tl.program_id(0)).to(tl.int64)
    queries += QUERY * query
    histograms += LEVELS * 256 * query
    rank = tl.load(queries + 2)
    shift = tl.load(queries + 3).to(tl.int32)
    prefix = tl.load(queries + 4).to(tl.uint64, bitcast=True)
    begin = (tl.program_id(0) - tl.load(queries + 5)) * PART
    end = tl.minimum(tl.load(queries + 1), begin + PART)
    buffer += tl.load(queries)
    bins = tl.arange(0, 256)
    above = rank * 0
    equal = (rank * 0 + 2).to(tl.int32)
    digits = tl.minimum(shift, 8)
    known = level * 0
    for before in range(level):
        if (digits > 0) & (equal > 1):
            histogram = tl.load(histograms + 256 * before + bins)
            prefix, above, equal = _narrowed(histogram, rank, above, prefix, digits)
            shift -= digits
            digits = tl.minimum(shift, 8)
            known += 1
    if (digits > 0) & (equal > 1):
        shift -= digits
        histogram = tl.zeros([256], tl.int32)
        for start in range(begin, end, STEP):
            at = start + tl.arange(0, STEP)
            raw = tl.load(buffer + at, mask=at < end, other=0)
            value = raw.to(tl.uint64, bitcast=True) >> shift.to(tl.uint64)
            live = (at < end) & ((value >> digits.to(tl.uint64)) == prefix)
            digit = (value & 255).to(tl.int32) & ((1 << digits) - 1)
            histogram += tl.histogram(digit, 256, mask=live)
        where = histograms + 256 * level + bins
        tl.atomic_add(where, histogram, mask=histogram > 0, sem="relaxed")
    elif known == level:
        for start in range(begin, end, STEP):
            at = start + tl.arange(0, STEP)
            raw = tl.load(buffer + at, mask=at < end, other=0)
            value = raw.to(tl.uint64, bitcast=True) >> shift.to(tl.uint64)
            tl.store(answers + query + at * 0, raw, mask=(at < end) & (value == prefix))


@triton.jit
def _measure_block(
    sums, base_address, address, rule, start, end,
    BASE: tl.constexpr, CODE: tl.constexpr, MODE: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """sums plus one block's |delta|, kept |delta| and kept entries, by lane."""
    offsets = start + tl.arange(0, STEP)
    mask = offsets < end
    base = fetch(base_address, offsets, mask, BASE, ALIGNED, MASKED)
    change = fetch(address, offsets, mask, CODE, ALIGNED, MASKED) - base
    kept = survives(
        change, start, offsets, rule[0], rule[1], rule[2], rule[3], rule[4], MODE, WIDE, STEP
    )
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
    base = tl.load(row + HEAD)
    for i in tl.static_range(K):
        x = tl.load(row + HEAD + 1 + i)
        rule = load_rule(rules + RULE * i, MODES[i], WIDE)
        sums = (
            tl.zeros([LANES], tl.float64),
            tl.zeros([LANES], tl.float64),
            tl.zeros([LANES], tl.int32),
        )
        for step in range(0, whole - begin, STEP):
            start = begin + step
            sums = _measure_block(
                sums, base, x, rule, start, end, CODES[0], CODES[1 + i], MODES[i], WIDE, ALIGNED,
                False, STEP, LANES,
            )  # fmt: skip
        if whole < end:
            sums = _measure_block(
                sums, base, x, rule, whole, end, CODES[0], CODES[1 + i], MODES[i], WIDE, ALIGNED,
                True, STEP, LANES,
            )  # fmt: skip
        tl.store(out + 2 * i, tl.sum(sums[0], 0))
        tl.store(out + 2 * i + 1, tl.sum(sums[1], 0))
        found = tl.sum(sums[2], 0)
        tally(kept_counts + segment * K + i, found)
