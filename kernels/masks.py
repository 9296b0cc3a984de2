"""Which entries of a delta survive: the keys, orders, random words and rules that select, its
ranking and consensus share.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmerge.selection import INDEX, MAGNITUDE, RANDOM, RANKED, Selection

# How one delta's entries are kept, a compile-time choice per delta.
KEEP_ALL: tl.constexpr = tl.constexpr(0)
KEEP_RANDOM: tl.constexpr = tl.constexpr(1)
KEEP_MIXED: tl.constexpr = tl.constexpr(2)  # key > threshold, or tied and mixed index <= last
KEEP_INDEX: tl.constexpr = tl.constexpr(3)  # key > threshold, or tied and flat index <= last
# As these two, but for those that the same says of a ceiling.
BAND_MIXED: tl.constexpr = tl.constexpr(4)
BAND_INDEX: tl.constexpr = tl.constexpr(5)
KEEP_MASKED: tl.constexpr = tl.constexpr(6)  # the entry's bit in 32-bit words
# Rule columns per delta: threshold; last (both rules) or keep_below; key; ceiling and its last. Of
# a mask: the address of the word of flat index 0, and the number of its last word.
RULE = 5


@triton.jit
def magnitude_key(delta):
    """|delta| as 31 bits that order like the magnitudes; every NaN is one key, above infinity."""
    key = delta.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    return tl.minimum(key, 0x7FC00000)


@triton.jit
def mix32(h):
    """murmur3's 32-bit finaliser (the mixed index of fastmerge.selection)."""
    h = h ^ (h >> 16)
    h = tl.mul(h, 0x85EBCA6B, sanitize_overflow=False)
    h = h ^ (h >> 13)
    h = tl.mul(h, 0xC2B2AE35, sanitize_overflow=False)
    return h ^ (h >> 16)


@triton.jit
def order_of(index, INDEX_RULE: tl.constexpr, WIDE: tl.constexpr):
    """The order in which ties are taken: uint32 below 2**32 elements, else (WIDE) uint64."""
    low = index.to(tl.uint32)
    if WIDE:
        high = (index >> 32).to(tl.uint32)
        if INDEX_RULE:
            order = index.to(tl.uint64)
        else:
            mixed = mix32(low ^ tl.mul(high, 0x9E3779B9, sanitize_overflow=False))
            order = (mixed.to(tl.uint64) << 32) | high.to(tl.uint64)
    else:
        order = low if INDEX_RULE else mix32(low)
    return order


@triton.jit
def rank_of(key, index, INDEX_RULE: tl.constexpr, WIDE: tl.constexpr):
    """One number (uint64) that ranks entries as a trim keeps them, largest first: by magnitude,
    ties by order. No two entries of a tensor of up to 2**33 elements have the same.
    """
    order = order_of(index, INDEX_RULE, WIDE)
    if WIDE:  # 31 bits of magnitude, 33 of order: of a mixed order's upper word only bit 0 is used
        if not INDEX_RULE:
            order = ((order >> 32) << 1) | (order & 1)
        rank = (key.to(tl.uint64) << 33) | (order ^ 0x1FFFFFFFF)
    else:
        rank = (key.to(tl.uint64) << 32) | (order ^ 0xFFFFFFFF).to(tl.uint64)
    return rank


@triton.jit
def random_words(key, first, COUNT: tl.constexpr):
    """COUNT words from element ``first`` (a multiple of 4) on: Philox4x32-10, four elements a
    counter.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11), which tl.philox implements.
    """
    counter = first // 4 + tl.arange(0, COUNT // 4)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    none = low * 0
    a, b, c, d = tl.philox(key, low, high, none, none)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [COUNT])


