"""select: which entries of each delta survive, exactly and without a sort; a batch of tensors per launch.

A trim needs the keep-th largest magnitude. A 2**11-bin histogram in Triton costs tens of instructions an entry, more than
the memory traffic; Floyd and Rivest's SELECT ("Expected time bounds for selection", CACM 18(3), 1975) costs two compares:

1. sample: 2**16 entries of each delta, in 16-element sectors at hashed places, go to a buffer; a radix
   histogram over the buffer finds two pivots that bracket the wanted rank within about 1 %;
2. count: one pass over all entries counts those above, at and between the pivots exactly, and gathers those strictly
   between (ties at a pivot are only counted, so a heavy tie costs nothing);
3. the wanted entry is a pivot, or a histogram over the gathered few finds it. Where the sample misled, the counts
   say which side holds the entry, and the search goes on there: the answer never depends on the sample.

Entries tied at the threshold are cut by the same search over their orders (fastmerge.sparsity.mixed_index).
All counts are integers, so the order in which programs add them does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from fastmerge.errors import FastmergeError
from fastmerge.kernels.common import (
    CHUNK,
    HEAD,
    WARPS,
    aligned,
    check,
    codes,
    fetch,
    group,
    launch,
    locate,
    magnitude_key,
    mix32,
    order_of,
    partition,
    upload,
    warp_size,
)
from fastmerge.kernels.consensus import RULE, rule_of, survives
from fastmerge.kernels.gram import reduce_kernel
from fastmerge.sparsity import ALL, INDEX, MAGNITUDE, RANDOM, Selection, Sparsify

# What is ranked: magnitudes, or the complement of the order of the entries whose magnitude is the tie key
# (so that the largest value is the first order). SKIP leaves a delta out.
SKIP: tl.constexpr = tl.constexpr(0)
BY_KEY: tl.constexpr = tl.constexpr(1)
BY_MIXED: tl.constexpr = tl.constexpr(2)
BY_INDEX: tl.constexpr = tl.constexpr(3)

SAMPLES = 1 << 16
ROOM = 1 << 17  # values each delta can gather, or 1/64 of its entries if that is more
SECTOR = 16  # sampled elements that lie together: 32 bytes of bf16
WINDOW = 5  # columns: low, high, tie key, room's offset, room
DELTAS = 4  # deltas that share a launch; more would take tens of seconds to compile
STEP = 1024  # elements one program takes at a time


@triton.jit
def _rank_block(
    packed, row, windows, gathered, buffer, offsets, mask,
    CODES: tl.constexpr, RANKED: tl.constexpr, SAMPLE: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr,
    HEAD: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Gathers one block's values inside each delta's window; returns the counts at its edges added to packed."""
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
                place = tl.atomic_add(gathered + 4 * i, found.to(tl.int64)) + tl.cumsum(flags, 0) - 1
                inside = inside & (place < tl.load(windows + WINDOW * i + 4))
                place += tl.load(windows + WINDOW * i + 3)
                tl.store(buffer + place, value.to(buffer.dtype.element_ty, bitcast=True), mask=inside)
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

    windows: int64 (segments, k, WINDOW). counts: int64 (segments, k, 4): gathered (may exceed the room), above
    high, at high, at low. SAMPLE: only one sector in strides[s], both edges gathered too, nothing else counted;
    the table's count is then that of the samples and strides (segments, 2) holds (stride, real count).
    """
    K: tl.constexpr = len(RANKED)
    segment, row, begin, end = locate(table, owners, HEAD + K + 1, CHUNK)
    windows += segment * (K * WINDOW)
    counts += segment * (K * 4)
    packed = ()  # per lane: above + at high * 2**10 + at low * 2**20; a lane sees CHUNK / LANES < 2**10 entries
    for i in tl.static_range(K):
        packed = packed + (tl.zeros([LANES], tl.int32),)
    if SAMPLE:
        stride, total = tl.load(strides + 2 * segment), tl.load(strides + 2 * segment + 1)
        for start in range(begin, end, STEP):
            lane = start + tl.arange(0, STEP)
            sector = lane // SECTOR
            place = mix32(sector.to(tl.uint32)).to(tl.int64) % stride
            offsets = (sector * stride + place) * SECTOR + lane % SECTOR
            packed = _rank_block(
                packed, row, windows, counts, buffer, offsets, (lane < end) & (offsets < total), CODES,
                RANKED, True, WIDE, ALIGNED, True, STEP, LANES, HEAD, WINDOW,
            )  # fmt: skip
    else:
        whole = begin + (end - begin) // STEP * STEP
        for start in range(begin, whole, STEP):
            offsets = start + tl.arange(0, STEP)
            packed = _rank_block(
                packed, row, windows, counts, buffer, offsets, tl.full([STEP], 1, tl.int1), CODES,
                RANKED, False, WIDE, ALIGNED, False, STEP, LANES, HEAD, WINDOW,
            )  # fmt: skip
        if whole < end:
            offsets = whole + tl.arange(0, STEP)
            packed = _rank_block(
                packed, row, windows, counts, buffer, offsets, offsets < end, CODES, RANKED, False, WIDE,
                ALIGNED, True, STEP, LANES, HEAD, WINDOW,
            )  # fmt: skip
        for i in tl.static_range(K):
            if RANKED[i] != SKIP:
                above = tl.sum(packed[i] & 1023, 0)
                at_high = tl.sum((packed[i] >> 10) & 1023, 0)
                at_low = tl.sum(packed[i] >> 20, 0)
                tl.atomic_add(counts + 4 * i + 1, above.to(tl.int64), mask=above > 0)
                tl.atomic_add(counts + 4 * i + 2, at_high.to(tl.int64), mask=at_high > 0)
                tl.atomic_add(counts + 4 * i + 3, at_low.to(tl.int64), mask=at_low > 0)


@triton.jit
def nth_kernel(buffer, queries, answers, BITS: tl.constexpr, STEP: tl.constexpr):
    """The rank-th largest of some buffered values, by four or eight 256-bin histograms from the top digit down.

    queries: int64 (n, 3): first, count, rank from 1. answers: int64 (n, 3): the value, values above it, values
    equal to it.
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
    """partials: float64 (chunks, 2 k): sums of |delta| over all and over the kept entries of each delta."""
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
        for start in range(begin, whole, STEP):
            sums = _measure_block(
                sums, row, rule, start, end, i, CODES, MODES, WIDE, ALIGNED, False, STEP, LANES, HEAD
            )
        if whole < end:
            sums = _measure_block(
                sums, row, rule, whole, end, i, CODES, MODES, WIDE, ALIGNED, True, STEP, LANES, HEAD
            )
        tl.store(out + 2 * i, tl.sum(sums[0], 0))
        tl.store(out + 2 * i + 1, tl.sum(sums[1], 0))
        found = tl.sum(sums[2], 0)
        tl.atomic_add(kept_counts + segment * K + i, found.to(tl.int64), mask=found > 0)


