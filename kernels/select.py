"""select: which entries of each delta survive, exactly and without a sort; a batch of tensors per
launch.

A trim needs the keep-th largest magnitude. A 2**11-bin histogram in Triton costs tens of
instructions an entry, more than the memory traffic; Floyd and Rivest's SELECT ("Expected time
bounds for selection", CACM 18(3), 1975) costs two compares:

1. sample: 2**16 entries of each delta, in 16-element sectors at hashed places, go to a buffer; a
   radix histogram over the buffer finds two pivots that bracket the wanted rank within about 1 %;
2. count: one pass over all entries counts those above, at and between the pivots exactly, and
   gathers those strictly between (ties at a pivot are only counted, so a heavy tie costs nothing);
3. the wanted entry is a pivot, or a histogram over the gathered few finds it. Where the sample
   misled, the counts say which side holds the entry, and the search goes on there: the answer never
   depends on the sample.

Entries tied at the threshold are cut by the same search over their orders
(fastmerge.sparsity.mixed_index). All counts are integers, so the order in which programs add them
does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton

from fastmerge.errors import FastmergeError
from fastmerge.kernels.common import (
    CHUNK,
    HEAD,
    aligned,
    check,
    codes,
    group,
    lanes,
    launch,
    partition,
    upload,
)
from fastmerge.kernels.consensus import RULE, rule_of
from fastmerge.kernels.gram import reduce_kernel
from fastmerge.kernels.ranking import (
    BY_INDEX,
    BY_KEY,
    BY_MIXED,
    measure_kernel,
    nth_kernel,
    rank_kernel,
)
from fastmerge.sparsity import INDEX, MAGNITUDE, RANDOM, Selection, Sparsify

SAMPLES = 1 << 16
ROOM = 1 << 17  # values each delta can gather, or 1/64 of its entries if that is more
SECTOR = 16  # sampled elements that lie together: 32 bytes of bf16
WINDOW = 5  # columns: low, high, tie key, room's offset, room
DELTAS = 4  # deltas that share a launch; more would take tens of seconds to compile
NARROW = 1 << 32  # tensors up to this length have 32-bit orders
VECTOR = 8  # elements a lane takes at a time: 16 bytes of bf16


def select(
    inputs: Sequence[torch.Tensor], base: torch.Tensor, specs: Sequence[Sparsify]
) -> list[Selection]:
    """For each delta x_i - base (fp32), which entries survive: see fastmerge.sparsity. Waits for
    the device.

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
        for keep in (Sparsify(*spec).keep for spec in given):
            if not 0 <= keep <= base.numel():
                raise FastmergeError(f"keep {keep}: use 0 to {base.numel()}, the element count")
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
        """Takes the exact counts against (low, high); True where the gathered values hold the
        answer.
        """
        gathered, above, at_high, at_low = counts
        at_low = at_low if low < high else 0
        upper, middle = above + at_high, above + at_high + gathered
        if self.rank <= above:
            self.floor, self.population = high + 1, above - self.over
        elif self.rank <= upper:
            self.found(high, above, at_high)
        elif self.rank <= middle:
            self.floor, self.ceiling, self.population, self.over = (
                low + 1,
                high - 1,
                gathered,
                upper,
            )
            return gathered <= room
        elif self.rank <= middle + at_low:
            self.found(low, middle, at_low)
        else:
            self.ceiling, self.over = low - 1, middle + at_low
            self.population -= middle + at_low
        return False