@triton.jit
def load_rule(rule, MODE: tl.constexpr, WIDE: tl.constexpr):
    """A delta's RULE int64 numbers as `survives` takes them: of a trim below 2**32 elements the
    first is `rank_of` the last entry that survives, the fourth of the last that is dropped.
    """
    first, last, key = tl.load(rule), tl.load(rule + 1), tl.load(rule + 2)
    ceiling, end = first, last
    if MODE == BAND_MIXED or MODE == BAND_INDEX:
        ceiling, end = tl.load(rule + 3), tl.load(rule + 4)
    if MODE >= KEEP_MIXED and MODE != KEEP_MASKED and not WIDE:
        first = (first << 32) | (last ^ 0xFFFFFFFF)
        ceiling = (ceiling << 32) | (end ^ 0xFFFFFFFF)
    return (
        first.to(tl.uint64, bitcast=True),
        last,
        key.to(tl.uint64, bitcast=True),
        ceiling.to(tl.uint64, bitcast=True),
        end,
    )


@triton.jit
def _above(delta, index, limit, last, INDEX_RULE: tl.constexpr, WIDE: tl.constexpr):
    """Which entries are larger than a limit, ties by their order up to last."""
    if WIDE:
        magnitude, threshold = magnitude_key(delta), limit.to(tl.uint32)
        order = order_of(index, INDEX_RULE, True)
        tied = (magnitude == threshold) & (order <= last.to(tl.uint64, bitcast=True))
        found = (magnitude > threshold) | tied
    else:
        found = rank_of(magnitude_key(delta), index, INDEX_RULE, False) >= limit
    return found


@triton.jit
def survives(
    delta, first, index, limit, last, key, ceiling, end, MODE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Which of BLOCK entries from flat index ``first`` on are kept; the rule is load_rule's."""
    if MODE == KEEP_ALL:
        kept = tl.full([BLOCK], 1, tl.int1)
    elif MODE == KEEP_RANDOM:
        kept = random_words(key, first, BLOCK).to(tl.int64) < last
    elif MODE == KEEP_MASKED:
        words = limit.to(tl.int64, bitcast=True).to(tl.pointer_type(tl.int32))
        word = tl.load(words + tl.minimum(index // 32, last))
        kept = ((word >> (index % 32).to(tl.int32)) & 1) != 0
    else:
        INDEX_RULE: tl.constexpr = MODE == KEEP_INDEX or MODE == BAND_INDEX
        kept = _above(delta, index, limit, last, INDEX_RULE, WIDE)
        if MODE == BAND_MIXED or MODE == BAND_INDEX:
            kept = kept & ~_above(delta, index, ceiling, end, INDEX_RULE, WIDE)
    return kept


def rule_of(selection: Selection, wide: bool, origin: int = 0) -> tuple[int, list[int]]:
    """A Selection as the kernels' mode and its RULE signed 64-bit numbers. ``origin``: the flat
    index of the first element, whose bit is the first of the mask.
    """
    if selection.kind == RANKED:
        words = selection.mask
        address, first = words.data_ptr(), origin // 32
        return KEEP_MASKED.value, [address - 4 * first, first + words.numel() - 1, 0, 0, 0]
    if selection.kind == RANDOM:
        return KEEP_RANDOM.value, [0, selection.keep_below, _signed(selection.key), 0, 0]
    if selection.kind != MAGNITUDE:
        return KEEP_ALL.value, [0] * RULE
    by_index = selection.tie_rule == INDEX
    cut = _cut(selection.threshold_bits, selection.tie_bound, by_index, wide)
    if (selection.ceiling_bits, selection.ceiling_bound) == (0x7FFFFFFF, 0):  # nothing is above
        return (KEEP_INDEX if by_index else KEEP_MIXED).value, [*cut, 0, 0, 0]
    ceiling = _cut(selection.ceiling_bits, selection.ceiling_bound, by_index, wide)
    return (BAND_INDEX if by_index else BAND_MIXED).value, [*cut, 0, *ceiling]


def _cut(bits: int, bound: int | None, by_index: bool, wide: bool) -> tuple[int, int]:
    """A threshold and its tie bound as the kernels take them."""
    last = (1 << 64) - 1
    if bound == 0:  # no tied entry is above: every one from the next key on is
        bits += 1
    elif bound is not None:
        last = bound - 1
    if not wide:
        last = min(last, (1 << 32) - 1) if by_index else last >> 32
    return bits, _signed(last)


def _signed(value: int) -> int:
    """The signed 64-bit integer of the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