# --- on the host ------------------------------------------------------------------------------------


def select(
    inputs: Sequence[torch.Tensor], base: torch.Tensor, specs: Sequence[Sparsify]
) -> list[Selection]:
    """For each delta x_i - base (fp32), which entries survive: see fastmerge.sparsity. Waits for the device.

    inputs, base: contiguous tensors of one length and any mix of types. specs: one per input.
    """
    return select_many([inputs], [base], [specs])[0]


def select_many(
    inputs: Sequence[Sequence[torch.Tensor]],
    bases: Sequence[torch.Tensor],
    specs: Sequence[Sequence[Sparsify]],
) -> list[list[Selection]]:
    """`select` of many tensors in a handful of launches."""
    for xs, base, given in zip(inputs, bases, specs, strict=True):
        check(xs, base, None)
        if len(given) != len(xs):
            raise FastmergeError(f"{len(xs)} inputs and {len(given)} sparsifiers; give one each")
    parts = [(n, at) for n, xs in enumerate(inputs) for at in range(0, len(xs), DELTAS)]
    rows = [[bases[n], *inputs[n][at : at + DELTAS]] for n, at in parts]
    found = _select(rows, [[Sparsify(*s) for s in specs[n][at : at + DELTAS]] for n, at in parts])
    chosen: list[list[Selection]] = [[] for _ in inputs]
    for (n, _), selections in zip(parts, found, strict=True):
        chosen[n] += selections
    return chosen


