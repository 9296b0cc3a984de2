"""A draw by rank: which entries of each vector their random words keep, without a sort of them all.

An entry stays where its word is below a bound that rises with its rank in its vector
(fastmerge.selection, RANKED). Words below all bounds or above them decide alone, and the others'
ranks need be known only as far as the decision asks:

1. sample: up to 512 values of each vector, where a value is an entry's magnitude and its order
   among equal ones, so that no two of a vector are the same whatever ties; sorted, they split it;
2. count: one pass over all entries counts those between neighbouring splitters;
3. decide: an entry lies between the ranks of two splitters. Its word is below the bound of the
   lower one, or not below that of the upper one, or, once in some thousand entries, in between;
4. those are sorted, and are the splitters of a second count: their ranks are its sums.

An entry of bf16 beside a base of bf16 moves some 25 bytes, in about forty launches for all tensors
that fit a buffer; a sort of all values in 64 bits moves 32 in each of its eight passes, and needs
forty bytes of memory an entry where this takes six. The counts are integers, so that neither the
sample nor the order in which programs run shows in the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from fastmerge.errors import FastmergeError, UnsupportedError
from fastmerge.kernels.common import (
    CHUNK,
    HEAD,
    MOST_REGISTERS,
    Group,
    Groups,
    codes,
    fetch,
    lanes,
    launch,
    locate,
    partition,
    runs,
    upload,
)
from fastmerge.kernels.masks import magnitude_key, mix32, random_words, rank_of
from fastmerge.selection import Sparsify

SPLITTERS = 512  # of a vector: torch sorts as many in one launch
APART = 8  # entries between two of them, at least
RUN = 16  # sampled entries that lie together: 32 bytes of bf16
MOST = 1 << 31  # elements of a slice, whose positions have 32 bits
DRAW = 8  # columns of a draw: see _Draws
BUFFER_BYTES = 1 << 30  # of device memory for the draws that share their launches


# --- on the device ------------------------------------------------------------------------------


@triton.jit
def _value(base, x, where, position, mask, CODES: tl.constexpr):
    """What orders the entries of a vector, from the smallest on (int64, not negative)."""
    delta = fetch(x, where, mask, CODES[1], False, True) - fetch(
        base, where, mask, CODES[0], False, True
    )
    return rank_of(magnitude_key(delta), position, False, False).to(tl.int64, bitcast=True)


@triton.jit
def _places(draw, start, STRIDED: tl.constexpr, BLOCK: tl.constexpr):
    """The vectors (int64, numbered through all draws) of BLOCK elements from flat index ``start``
    on, and their positions there (uint32).
    """
    slice_size, stride, first = tl.load(draw), tl.load(draw + 1), tl.load(draw + 2)
    size = slice_size.to(tl.uint32)
    position = (start % slice_size).to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
    across = position // size
    position -= across * size
    vector = start // slice_size + across.to(tl.int64)
    if STRIDED:
        step = stride.to(tl.uint32)
        within = position
        position = within // step
        vector = vector * stride + (within - position * step).to(tl.int64)
    return first + vector, position


@triton.jit
def _below(splitters, first, size, value, mask, steps):
    """How many of a vector's ``size`` splitters from ``first`` on are at most each value."""
    below = tl.zeros_like(value).to(tl.int32)
    before = splitters + first - 1
    for step in range(steps):
        probe = below + (1 << (steps - 1 - step))
        inside = mask & (probe <= size)
        splitter = tl.load(before + probe, mask=inside, other=0)
        below = tl.where(inside & (splitter <= value), probe, below)
    return below


