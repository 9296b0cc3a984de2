"""select: which entries of each delta survive, exactly and without a sort; a batch of tensors per
launch.

A trim needs the keep-th of all entries, ranked by magnitude and, where magnitudes tie, by order
(fastmerge.selection): one 64-bit number, no two of which are equal (`masks.rank_of`). A 2**11-bin
histogram in Triton costs tens of instructions an entry, more than the memory traffic; Floyd and
Rivest's SELECT ("Expected time bounds for selection", CACM 18(3), 1975) costs two compares:

1. sample: 2**17 entries of each delta, in 16-element sectors at hashed places, go to a buffer; a
   radix search over the buffer finds two pivots that bracket the wanted rank within about 1 %;
2. count: one pass over all entries counts those above the pivots and gathers those between;
3. a radix search over the gathered few, by a program for each 2**15 of them and a launch for each
   digit, finds the entry. Where the sample misled, the counts say where the entry lies, and the
   search goes on there: the answer never depends on the sample.

All counts are integers, and the place of a gathered value means nothing, so the order in which
programs run does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from fastmerge.errors import FastmergeError, UnsupportedError
from fastmerge.kernels.common import (
    CHUNK,
    HEAD,
    MOST_REGISTERS,
    Groups,
    aligned,
    check,
    codes,
    group,
    lanes,
    launch,
    partition,
    runs,
    upload,
)
from fastmerge.kernels.draw import DrawBatch
from fastmerge.kernels.gram import reduce_kernel
from fastmerge.kernels.masks import RULE, rule_of
from fastmerge.kernels.ranking import (
    BY_INDEX,
    BY_MIXED,
    SKIP,
    VECTOR,
    measure_kernel,
    nth_kernel,
    rank_kernel,
)
from fastmerge.selection import EVERY, INDEX, MAGNITUDE, RANDOM, RANKED, Selection, Sparsify

SAMPLES = 1 << 17
ROOM = 1 << 17  # values that a delta of more entries can gather, or 1/64 of them if that is more
BUFFER_BYTES = 1 << 30  # of device memory for the searches that share a pass
GRANULE = 128  # of them that a program takes at a time: what it leaves empty is noise
SECTOR = 16  # sampled elements that lie together: 32 bytes of bf16
MOST_PASSES = 200  # a search takes one to three; every pass shrinks what is left
SIGMAS = 4.0  # of a sampled rank, on either side of it, that the pivots bracket
WINDOW = 4  # columns: low, high, first slot, slots
COUNTS = 3  # columns: granules, inside, above
QUERY = 6  # columns: first slot, slots, rank, bits, the bits above, first program
LEVELS = 8  # digits of a value
PART = 1 << 15  # gathered values of one program: 256 KiB
DELTAS = 4  # deltas that share a launch; more would take tens of seconds to compile
NARROW = 1 << 32  # tensors up to this length have 32-bit orders
MOST = 1 << 33  # elements, beyond which magnitude and order do not fit 64 bits

Bool = NDArray[np.bool_]
UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]


def select(
    inputs: Sequence[torch.Tensor], base: torch.Tensor, specs: Sequence[Sparsify]
) -> list[Selection]:
    """`_C.select` on the device; waits for it."""
    return select_many([inputs], [base], [specs])[0]


def select_many(
    inputs: Sequence[Sequence[torch.Tensor]],
    bases: Sequence[torch.Tensor],
    specs: Sequence[Sequence[Sparsify]],
) -> list[list[Selection]]:
    """`select` of many tensors in a handful of launches. See `SelectBatch.run`."""
    return SelectBatch(inputs, bases).run(specs)


class SelectBatch:
    """`select` of many tensors, as often as requests are given.

    The tensors' checks and tables are made once; the tensors must keep their memory.
    """

    def __init__(
        self, inputs: Sequence[Sequence[torch.Tensor]], bases: Sequence[torch.Tensor]
    ) -> None:
        for xs, base in zip(inputs, bases, strict=True):
            check(xs, base, None)
        self._widths = [len(xs) for xs in inputs]
        self._parts = [(n, at) for n, xs in enumerate(inputs) for at in range(0, len(xs), DELTAS)]
        self._rows = [[bases[n], *inputs[n][at : at + DELTAS]] for n, at in self._parts]
        self._keys = [(codes(row), row[0].numel() > NARROW, aligned(row)) for row in self._rows]
        self._tables: dict[tuple[int, ...], _Tables] = {}
        self._groups = Groups(self._rows)  # of what is measured
        self._deltas = [(i, d) for i, row in enumerate(self._rows) for d in range(len(row) - 1)]
        self._draws = DrawBatch([[self._rows[i][0], self._rows[i][1 + d]] for i, d in self._deltas])

    def run(self, specs: Sequence[Sequence[Sparsify]]) -> list[list[Selection]]:
        """The selections, one per input of each tensor; waits for the device."""
        wanted = []
        for n, at in self._parts:
            if len(specs[n]) != self._widths[n]:
                raise FastmergeError(
                    f"{self._widths[n]} inputs and {len(specs[n])} sparsifiers; give one each"
                )
            wanted.append(specs[n][at : at + DELTAS])
        for row, given in zip(self._rows, wanted, strict=True):
            _check(row[0].numel(), given)
        found = self._trimmed(wanted)
        drawn = {n: wanted[i][d] for n, (i, d) in enumerate(self._deltas)}
        drawn = {n: spec for n, spec in drawn.items() if spec.kind == RANKED}
        for n, mask in self._draws.run(drawn).items():
            i, d = self._deltas[n]
            found[i][d] = found[i][d]._replace(mask=mask)
        self._measure(wanted, found)
        chosen: list[list[Selection]] = [[] for _ in self._widths]
        for (n, _), selections in zip(self._parts, found, strict=True):
            chosen[n] += selections
        return chosen

    def _trimmed(self, wanted: Sequence[Sequence[Sparsify]]) -> list[list[Selection]]:
        found = [
            [_unsearched(spec, row[0].numel()) for spec in given]
            for row, given in zip(self._rows, wanted, strict=True)
        ]
        rules = [
            tuple(_ranked(spec, row[0].numel()) for spec in given)
            for row, given in zip(self._rows, wanted, strict=True)
        ]
        for (key, ranked), members in partition(list(zip(self._keys, rules, strict=True))).items():
            needs = [
                gathered_bytes(self._rows[i][0].numel()) * (len(self._rows[i]) - 1) for i in members
            ]
            for some in runs(members, needs, BUFFER_BYTES) if any(ranked) else []:
                if (those := tuple(some)) not in self._tables:
                    self._tables[those] = _Tables([self._rows[i] for i in some])
                tables, own = self._tables[those], [wanted[i] for i in some]
                skips = np.array([[spec.skip for spec in given] for given in own], dtype=np.int64)
                keeps = np.array([[spec.keep for spec in given] for given in own], dtype=np.int64)
                searched = np.array([rule != SKIP.value for rule in ranked])
                last = _answers(tables, (skips + keeps) * searched, (*key, ranked))
                skips *= searched
                over = _answers(tables, skips, (*key, ranked)) if skips.any() else skips
                for n, i in enumerate(some):
                    for d in np.flatnonzero(searched):
                        cut = _cut(int(last[n, d]), ranked[d], own[n][d], wide=key[1])
                        found[i][d] = found[i][d]._replace(threshold_bits=cut[0], tie_bound=cut[1])
                        if skips[n, d]:
                            cut = _cut(int(over[n, d]), ranked[d], own[n][d], wide=key[1])
                            found[i][d] = found[i][d]._replace(
                                ceiling_bits=cut[0], ceiling_bound=cut[1]
                            )
        return found

    def _measure(self, specs: Sequence[Sequence[Sparsify]], found: list[list[Selection]]) -> None:
        """Fills in the L1 factors that were asked for and how many entries a draw keeps."""
        keys = [
            (*key, tuple(rule_of(s, key[1])[0] for s in chosen))
            if any(_is_measured(spec, row[0].numel()) for spec in given)
            else None
            for key, row, given, chosen in zip(self._keys, self._rows, specs, found, strict=True)
        ]
        for key, members in partition(keys).items():
            if key is None:
                continue
            kinds, wide, straight, modes = key
            batch = self._groups.of(members)
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
                STEP=_step(),
                LANES=lanes(),
                HEAD=HEAD,
                RULE=RULE,
                registers=MOST_REGISTERS,
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
            both = zip(members, sums.cpu().numpy(), kept.cpu().numpy(), strict=True)
            for i, mass, counts in both:
                for d, spec in enumerate(specs[i]):
                    if not _is_measured(spec, self._rows[i][0].numel()):
                        continue
                    factor = _factor(mass[2 * d], mass[2 * d + 1]) if spec.rescale else 1.0
                    found[i][d] = found[i][d]._replace(rescale=factor, kept=int(counts[d]))


def _check(count: int, specs: Sequence[Sparsify]) -> None:
    for spec in specs:
        if not (0 <= spec.keep <= count and 0 <= spec.skip <= count - spec.keep):
            both = f"keep {spec.keep}, skip {spec.skip}"
            raise FastmergeError(f"{both}: use 0 to {count}, the element count, together")
        if spec.kind == MAGNITUDE and count > MOST:
            raise UnsupportedError(
                f"{count} elements: the GPU trims tensors of up to {MOST}; use device cpu"
            )


def _ranked(spec: Sparsify, count: int) -> int:
    """The rule that the kernel ranks this delta by."""
    if spec.kind != MAGNITUDE or spec.keep == 0 or count == 0:
        return int(SKIP.value)
    return int((BY_INDEX if spec.tie_rule == INDEX else BY_MIXED).value)


def _unsearched(spec: Sparsify, count: int) -> Selection:
    """The selection as far as it follows from the request alone."""
    if spec.kind != MAGNITUDE:
        return Selection.asked(spec, 0 if spec.kind == RANDOM and not spec.keep_below else count)
    # To keep nothing: no key is above the largest, none is tied with it.
    return Selection.asked(spec, spec.keep)._replace(threshold_bits=0x7FFFFFFF, tie_bound=0)


def _cut(value: int, rule: int, spec: Sparsify, *, wide: bool) -> tuple[int, int | None]:
    """The threshold and tie bound that keep `masks.rank_of` down to value."""
    bits = 33 if wide else 32
    if spec.tie_rule == EVERY:
        return value >> bits, None
    order = (1 << bits) - 1 - (value & ((1 << bits) - 1))
    if rule != BY_INDEX.value:
        order = (order >> 1) << 32 | (order & 1) if wide else order << 32
    return value >> bits, order + 1


def _room(count: int) -> int:
    """Slots for the values of one delta that a pass gathers."""
    # A chunk is whole granules, so that all entries of a small one fit in as many slots.
    wanted = count if count <= ROOM else max(ROOM, count // 64)
    return -(-wanted // GRANULE) * GRANULE


def _step() -> int:
    """Elements of one step of a program."""
    return int(VECTOR.value) * lanes()


def gathered_bytes(count: int) -> int:
    """Device memory that the search in one delta of ``count`` elements takes, about."""
    return 8 * (_room(count) + _step())


class _Tables:
    """What the kernels read of tensors that go through each launch together."""

    def __init__(self, rows: Sequence[Sequence[torch.Tensor]]) -> None:
        self.rows = rows
        self.device = rows[0][0].device
        self.lengths = np.array([row[0].numel() for row in rows], dtype=np.int64)
        self.strides = -(-self.lengths // SAMPLES)
        sectors = -(-self.lengths // SECTOR)
        samples = -(-sectors // self.strides) * SECTOR
        everyone = list(range(len(rows)))
        self.whole = group(everyone, rows)
        self.sample = group(everyone, rows, counts=samples)
        self.sampling = upload(np.stack([self.strides, self.lengths], axis=1), self.device)
        self.rooms = np.array([_room(count) for count in self.lengths.tolist()], dtype=np.int64)

    def take(self, members: Int64) -> _Tables:
        return self if len(members) == len(self.rows) else _Tables([self.rows[i] for i in members])


@dataclass
class _Search:
    """Where the rank-th largest value of each delta can lie. Arrays (segments, deltas)."""

    rank: Int64  # from 1; 0 where nothing is searched
    floor: UInt64
    ceiling: UInt64
    over: Int64  # values above the ceiling
    population: Int64  # values from floor to ceiling
    stalled: Int64  # passes, up to the last, that left more than three quarters of them
    live: Bool
    value: UInt64

    @classmethod
    def of(cls, rank: Int64, lengths: Int64) -> _Search:
        none = np.zeros_like(rank)
        return cls(
            rank=rank,
            floor=none.astype(np.uint64),
            ceiling=np.full(rank.shape, (1 << 64) - 1, dtype=np.uint64),
            over=none,
            population=none + lengths[:, None],
            stalled=none,
            live=rank > 0,
            value=none.astype(np.uint64),
        )

    def take(self, members: Int64) -> _Search:
        return _Search(*(getattr(self, field.name)[members] for field in fields(self)))

    def edges(self, held: Int64, exact: Bool) -> tuple[Int64, Int64, Bool, Bool]:
        """Ranks of the pivots among the held sampled values, from 1, and where there are no such
        ranks: (high, low, no high, no low). After a pass that led nowhere, the middle of what is
        held, so that the search goes on in one half of what it has left.
        """
        share = (self.rank - self.over) / np.maximum(self.population, 1)
        spread = SIGMAS * np.sqrt(held * share * (1 - share).clip(0)) + 2
        spread = np.where(exact | (self.stalled > 0), 0, spread)
        middle = np.where(exact, self.rank - self.over, share * held)
        middle = np.where(~exact & (self.stalled > 0), (held + 1) // 2, middle)
        high = np.floor(middle - spread).astype(np.int64)
        low = np.ceil(middle + spread).astype(np.int64)
        return high.clip(1), np.minimum(low, held).clip(1), high < 1, low > held

    def narrow(self, low: UInt64, high: UInt64, inside: Int64, above: Int64) -> Bool:
        """Takes the exact counts against the window [low, high]; where the value lies in it."""
        one = np.uint64(1)
        upper = above + inside
        over, under = self.rank <= above, self.rank > upper
        between = ~over & ~under
        before = self.population
        self.population = np.where(
            over, above - self.over, np.where(between, inside, before - (upper - self.over))
        )
        self.floor = np.where(over, high + one, np.where(between, low, self.floor))
        self.ceiling = np.where(between, high, np.where(under, low - one, self.ceiling))
        self.over = np.where(between, above, np.where(under, upper, self.over))
        self.stalled = np.where(4 * self.population > 3 * before, self.stalled + 1, 0)
        return between


def _answers(tables: _Tables, ranks: Int64, key: tuple[Any, ...]) -> UInt64:
    """The ranks-th largest values, uint64 (segments, deltas); 0 where the rank is 0."""
    values = np.zeros(ranks.shape, dtype=np.uint64)
    members = np.arange(len(ranks))
    search = _Search.of(ranks, tables.lengths)
    for _ in range(MOST_PASSES):
        if not search.live.any():
            return values
        left = np.flatnonzero(search.live.any(axis=1))
        members, search, tables = members[left], search.take(left), tables.take(left)
        _pass(_Batch(tables, key), search)
        values[members] = np.where(search.live, values[members], search.value)
    if search.live.any():
        raise RuntimeError(f"select: no end to the search: {search}")
    return values


def _pass(batch: _Batch, search: _Search) -> None:
    """One sample and one count of every live search; ends or narrows it."""
    tables = batch.tables
    rooms = np.broadcast_to(tables.rooms[:, None], search.rank.shape)
    taken, inside, _ = batch.rank(search.live, search.floor, search.ceiling, sample=True)
    held = np.minimum(inside, rooms)
    exact = (tables.strides == 1)[:, None] & (taken * GRANULE <= rooms)
    upper_rank, lower_rank, no_high, no_low = search.edges(held, exact)
    sampled = search.live & (held > 0)
    slots = np.minimum(taken * GRANULE, rooms)
    pivots = np.stack([upper_rank, lower_rank])
    high, low = batch.nth(sampled, slots, pivots, search.floor, search.ceiling)
    # So few that they most likely fit; or, where the sample leads nowhere either, half the range.
    few = (search.population <= rooms // 2) & (search.stalled == 0)
    middle = search.floor + (search.ceiling - search.floor) // np.uint64(2)
    halved = (search.stalled > 1) & (search.stalled % 2 == 0) | ~few & (held == 0)
    low = np.where(few & ~exact | no_low, search.floor, low)
    high = np.where(few & ~exact | no_high, search.ceiling, high)
    high = np.where(halved, middle, high)
    low = np.minimum(np.where(halved, middle, low), high)

    taken, inside, above = batch.rank(search.live, low, high, sample=False)
    fits = search.live & search.narrow(low, high, inside, above) & (taken * GRANULE <= rooms)
    (found,) = batch.nth(fits, taken * GRANULE, (search.rank - search.over)[None], low, high)
    search.value = np.where(fits, found, search.value)
    search.live &= ~fits


class _Batch:
    """The launches of one pass over alike tensors, and their buffer."""

    def __init__(self, tables: _Tables, key: tuple[Any, ...]) -> None:
        self.tables = tables
        self.kinds, self.wide, self.straight, self.ranked = key
        k = len(self.ranked)
        slots = np.repeat(tables.rooms, k) + _step()  # what a step without room overwrites
        self.firsts = (np.cumsum(slots) - slots).reshape(-1, k)
        self.buffer = torch.empty(int(slots.sum()), dtype=torch.int64, device=tables.device)

    def rank(
        self, live: Bool, low: UInt64, high: UInt64, *, sample: bool
    ) -> tuple[Int64, Int64, Int64]:
        """Counts each live search against [low, high]: granules taken, values inside, above."""
        tables = self.tables
        windows = np.zeros((*live.shape, WINDOW), dtype=np.int64)
        # Where nothing is searched, nothing lies from 1 to 0.
        windows[..., 0] = np.where(live, low, np.uint64(1)).view(np.int64)
        windows[..., 1] = np.where(live, high, np.uint64(0)).view(np.int64)
        windows[..., 2], windows[..., 3] = self.firsts, tables.rooms[:, None]
        counts = torch.zeros(*live.shape, COUNTS, dtype=torch.int64, device=tables.device)
        batch = tables.sample if sample else tables.whole
        launch(
            rank_kernel,
            batch.chunks,
            tables.device,
            batch.table,
            batch.owners,
            tables.sampling,
            upload(windows, tables.device),
            counts,
            self.buffer,
            CODES=self.kinds,
            RANKED=self.ranked,
            SAMPLE=sample,
            WIDE=self.wide,
            ALIGNED=self.straight,
            CHUNK=CHUNK,
            LANES=lanes(),
            SECTOR=SECTOR,
            HEAD=HEAD,
            WINDOW=WINDOW,
            COUNTS=COUNTS,
            GRANULE=GRANULE,
            registers=MOST_REGISTERS,
        )
        taken, inside, above = np.moveaxis(counts.cpu().numpy(), -1, 0)
        return taken, inside, above

    def nth(self, asked: Bool, slots: Int64, ranks: Int64, low: UInt64, high: UInt64) -> UInt64:
        """The ranks-th largest, (n, *asked.shape), of the values gathered from [low, high], where
        asked; else 0.
        """
        edges = zip(low[asked].tolist(), high[asked].tolist(), strict=True)
        bits = [(a ^ b).bit_length() for a, b in edges]  # above these low and high are the same
        if not bits:
            return np.zeros(ranks.shape, dtype=np.uint64)
        table = np.zeros((len(ranks), len(bits), QUERY), dtype=np.int64)
        table[..., 0], table[..., 1] = self.firsts[asked], slots[asked]
        table[..., 2], table[..., 3] = ranks[:, asked], bits
        shared = [b >> n for b, n in zip(high[asked].tolist(), bits, strict=True)]
        table[..., 4] = np.array(shared, dtype=np.uint64).view(np.int64)
        queries, device = table.reshape(-1, QUERY), self.tables.device
        programs = -(-queries[:, 1] // PART)
        queries[:, 5] = np.cumsum(programs) - programs
        owners = np.repeat(np.arange(len(queries), dtype=np.int32), programs)
        given = [self.buffer, upload(queries, device), upload(owners, device)]
        histograms = torch.zeros(len(queries), LEVELS, 256, dtype=torch.int32, device=device)
        found = torch.zeros(len(queries), dtype=torch.int64, device=device)
        for level in range(-(-max(bits) // 8) + 1):
            launch(
                nth_kernel,
                len(owners),
                device,
                *given,
                histograms,
                found,
                level,
                QUERY=QUERY,
                LEVELS=LEVELS,
                PART=PART,
                STEP=2048,
                registers=MOST_REGISTERS,
            )
        answers = np.zeros(ranks.shape, dtype=np.uint64)
        answers[:, asked] = found.cpu().numpy().view(np.uint64).reshape(table.shape[:2])
        return answers


def _is_measured(spec: Sparsify, count: int) -> bool:
    """Whether the L1 masses, or the number of entries that a draw keeps, must be counted."""
    if not count:
        return False
    if spec.kind == RANDOM:
        return 0 < spec.keep_below < 1 << 32
    if spec.kind == RANKED:
        return True
    return spec.kind == MAGNITUDE and spec.rescale and 0 < spec.keep < count


def _factor(every: float, kept: float) -> float:
    """The L1 factor as fp32; 1 where either sum is below 1e-7 (mergekit 0.1.5, sparsify.py)."""
    return 1.0 if every < 1e-7 or kept < 1e-7 else float(np.float32(every / kept))