def _run(rows: Sequence[Sequence[torch.Tensor]], searches: Sequence[_Search]) -> None:
    """Answers every search; those of tensors that share dtypes and rules go through each pass
    together.
    """
    by_segment: dict[int, list[_Search]] = {}
    for search in searches:
        by_segment.setdefault(search.segment, []).append(search)
    keys = []
    for segment, own in by_segment.items():
        mine = {search.delta: search.ranked for search in own}
        ranked = tuple(mine.get(i, 0) for i in range(len(rows[segment]) - 1))
        wide = rows[segment][0].numel() > NARROW
        keys.append((codes(rows[segment]), ranked, wide, aligned(rows[segment])))
    segments = list(by_segment)
    for key, positions in partition(keys).items():
        live = [search for p in positions for search in by_segment[segments[p]]]
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
    """One sample and, where that was not everything, one count; narrows or answers each live
    search.
    """
    batch = _Batch(rows, live, kinds, ranked, wide, straight)
    full = [(search.floor, search.ceiling) for search in live]
    counts = batch.rank(full, sample=True)
    held = [min(int(c[0]), room) for c, room in zip(counts, batch.rooms, strict=True)]
    exact = [
        batch.strides[s.segment] == 1 and int(c[0]) <= r
        for s, c, r in zip(live, counts, batch.rooms, strict=True)
    ]
    queries, pivots = [], []
    for n, search in enumerate(live):
        if exact[n]:
            queries.append((n, search.rank - search.over))
            continue
        middle = (search.rank - search.over) / search.population * held[n]
        margin = 2 * held[n] ** 0.5 + 2  # four standard deviations of a sampled rank at the median
        edges = (int(middle - margin), int(middle + margin) + 1)
        queries += [(n, min(max(rank, 1), max(held[n], 1))) for rank in edges]
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
    del batch  # and its buffer: two would be a thirty-second of the model
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
        self.strides = dict.fromkeys(self.segments, 1)
        for search, room in zip(live, self.rooms, strict=True):
            if search.population > room:
                stride = max(self.strides[search.segment], search.population // SAMPLES)
                self.strides[search.segment] = stride

    def rank(self, edges: Sequence[tuple[int, int]], *, sample: bool) -> np.ndarray:
        """Counts each search against its (low, high): int64 (searches, 4), as rank_kernel does."""
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
        work = strides[:, 1]
        if sample:
            sectors = (strides[:, 1] + SECTOR - 1) // SECTOR
            work = (sectors + strides[:, 0] - 1) // strides[:, 0] * SECTOR
        batch = group(self.segments, self.rows, counts=work)
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
            STEP=VECTOR * lanes(),
            LANES=lanes(),
            SECTOR=SECTOR,
            HEAD=HEAD,
            WINDOW=WINDOW,
        )
        found = counts.cpu().numpy()
        return np.array([found[place[s.segment], s.delta] for s in self.live])

    def nth(self, queries: Sequence[tuple[int, int]], held: Sequence[int]) -> list[tuple[int, ...]]:
        """(value, values above, values equal) for each (search, rank from the largest) over its
        gathered values.
        """
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
            STEP=2048,
        )
        bits = (1 << 64) - 1
        return [(int(v) & bits, int(a), int(e)) for v, a, e in answers.cpu().numpy()]


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _bound(cut: _Search, row: Sequence[torch.Tensor]) -> int:
    """One past the last order that survives, from the complement that was ranked."""
    if row[0].numel() > NARROW:
        return (cut.value ^ ((1 << 64) - 1)) + 1
    order = cut.value ^ ((1 << 32) - 1)
    return (order if cut.ranked == BY_INDEX.value else order << 32) + 1


def _selection(spec: Sparsify, count: int, key: _Search | None, bound: int) -> Selection:
    asked = Selection(spec.kind, 0, 1 << 64, spec.tie_rule, spec.keep_below, spec.key)
    if spec.kind != MAGNITUDE:
        return asked._replace(kept=0 if spec.kind == RANDOM and not spec.keep_below else count)
    if key is None:  # nothing to keep: no key is above the largest
        return asked._replace(threshold_bits=0x7FFFFFFF, tie_bound=0)
    return asked._replace(threshold_bits=key.value, tie_bound=bound, kept=spec.keep, ties=key.equal)


def _is_measured(spec: Sparsify, count: int) -> bool:
    """Whether the L1 masses, or the number of entries kept at random, must be counted."""
    if spec.kind == RANDOM:
        return 0 < spec.keep_below < 1 << 32
    return spec.kind == MAGNITUDE and spec.rescale and 0 < spec.keep < count


def _measured(
    rows: Sequence[Sequence[torch.Tensor]],
    specs: Sequence[Sequence[Sparsify]],
    found: list[list[Selection]],
) -> list[list[Selection]]:
    """Fills in the L1 factors that were asked for and how many entries a random mask keeps."""
    keys = [
        (
            codes(row),
            tuple(rule_of(s, row[0].numel() > NARROW)[0] for s in chosen),
            row[0].numel() > NARROW,
            aligned(row),
        )
        if row[0].numel() and any(_is_measured(spec, row[0].numel()) for spec in given)
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
            STEP=VECTOR * lanes(),
            LANES=lanes(),
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
                if not _is_measured(spec, rows[i][0].numel()):
                    continue
                factor = _factor(mass[2 * d], mass[2 * d + 1]) if spec.rescale else 1.0
                found[i][d] = found[i][d]._replace(rescale=factor, kept=int(counts[d]))
    return found


def _factor(every: float, kept: float) -> float:
    """The L1 factor as fp32; 1 where either sum is below 1e-7 (mergekit 0.1.5, sparsify.py)."""
    return 1.0 if every < 1e-7 or kept < 1e-7 else float(np.float32(every / kept))