@triton.jit
def sample_kernel(
    table, owners, draws, samples, count,
    CODES: tl.constexpr, SPLITTERS: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
    HEAD: tl.constexpr, DRAW: tl.constexpr,
):  # fmt: skip
    """SPLITTERS values of each vector, ``count`` in all, in runs of RUN entries at hashed places.

    owners: int32 (vectors,), each one's draw.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    number, sample = at // SPLITTERS, at % SPLITTERS
    owner = tl.load(owners + number, mask=mask, other=0).to(tl.int64)
    row, draw = table + owner * (HEAD + 2), draws + owner * DRAW
    slice_size, stride = tl.load(draw), tl.load(draw + 1)
    vector = number - tl.load(draw + 2)
    run = at // RUN
    apart = slice_size // stride // (SPLITTERS // RUN)
    shift = mix32(run.to(tl.uint32)).to(tl.int64) % (apart - (RUN - 1))
    position = run % (SPLITTERS // RUN) * apart + shift + sample % RUN
    where = vector // stride * slice_size + vector % stride + position * stride
    value = _value(tl.load(row + HEAD), tl.load(row + HEAD + 1), where, position, mask, CODES)
    tl.store(samples + at, value, mask=mask)


@triton.jit
def count_kernel(
    table, owners, draws, firsts, splitters, counts, steps,
    CODES: tl.constexpr, STRIDED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    HEAD: tl.constexpr, DRAW: tl.constexpr,
):  # fmt: skip
    """Adds 1 to an entry's bucket, of which a vector has one more than splitters.

    firsts: int64 (vectors + 1,), the first splitter of each. counts: int32 (1 + splitters +
    vectors,), one place further on. steps: bits of the most splitters of a vector.
    """
    segment, row, begin, end = locate(table, owners, HEAD + 2, CHUNK)
    draw = draws + segment * DRAW
    base, x = tl.load(row + HEAD), tl.load(row + HEAD + 1)
    for step in range(0, end - begin, BLOCK):
        start = begin + step
        where = start + tl.arange(0, BLOCK)
        mask = where < end
        vector, position = _places(draw, start, STRIDED, BLOCK)
        value = _value(base, x, where, position, mask, CODES)
        first = tl.load(firsts + vector, mask=mask, other=0)
        size = (tl.load(firsts + vector + 1, mask=mask, other=0) - first).to(tl.int32)
        bucket = first + vector + _below(splitters, first, size, value, mask, steps)
        tl.atomic_add(counts + 1 + bucket, 1, mask=mask, sem="relaxed")


@triton.jit
def _packed(flags, BLOCK: tl.constexpr):
    """Flags as bits of int32 words, the first one's the lowest."""
    bits = tl.reshape(flags.to(tl.int32), [BLOCK // 32, 32]) << tl.arange(0, 32)[None, :]
    return tl.sum(bits, 1)


@triton.jit
def decide_kernel(
    table, owners, draws, splitters, before, bounds, kept, undecided, steps,
    CODES: tl.constexpr, STRIDED: tl.constexpr, SPLITTERS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, HEAD: tl.constexpr, DRAW: tl.constexpr,
):  # fmt: skip
    """Bits of the entries that stay, and of those that their bucket does not decide.

    before: int64 (1 + splitters + vectors,), entries in all buckets before each. bounds: int64, by
    rank, from each draw's first on.
    """
    segment, row, begin, end = locate(table, owners, HEAD + 2, CHUNK)
    draw = draws + segment * DRAW
    base, x = tl.load(row + HEAD), tl.load(row + HEAD + 1)
    words, bounds = tl.load(draw + 3), bounds + tl.load(draw + 4)
    key = tl.load(draw + 5).to(tl.uint64, bitcast=True)
    low, top = tl.load(draw + 6), tl.load(draw + 7)
    for step in range(0, end - begin, BLOCK):
        start = begin + step
        where = start + tl.arange(0, BLOCK)
        word = random_words(key, start, BLOCK).to(tl.int64)
        within = (where < end) & (word >= low) & (word < top)
        vector, position = _places(draw, start, STRIDED, BLOCK)
        value = _value(base, x, where, position, within, CODES)
        first = vector * SPLITTERS
        below = _below(splitters, first, SPLITTERS, value, within, steps)
        own = tl.load(splitters + first + below - 1, mask=within & (below > 0), other=-1)
        bucket = first + vector + below
        none = tl.load(before + first + vector, mask=within, other=0)
        lowest = tl.load(before + bucket, mask=within, other=0) - none
        highest = tl.load(before + bucket + 1, mask=within, other=1) - none - 1
        highest = tl.where(own == value, lowest, highest)  # a splitter is its bucket's smallest
        surely = within & (word < tl.load(bounds + lowest, mask=within, other=0))
        maybe = within & (word < tl.load(bounds + highest, mask=within, other=0))
        to = start // 32 + tl.arange(0, BLOCK // 32)
        inside = to * 32 < end
        tl.store(kept + words + to, _packed((where < end) & (word < low) | surely, BLOCK), inside)
        tl.store(undecided + words + to, _packed(maybe & ~surely, BLOCK), inside)


@triton.jit
def look_kernel(
    table, draws, owners, indices, values, vectors, words, count,
    CODES: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr, DRAW: tl.constexpr,
):  # fmt: skip
    """The value, vector and random word of ``count`` entries, given by draw and flat index."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    owner = tl.load(owners + at, mask=mask, other=0)
    where = tl.load(indices + at, mask=mask, other=0)
    row, draw = table + owner * (HEAD + 2), draws + owner * DRAW
    slice_size, stride = tl.load(draw), tl.load(draw + 1)
    within = where % slice_size
    position = within // stride
    vector = tl.load(draw + 2) + where // slice_size * stride + within % stride
    value = _value(tl.load(row + HEAD), tl.load(row + HEAD + 1), where, position, mask, CODES)
    key, counter = tl.load(draw + 5).to(tl.uint64, bitcast=True), where // 4
    none = counter.to(tl.uint32) * 0
    a, b, c, d = tl.philox(key, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), none, none)
    lane = where % 4
    word = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
    tl.store(values + at, value, mask=mask)
    tl.store(vectors + at, vector, mask=mask)
    tl.store(words + at, word.to(tl.int64), mask=mask)


# --- on the host --------------------------------------------------------------------------------


class DrawBatch:
    """Draws by rank in many deltas, each of a pair of tensors (base, x), as often as requests are
    given. The tensors must keep their memory.
    """

    def __init__(self, pairs: Sequence[Sequence[torch.Tensor]]) -> None:
        self._pairs = pairs
        self._groups = Groups(pairs)

    def run(self, specs: Mapping[int, Sparsify]) -> dict[int, torch.Tensor]:
        """For each pair in ``specs`` its mask: int32 words of bits, one per element."""
        found = {}
        wanted = list(specs)
        for i in wanted:
            _check(self._pairs[i][0].numel(), specs[i])
        keys = [
            (codes(self._pairs[i]), specs[i].stride > 1, splitters_of(specs[i].length))
            if self._pairs[i][0].numel()
            else None
            for i in wanted
        ]
        for key, places in partition(keys).items():
            members = [wanted[place] for place in places]
            if key is None:
                found |= {i: self._pairs[i][0].new_empty(0, dtype=torch.int32) for i in members}
                continue
            needs = [drawn_bytes(self._pairs[i][0].numel(), specs[i].length) for i in members]
            for some in runs(members, needs, BUFFER_BYTES):
                counts = [self._pairs[i][0].numel() for i in some]
                of = _Draws.of(self._groups.of(some), counts, [specs[i] for i in some], *key)
                found |= dict(zip(some, of.masks(), strict=True))
        return found


class _Draws(NamedTuple):
    """Draws that share their launches, and what those read.

    ``draws``: int64 (draws, DRAW): elements of a slice, stride, first vector, first word, first
    bound, key, the lowest bound and the highest.
    """

    batch: Group
    draws: torch.Tensor
    bounds: torch.Tensor
    vectors: np.ndarray  # int64 (draws + 1,): the first of each draw, and their number
    words: np.ndarray  # the same of the mask's words
    kinds: tuple[int, ...]
    strided: bool
    width: int  # splitters of a vector

    @classmethod
    def of(
        cls,
        batch: Group,
        counts: Sequence[int],
        specs: Sequence[Sparsify],
        kinds: tuple[int, ...],
        strided: bool,
        width: int,
    ) -> _Draws:
        device = batch.table.device
        vectors, words = np.zeros((2, len(specs) + 1), dtype=np.int64)
        vectors[1:] = np.cumsum([n // spec.length for n, spec in zip(counts, specs, strict=True)])
        words[1:] = np.cumsum([-(-n // 32) for n in counts])
        tables: dict[tuple[int, int, int], int] = {}
        made, size, rows = [], 0, []
        for n, spec in enumerate(specs):
            bound = (spec.length, spec.keep_below, spec.keep_below_top)
            if bound not in tables:
                tables[bound] = size
                made.append(_bounds(*bound, device))
                size += spec.length
            key = spec.key - (1 << 64) if spec.key >= 1 << 63 else spec.key
            rows.append(
                [
                    spec.length * spec.stride, spec.stride, vectors[n], words[n], tables[bound],
                    key, spec.keep_below, spec.keep_below_top,
                ]
            )  # fmt: skip
        draws = upload(np.array(rows, dtype=np.int64), device)
        return cls(batch, draws, torch.cat(made), vectors, words, kinds, strided, width)

    def masks(self) -> list[torch.Tensor]:
        device, vectors = self.draws.device, int(self.vectors[-1])
        each = torch.arange(len(self.draws), device=device, dtype=torch.int32)
        many = upload(np.diff(self.vectors), device)
        samples = torch.empty(vectors, self.width, dtype=torch.int64, device=device)
        launch(
            sample_kernel, triton.cdiv(samples.numel(), _step()), device, self.batch.table,
            each.repeat_interleave(many, output_size=vectors), self.draws, samples,
            samples.numel(),
            CODES=self.kinds, SPLITTERS=self.width, RUN=min(RUN, self.width), BLOCK=_step(),
            HEAD=HEAD, DRAW=DRAW, registers=MOST_REGISTERS,
        )  # fmt: skip
        splitters = samples.sort(dim=1).values.view(-1)
        del samples
        firsts = torch.arange(vectors + 1, device=device) * self.width
        steps = self.width.bit_length()
        before = self._counted(firsts, splitters, steps)
        kept = torch.empty(int(self.words[-1]), dtype=torch.int32, device=device)
        undecided = torch.empty_like(kept)
        launch(
            decide_kernel, self.batch.chunks, device, self.batch.table, self.batch.owners,
            self.draws, splitters, before, self.bounds, kept, undecided, steps,
            CODES=self.kinds, STRIDED=self.strided, SPLITTERS=self.width, CHUNK=CHUNK,
            BLOCK=_step(), HEAD=HEAD, DRAW=DRAW, registers=MOST_REGISTERS,
        )  # fmt: skip
        del splitters, before
        self._settle(kept, undecided)
        return [kept[a:b] for a, b in zip(self.words[:-1], self.words[1:], strict=True)]

    def _counted(self, firsts: torch.Tensor, splitters: torch.Tensor, steps: int) -> torch.Tensor:
        """How many entries lie before each bucket, in all vectors."""
        device = self.draws.device
        counts = torch.zeros(len(splitters) + len(firsts), dtype=torch.int32, device=device)
        launch(
            count_kernel, self.batch.chunks, device, self.batch.table, self.batch.owners,
            self.draws, firsts, splitters, counts, steps,
            CODES=self.kinds, STRIDED=self.strided, CHUNK=CHUNK, BLOCK=_step(), HEAD=HEAD,
            DRAW=DRAW, registers=MOST_REGISTERS,
        )  # fmt: skip
        return counts.cumsum(0)

    def _settle(self, kept: torch.Tensor, undecided: torch.Tensor) -> None:
        """Sets the bits of those undecided that stay: by their ranks, which are counted."""
        device = kept.device
        some = undecided.nonzero().view(-1)
        if not len(some):
            return
        bits = undecided[some][:, None] >> torch.arange(32, device=device, dtype=torch.int32) & 1
        which, bit = bits.nonzero(as_tuple=True)
        word = some[which]
        begins = upload(self.words[:-1], device)
        owner = torch.searchsorted(begins, word, right=True) - 1
        index = (word - begins[owner]) * 32 + bit
        count = len(index)
        values, vectors, words = torch.empty(3, count, dtype=torch.int64, device=device)
        launch(
            look_kernel, triton.cdiv(count, _step()), device, self.batch.table, self.draws, owner,
            index, values, vectors, words, count,
            CODES=self.kinds, BLOCK=_step(), HEAD=HEAD, DRAW=DRAW, registers=MOST_REGISTERS,
        )  # fmt: skip
        order = values.argsort()
        order = order[vectors[order].argsort(stable=True)]
        vector = vectors[order]
        numbers = torch.arange(int(self.vectors[-1]) + 1, device=device)
        firsts = torch.searchsorted(vector, numbers)
        steps = int(firsts.diff().max()).bit_length()
        before = self._counted(firsts, values[order], steps)
        # A vector has one bucket more than splitters, and each splitter is its bucket's smallest.
        bucket = torch.arange(1, count + 1, device=device) + vector
        rank = before[bucket] - before[firsts[vector] + vector]
        stays = words[order] < self.bounds[self.draws[owner[order], 4] + rank]
        chosen = order[stays]
        # Each bit is added once: a sum of integers, whose order shows nowhere.
        kept.index_add_(0, word[chosen], torch.ones_like(bit[chosen]).int() << bit[chosen].int())


def _bounds(length: int, low: int, top: int, device: torch.device) -> torch.Tensor:
    """`selection.rank_bound` by rank, int64."""
    if length == 1:
        return torch.full([1], (low + top) // 2, dtype=torch.int64, device=device)
    last = length - 1
    rank = torch.arange(length, dtype=torch.int64, device=device)
    return low + (rank * (top - low) + last // 2) // last


def splitters_of(length: int) -> int:
    """How many entries of a vector are sampled: a power of two."""
    return int(min(SPLITTERS, 1 << max(0, (length // APART).bit_length() - 1)))


def drawn_bytes(count: int, length: int) -> int:
    """Device memory that the draw in one delta takes meanwhile, about: of every splitter its
    value, its place in the sort and its sums, and the few entries that they leave undecided.
    """
    splitters = count // length * splitters_of(length)
    return 40 * splitters + count // 2 + 8 * length


def _step() -> int:
    """Elements of one step of a program."""
    return 8 * lanes()


def _check(count: int, spec: Sparsify) -> None:
    length, stride = spec.length, spec.stride
    if count and (length < 1 or stride < 1 or count % (length * stride)):
        raise FastmergeError(
            f"length {length}, stride {stride}: their product must divide the {count} elements"
        )
    if not 0 <= spec.keep_below <= spec.keep_below_top <= 1 << 32:
        raise FastmergeError(
            f"keep_below {spec.keep_below} to {spec.keep_below_top}: use 0 to 2**32, rising"
        )
    if length * stride >= MOST:
        raise UnsupportedError(
            f"slices of {length * stride} elements: the GPU ranks in slices of fewer than {MOST}; "
            "use device cpu"
        )