def _select(
    rows: Sequence[Sequence[torch.Tensor]], wanted: Sequence[Sequence[Sparsify]]
) -> list[list[Selection]]:
    """The selections of rows of (base, inputs ...)."""
    searches = [
        _Search(s, i, BY_KEY.value, spec.keep, rows[s][0].numel())
        for s, given in enumerate(wanted)
        for i, spec in enumerate(given)
        if spec.kind == MAGNITUDE and spec.keep > 0 and rows[s][0].numel()
    ]
    _run(rows, searches)
    cuts = [
        _Search(
            key.segment,
            key.delta,
            (BY_INDEX if wanted[key.segment][key.delta].tie_rule == INDEX else BY_MIXED).value,
            key.rank - key.above,
            key.equal,
            tie_key=key.value,
        )
        for key in searches
        if key.rank < key.above + key.equal
    ]
    _run(rows, cuts)
    keys = {(key.segment, key.delta): key for key in searches}
    bounds = {(cut.segment, cut.delta): _bound(cut, rows[cut.segment]) for cut in cuts}
    found = [
        [
            _selection(spec, rows[s][0].numel(), keys.get((s, i)), bounds.get((s, i), 1 << 64))
            for i, spec in enumerate(given)
        ]
        for s, given in enumerate(wanted)
    ]
    return _measured(rows, wanted, found)


@dataclass
class _Search:
    """The search for the rank-th largest value of one delta, and its answer."""

    segment: int
    delta: int
    ranked: int
    rank: int
    population: int  # values that can be at or inside the window's limits
    tie_key: int = 0
    floor: int = 0
    ceiling: int = -1
    over: int = 0  # values above the ceiling
    value: int = -1
    above: int = 0
    equal: int = 0
    stalled: bool = False

    def room(self, count: int) -> int:
        return max(ROOM, count // 64)

    def found(self, value: int, above: int, equal: int) -> None:
        self.value, self.above, self.equal = value, above, equal

    def narrow(self, low: int, high: int, counts: Sequence[int], room: int) -> bool:
        """Takes the exact counts against (low, high); True where the gathered values hold the answer."""
        gathered, above, at_high, at_low = counts
        at_low = at_low if low < high else 0
        upper, middle = above + at_high, above + at_high + gathered
        if self.rank <= above:
            self.floor, self.population = high + 1, above - self.over
        elif self.rank <= upper:
            self.found(high, above, at_high)
        elif self.rank <= middle:
            self.floor, self.ceiling, self.population, self.over = low + 1, high - 1, gathered, upper
            return gathered <= room
        elif self.rank <= middle + at_low:
            self.found(low, middle, at_low)
        else:
            self.ceiling, self.over = low - 1, middle + at_low
            self.population -= middle + at_low
        return False


def _run(rows: Sequence[Sequence[torch.Tensor]], searches: Sequence[_Search]) -> None:
    """Answers every search; those of tensors that share dtypes and rules go through each pass together."""
    keys = []
    for segment in {search.segment: None for search in searches}:
        mine = {search.delta: search for search in searches if search.segment == segment}
        ranked = tuple(mine[i].ranked if i in mine else 0 for i in range(len(rows[segment]) - 1))
        wide = rows[segment][0].numel() > 1 << 32
        keys.append((segment, (codes(rows[segment]), ranked, wide, aligned(rows[segment]))))
    for key, positions in partition([key for _, key in keys]).items():
        segments = {keys[p][0] for p in positions}
        live = [search for search in searches if search.segment in segments]
        for search in live:
            search.ceiling = (1 << (64 if key[2] else 32)) - 1
        while live:
            _pass(rows, live, *key)
            live = [search for search in live if search.value < 0]


def _pass(
    rows: Sequence[Sequence[torch.Tensor]],
    live: Sequence[_Search],
    kinds: tuple[int, ...],
    ranked: tuple[int, ...],
    wide: bool,
    straight: bool,
) -> None:
    """One sample and, where that was not everything, one count; narrows or answers each live search."""
    batch = _Batch(rows, live, kinds, ranked, wide, straight)
    full = [(search.floor, search.ceiling) for search in live]
    counts = batch.rank(full, sample=True)
    held = [min(int(c[0]), room) for c, room in zip(counts, batch.rooms, strict=True)]
    exact = [batch.strides[s.segment] == 1 and int(c[0]) <= r for s, c, r in zip(live, counts, batch.rooms)]
    queries, pivots = [], []
    for n, search in enumerate(live):
        if exact[n]:
            queries.append((n, search.rank - search.over))
            continue
        middle = (search.rank - search.over) / search.population * held[n]
        margin = 2 * held[n] ** 0.5 + 2  # four standard deviations of a sampled rank at the median
        for rank in (int(middle - margin), int(middle + margin) + 1):
            queries.append((n, min(max(rank, 1), max(held[n], 1))))
    answers = iter(batch.nth(queries, held))
    rest = []
    for n, search in enumerate(live):
        if exact[n]:
            value, above, equal = next(answers)
            search.found(value, search.over + above, equal)
            continue
        high, low = next(answers)[0], next(answers)[0]
        middle = (search.rank - search.over) / search.population * held[n]
        margin = 2 * held[n] ** 0.5 + 2
        high = search.ceiling if middle - margin < 1 else high
        low = search.floor if middle + margin + 1 > held[n] else low
        if not held[n] or search.stalled:
            low = high = (search.floor + search.ceiling) // 2
        pivots.append((low, high))
        rest.append(n)
    if not rest:
        return
    batch = _Batch(rows, [live[n] for n in rest], kinds, ranked, wide, straight)
    counts = batch.rank(pivots, sample=False)
    inside = []
    for n, (low, high), c in zip(range(len(rest)), pivots, counts, strict=True):
        search = live[rest[n]]
        before = search.population
        if search.narrow(low, high, [int(v) for v in c], batch.rooms[n]):
            inside.append(n)
        search.stalled = search.population > before // 2
    held = [min(int(c[0]), room) for c, room in zip(counts, batch.rooms, strict=True)]
    asked = [(n, live[rest[n]].rank - live[rest[n]].over) for n in inside]
    for n, (value, above, equal) in zip(inside, batch.nth(asked, held), strict=True):
        live[rest[n]].found(value, live[rest[n]].over + above, equal)


class _Batch:
    """The device side of one pass over the live searches of alike tensors."""

    def __init__(
        self,
        rows: Sequence[Sequence[torch.Tensor]],
        live: Sequence[_Search],
        kinds: tuple[int, ...],
        ranked: tuple[int, ...],
        wide: bool,
        straight: bool,
    ) -> None:
        self.live, self.kinds, self.ranked = live, kinds, ranked
        self.wide, self.straight = wide, straight
        self.segments = list({search.segment: None for search in live})
        self.rows = [rows[s] for s in self.segments]
        self.device = self.rows[0][0].device
        self.rooms = [search.room(rows[search.segment][0].numel()) for search in live]
        self.starts = np.concatenate([[0], np.cumsum(self.rooms)])
        dtype = torch.int64 if wide else torch.int32
        self.buffer = torch.empty(int(self.starts[-1]), dtype=dtype, device=self.device)
        self.strides = {segment: 1 for segment in self.segments}
        for search, room in zip(live, self.rooms, strict=True):
            if search.population > room:
                stride = max(self.strides[search.segment], search.population // SAMPLES)
                self.strides[search.segment] = stride

    def rank(self, edges: Sequence[tuple[int, int]], *, sample: bool) -> np.ndarray:
        """Counts each search against its (low, high); int64 (searches, 4) as rank_kernel has them."""
        k = len(self.ranked)
        place = {segment: n for n, segment in enumerate(self.segments)}
        windows = np.zeros((len(self.segments), k, WINDOW), dtype=np.int64)
        windows[:, :, 0], windows[:, :, 2] = 1, -1  # a search that is over: nothing lies in (1, 0)
        for n, (search, (low, high)) in enumerate(zip(self.live, edges, strict=True)):
            window = (_signed(low), _signed(high), search.tie_key, self.starts[n], self.rooms[n])
            windows[place[search.segment], search.delta] = window
        counts = torch.zeros(len(self.segments), k, 4, dtype=torch.int64, device=self.device)
        real = [row[0].numel() for row in self.rows]
        strides = np.array(
            [(self.strides[s], n) for s, n in zip(self.segments, real, strict=True)], dtype=np.int64
        )
        lanes = -(-(-(-strides[:, 1] // SECTOR)) // strides[:, 0]) * SECTOR if sample else strides[:, 1]
        batch = group(self.segments, self.rows, counts=lanes)
        launch(
            rank_kernel,
            batch.chunks,
            self.device,
            batch.table,
            batch.owners,
            upload(strides, self.device),
            upload(windows, self.device),
            counts,
            self.buffer,
            CODES=self.kinds,
            RANKED=self.ranked,
            SAMPLE=sample,
            WIDE=self.wide,
            ALIGNED=self.straight,
            CHUNK=CHUNK,
            STEP=STEP,
            LANES=WARPS * warp_size(),
            SECTOR=SECTOR,
            HEAD=HEAD,
            WINDOW=WINDOW,
        )
        found = counts.cpu().numpy()
        return np.array([found[place[s.segment], s.delta] for s in self.live])

    def nth(self, queries: Sequence[tuple[int, int]], held: Sequence[int]) -> list[tuple[int, ...]]:
        """(value, values above, values equal) for each (search, rank from the largest) over its gathered values."""
        if not queries:
            return []
        table = np.array([(self.starts[n], held[n], rank) for n, rank in queries], dtype=np.int64)
        answers = torch.zeros(len(queries), 3, dtype=torch.int64, device=self.device)
        launch(
            nth_kernel,
            len(queries),
            self.device,
            self.buffer,
            upload(table, self.device),
            answers,
            BITS=64 if self.wide else 32,
            STEP=2 * STEP,
        )
        bits = (1 << 64) - 1
        return [(int(v) & bits, int(a), int(e)) for v, a, e in answers.cpu().numpy()]


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _bound(cut: _Search, row: Sequence[torch.Tensor]) -> int:
    """One past the last order that survives, from the complement that was ranked."""
    if row[0].numel() > 1 << 32:
        return (cut.value ^ ((1 << 64) - 1)) + 1
    order = cut.value ^ ((1 << 32) - 1)
    return (order if cut.ranked == BY_INDEX.value else order << 32) + 1


def _selection(spec: Sparsify, count: int, key: _Search | None, bound: int) -> Selection:
    if spec.kind == RANDOM:
        return Selection(RANDOM, keep_below=spec.keep_below, key=spec.key)
    if spec.kind == ALL:
        return Selection(kept=count)
    if key is None:  # nothing to keep
        return Selection(MAGNITUDE, 0x7FFFFFFF, 0, spec.tie_rule)
    return Selection(
        MAGNITUDE, key.value, bound, spec.tie_rule, kept=key.rank, ties=key.equal
    )


def _measured(
    rows: Sequence[Sequence[torch.Tensor]],
    specs: Sequence[Sequence[Sparsify]],
    found: list[list[Selection]],
) -> list[list[Selection]]:
    """Fills in the L1 factors that were asked for and how many entries a random mask keeps."""
    keys = [
        (
            codes(row),
            tuple(rule_of(s, row[0].numel() > 1 << 32)[0] for s in chosen),
            row[0].numel() > 1 << 32,
            aligned(row),
        )
        if row[0].numel() and any(spec.kind == RANDOM or spec.rescale for spec in given)
        else None
        for row, given, chosen in zip(rows, specs, found, strict=True)
    ]
    for key, members in partition(keys).items():
        if key is None:
            continue
        kinds, modes, wide, straight = key
        batch = group(members, [rows[i] for i in members])
        device, k = batch.table.device, len(modes)
        rules = [[rule_of(s, wide)[1] for s in found[i]] for i in members]
        partials = torch.empty(batch.chunks, 2 * k, dtype=torch.float64, device=device)
        kept = torch.zeros(len(members), k, dtype=torch.int64, device=device)
        sums = torch.zeros(len(members), 2 * k, dtype=torch.float64, device=device)
        launch(
            measure_kernel,
            batch.chunks,
            device,
            batch.table,
            batch.owners,
            upload(np.array(rules, dtype=np.int64), device),
            partials,
            kept,
            CODES=kinds,
            MODES=modes,
            WIDE=wide,
            ALIGNED=straight,
            CHUNK=CHUNK,
            STEP=STEP,
            LANES=WARPS * warp_size(),
            HEAD=HEAD,
            RULE=RULE,
        )
        width = triton.next_power_of_2(2 * k)
        launch(
            reduce_kernel,
            len(members),
            device,
            partials,
            upload(batch.first_chunks, device),
            sums,
            PAIRS=2 * k,
            WIDTH=width,
            STEP=max(1, 1024 // width),
        )
        for i, mass, counts in zip(members, sums.cpu().numpy(), kept.cpu().numpy(), strict=True):
            for d, spec in enumerate(specs[i]):
                factor = _factor(mass[2 * d], mass[2 * d + 1]) if spec.rescale else 1.0
                found[i][d] = found[i][d]._replace(rescale=factor, kept=int(counts[d]))
    return found


def _factor(every: float, kept: float) -> float:
    """The L1 factor as fp32; 1 where either sum is below 1e-7 (mergekit 0.1.5, sparsify.py)."""
    return 1.0 if every < 1e-7 or kept < 1e-7 else float(np.float32(every / kept))
