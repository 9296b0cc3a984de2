"""select on every instruction set: exact thresholds, exact counts, exact tie bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge import _C
from fastmerge.compute import reference
from fastmerge.compute.cpu import CpuBackend
from fastmerge.methods.shapes import Keep
from fastmerge.selection import (
    ALL,
    EVERY,
    INDEX,
    MAGNITUDE,
    MIXED,
    RANDOM,
    RANKED,
    Selection,
    Sparsify,
    keep_below,
    keep_count,
)

LARGE = 150_001  # above the size at which a sample stands in for the tensor


@pytest.fixture(params=_C.isas())
def isa(request):
    """Each instruction set that this CPU runs."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


every_isa = pytest.mark.usefixtures("isa")


@pytest.fixture(scope="module")
def pool():
    return _C.Pool(2)


def check(pool, memory, values, base, specs, types=("BF16",), base_type="BF16"):
    """select must answer as the reference does; rescale may differ by its float64 sums' order."""
    tensors = [memory.put(x, types[i % len(types)], offset=2 * i + 1) for i, x in enumerate(values)]
    origin = memory.put(base, base_type, offset=3)
    found = [Selection(*s) for s in _C.select(pool, tensors, origin, specs)]
    wanted = reference.select([memory.read(t) for t in tensors], memory.read(origin), specs)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.rescale, b.rescale, rtol=1e-7)
        assert a._replace(rescale=0.0) == b._replace(rescale=0.0)
    for tensor, spec, selection in zip(tensors, specs, found, strict=True):
        if Sparsify(*spec).kind == MAGNITUDE:
            keys = reference.magnitude_keys(memory.read(tensor), memory.read(origin))
            assert np.count_nonzero(reference.survivors(selection, keys)) == Sparsify(*spec).keep
    return found


def fine_tunes(count: int, deltas: int = 2, seed: int = 0):
    """A base and fine-tunes whose bf16 deltas tie as real ones do."""
    rng = np.random.default_rng([seed, count])
    base = (0.02 * rng.standard_normal(count)).astype(np.float32)
    stored = reference.bf16_to_f32(reference.f32_to_bf16(base))
    size = np.float32(1e-4)
    return stored, [
        stored + size * rng.standard_normal(count).astype(np.float32) for _ in range(deltas)
    ]


@every_isa
@pytest.mark.parametrize("rule", [MIXED, INDEX], ids=["mixed", "index"])
@pytest.mark.parametrize("count", [1, 7, 63, 1000, 40_000, LARGE])
def test_trim_of_fine_tunes(pool, memory, count, rule):
    base, tuned = fine_tunes(count)
    for density in (0.001, 0.3, 0.5, 0.97, 1.0):
        keep = keep_count(density, count)
        check(pool, memory, tuned, base, [Sparsify(MAGNITUDE, keep, rule, rescale=True)] * 2)


@every_isa
@pytest.mark.parametrize(
    ("types", "base_type"),
    [(("F32",), "F32"), (("F16",), "F16"), (("BF16", "F32"), "BF16"), (("F16",), "F32")],
    ids=str,
)
@pytest.mark.parametrize("count", [999, LARGE])
def test_trim_of_other_types(pool, memory, types, base_type, count):
    rng = np.random.default_rng(4)
    base, *tuned = rng.standard_normal((3, count)).astype(np.float32)
    specs = [Sparsify(MAGNITUDE, keep_count(d, count)) for d in (0.2, 0.5)]
    check(pool, memory, tuned, base, specs, types, base_type)


@every_isa
@pytest.mark.parametrize("count", [5, LARGE])
@pytest.mark.parametrize("rule", [MIXED, INDEX], ids=["mixed", "index"])
@pytest.mark.parametrize("delta", [0.0, 0.5, np.inf, np.nan])
def test_all_entries_tied(pool, memory, count, rule, delta):
    base = np.zeros(count, np.float32)
    specs = [Sparsify(MAGNITUDE, keep, rule) for keep in (1, count // 2, count - 1, count)]
    found = check(pool, memory, [base + np.float32(delta)] * 4, base, specs)
    assert found[3].tie_bound is None


@every_isa
@pytest.mark.parametrize("count", [7, 40_000, LARGE])
def test_every_entry_that_ties_with_the_last_is_kept(pool, memory, count):
    """With the threshold of an exact trim; what lies above a ceiling loses its ties, too."""
    base, (tuned, _) = fine_tunes(count)
    tensor, origin = memory.put(tuned, "BF16"), memory.put(base, "BF16")
    keys = reference.magnitude_keys(memory.read(tensor), memory.read(origin))
    for keep, skip in ((count // 3, 0), (count // 2, count // 5), (count, 0), (0, count // 2)):
        specs = [Sparsify(MAGNITUDE, keep, rule, skip=skip) for rule in (MIXED, EVERY)]
        exact, every = (Selection(*s) for s in _C.select(pool, [tensor] * 2, origin, specs))
        (wanted,) = reference.select([memory.read(tensor)], memory.read(origin), specs[1:])
        assert every == wanted and every.kept == keep
        assert every.threshold_bits == exact.threshold_bits
        assert every.ceiling_bits == exact.ceiling_bits
        ceiling = (keys <= every.ceiling_bits) if not skip else keys < every.ceiling_bits
        kept = (keys >= every.threshold_bits) & ceiling if keep else np.zeros(count, np.bool_)
        np.testing.assert_array_equal(reference.survivors(every, keys), kept)


@every_isa
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("count", [999, LARGE])
def test_nan_is_above_infinity(pool, memory, count):
    rng = np.random.default_rng(8)
    x = rng.standard_normal(count).astype(np.float32)
    x[rng.choice(count, 60, replace=False)] = np.repeat(np.float32([np.nan, np.inf, -np.inf]), 20)
    specs = [Sparsify(MAGNITUDE, keep) for keep in (7, 20, 21, 60, 61, 500)]
    check(pool, memory, [x] * 6, np.zeros(count, np.float32), specs)


@every_isa
def test_a_few_large_entries_among_equal_ones(pool, memory):
    x = np.zeros(LARGE, np.float32)
    x[[5, 70_000, 149_999]] = [3, 2, 1]
    specs = [Sparsify(MAGNITUDE, keep) for keep in (1, 2, 3, 4, 100_000)]
    check(pool, memory, [x] * 5, np.zeros(LARGE, np.float32), specs)


@every_isa
@pytest.mark.parametrize("rule", [MIXED, INDEX], ids=["mixed", "index"])
@pytest.mark.parametrize("count", [1, 2, 63, 1000, LARGE])
@pytest.mark.parametrize("delta", [None, 0.0, np.nan])
def test_what_is_above_a_band_is_dropped(pool, memory, count, rule, delta):
    """`check` compares thresholds and bounds of both edges, and how many survive."""
    base, tuned = fine_tunes(count)
    if delta is not None:  # all tied: the bounds alone decide
        base = np.zeros(count, np.float32)
        tuned = [base + np.float32(delta)] * 2
    for keep, skip in ((0.5, 0.01), (0.5, 0.5), (0.001, 0.3), (0.0, 0.2), (0.9, 0.05)):
        spec = Sparsify(
            MAGNITUDE, int(keep * count), rule, rescale=delta is None, skip=int(skip * count)
        )
        found = check(pool, memory, tuned, base, [spec, spec._replace(skip=0)])
        if delta is None and spec.keep and spec.skip:
            assert found[0].ceiling_bits >= found[0].threshold_bits


@every_isa
@pytest.mark.parametrize("keep", [1, 10_000, 75_000, LARGE - 10_000, LARGE])
def test_a_sample_that_lies_costs_passes_not_exactness(pool, memory, keep):
    """The places that select looks at first hold the largest, the smallest or odd values."""
    rng = np.random.default_rng(11)
    chunks, length = 1024, 32
    step = LARGE // chunks
    first = np.arange(chunks, dtype=np.uint64)
    scattered = first * np.uint64(0x9E3779B9) & np.uint64(0xFFFFFFFF)
    first = first * np.uint64(step) + (scattered * np.uint64(step - length) >> np.uint64(32))
    places = (first.astype(np.int64)[:, None] + np.arange(length)).ravel()
    lies = []
    for lie in (0.0, 1e9, 1.25):
        x = rng.standard_normal(LARGE).astype(np.float32)
        x[places] = lie
        lies.append(x)
    specs = [Sparsify(MAGNITUDE, keep)] * 3
    check(pool, memory, lies, np.zeros(LARGE, np.float32), specs, ("F32",), "F32")


@every_isa
def test_ties_in_one_corner_by_index(pool, memory):
    x = np.zeros(LARGE, np.float32)
    x[100_000:] = np.linspace(1, 2, LARGE - 100_000, dtype=np.float32)
    x[90_000:94_000] = 0.5
    x[0] = 0.5
    keeps = [LARGE - 100_000 + more for more in (1, 2, 3, 2000, 4000)]
    specs = [Sparsify(MAGNITUDE, keep, INDEX) for keep in keeps]
    check(pool, memory, [x] * 5, np.zeros(LARGE, np.float32), specs, ("F32",), "F32")


@every_isa
def test_more_inputs_than_usual_and_all_kinds(pool, memory):
    base, tuned = fine_tunes(40_000, deltas=9)
    specs = [
        Sparsify(),
        Sparsify(MAGNITUDE, 0),
        Sparsify(MAGNITUDE, 0, rescale=True),
        Sparsify(MAGNITUDE, 12_345, rescale=True),
        Sparsify(MAGNITUDE, 40_000, rescale=True),
        Sparsify(RANDOM, keep_below=0, rescale=True),
        Sparsify(RANDOM, keep_below=1 << 32, rescale=True),
        Sparsify(RANDOM, keep_below=keep_below(0.3), key=1 << 63),
        Sparsify(RANDOM, keep_below=keep_below(0.3), key=3, rescale=True),
    ]
    found = check(pool, memory, tuned, base, specs)
    assert [s.kept for s in found[:3]] == [40_000, 0, 0]
    assert found[5].kept == 0
    assert found[6].kept == 40_000


@every_isa
@pytest.mark.parametrize("count", [0, 1, 5, 63, 65_537])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_random(pool, memory, count, dtype):
    rng = np.random.default_rng(5)
    base, *tuned = rng.standard_normal((3, count)).astype(np.float32)
    specs = [
        Sparsify(RANDOM, keep_below=keep_below(d), key=key, rescale=True)
        for d, key in ((0.5, 42), (0.1, 0xFEDCBA9876543210))
    ]
    check(pool, memory, tuned, base, specs, (dtype,), dtype)


def drawn(shape, epsilon=0.15, density=0.5, key=77):
    """A request for a tensor of this shape, ranked along its second axis."""
    spec = Keep(RANKED, density, rescale=True, epsilon=epsilon).of(shape, key)
    assert spec.kind == RANKED
    return spec


SHAPES = [(1,), (37,), (70_001,), (1, 64), (5, 1), (33, 31), (64, 96), (7, 4099)]
SHAPES += [(3, 5, 7), (2, 64, 40), (9, 6, 1), (4, 3, 3, 3), (1, 300, 70)]


@every_isa
@pytest.mark.parametrize("bounds", [(0, 1 << 32), (1 << 31, 1 << 31), (0, 0), (1 << 32, 1 << 32)])
@pytest.mark.parametrize("delta", ["few", "outlier"])
def test_a_draw_by_rank_with_all_keys_in_a_few_buckets(memory, delta, bounds):
    """Where every entry's rank must be counted, and where none need be."""
    shape = (3, 1500)
    base = np.zeros(shape, np.float32)
    rng = np.random.default_rng(3)
    if delta == "few":  # three magnitudes, most of them 0
        tuned = rng.choice(
            np.float32([0, -0.0, 1, -1, 1 + 2**-7]), shape, p=[0.6, 0.1, 0.1, 0.1, 0.1]
        )
    else:  # beside it all others lie in the lowest bucket
        tuned = rng.standard_normal(shape).astype(np.float32)
        tuned[:, 7] = 2.0**40
    spec = drawn(shape, key=9)._replace(keep_below=bounds[0], keep_below_top=bounds[1])
    tensor, origin = memory.put(tuned.ravel(), "F32"), memory.put(base.ravel(), "F32")
    (want,) = reference.select([memory.read(tensor)], memory.read(origin), [spec])
    words = np.full(-(-tuned.size // 32), -1, np.int32)
    mask = _C.View(words.ctypes.data, words.size, "F32", words)
    (found,) = _C.select(_C.Pool(2), [tensor], origin, [spec], [mask])
    np.testing.assert_array_equal(words.view(np.uint32), want.mask)
    assert found.kept == want.kept


@every_isa
@pytest.mark.parametrize("delta", ["normal", "zero", "nan"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_draw_by_rank(memory, shape, delta):
    """The bits of every entry are the reference's, whatever the threads, and so is what is kept."""
    count = int(np.prod(shape))
    base, tuned = fine_tunes(count)
    if delta != "normal":
        tuned = [base, base.copy()]
    if delta == "nan":  # of either sign, and infinity: the largest of their rows
        tuned[0][::3] = np.nan
        tuned[1][:3], tuned[1][-1] = -np.nan, np.inf
    specs = [drawn(shape, key=5), drawn(shape, 0.3, 0.6, (1 << 64) - 1)]
    tensors = [memory.put(x, "BF16", offset=2 * i + 1) for i, x in enumerate(tuned)]
    origin = memory.put(base, "BF16", offset=3)
    wanted = reference.select([memory.read(t) for t in tensors], memory.read(origin), specs)
    for threads in (1, 3):
        words = np.full((2, -(-count // 32)), -1, np.int32)  # whatever was there before
        masks = [_C.View(row.ctypes.data, row.size, "F32", row) for row in words]
        found = _C.select(_C.Pool(threads), tensors, origin, specs, masks)
        for got, want, mask in zip(found, wanted, words, strict=True):
            np.testing.assert_array_equal(mask.view(np.uint32), want.mask)
            assert got._replace(rescale=0, mask=None) == want._replace(rescale=0, mask=None)
            if want.kept < count:  # else a sum over itself, which may be infinite
                np.testing.assert_allclose(got.rescale, want.rescale, rtol=1e-7)


def test_a_draw_by_rank_keeps_with_the_chance_of_the_rank(pool, memory):
    """From density - epsilon to density + epsilon, evenly, within five standard deviations in each
    of 32 parts of the ranks; also where all entries of a row tie.
    """
    rows, columns = 2048, 512
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    spec = drawn((rows, columns), 0.2, 0.4)
    for values in (x, np.zeros_like(x)):
        kept = kept_of(pool, memory, values.ravel(), spec).reshape(rows, columns)
        if values is x:
            kept = np.take_along_axis(kept, np.argsort(np.abs(x), axis=1), axis=1)
            chance = 0.2 + 0.4 * np.arange(columns) / (columns - 1)
        else:
            chance = np.full(columns, 0.4)
        parts = kept.mean(0).reshape(32, -1).mean(1) - chance.reshape(32, -1).mean(1)
        spread = np.sqrt(0.25 / (rows * columns / 32))
        assert np.abs(parts if values is x else parts.mean()).max() < 5 * spread


def kept_of(pool, memory, values, spec):
    """What the kernel keeps of one delta to zeros."""
    mask = np.zeros(-(-len(values) // 32), np.uint32)
    view = _C.View(mask.ctypes.data, len(mask), "F32", mask)
    zeros = memory.put(np.zeros_like(values), "F32")
    (found,) = _C.select(pool, [memory.put(values, "F32")], zeros, [spec], [view])
    kept = reference.survivors(found._replace(mask=mask), values.view(np.uint32))
    assert found.kept == np.count_nonzero(kept)
    return kept


@every_isa
def test_empty_tensors(pool, memory):
    empty = np.zeros(0, np.float32)
    check(pool, memory, [empty] * 2, empty, [Sparsify(MAGNITUDE, 0), Sparsify(ALL)])


@every_isa
def test_rescale_leaves_tiny_deltas_alone(pool, memory):
    x = np.full(100, 5e-10, np.float32)  # |x| sums to 5e-8, below 1e-7
    spec = Sparsify(RANDOM, keep_below=keep_below(0.5), key=1, rescale=True)
    (found,) = check(pool, memory, [x], np.zeros(100, np.float32), [spec], ("F32",), "F32")
    assert found.rescale == 1.0


@every_isa
@pytest.mark.parametrize("tied", [0, LARGE // 3])
def test_ranks_of_one_delta(pool, memory, tied):
    """Several of the same entries, of which none are frequent or some: also in pieces, whose
    processes tell each other less.
    """
    x = np.random.default_rng(5).standard_normal(LARGE).astype(np.float32)
    x[::-1][:tied] = 0.7
    specs = [Sparsify(MAGNITUDE, keep_count(d, LARGE), EVERY) for d in (0.25, 0.5, 0.75, 0.2501)]
    wanted = reference.select([x] * 4, np.zeros_like(x), specs)
    views, zeros = [memory.put(x, "F32")] * 4, memory.put(np.zeros_like(x), "F32")
    assert _C.select(pool, views, zeros, specs) == wanted

    def passes(pieces, count):
        return [count(piece) for piece in range(pieces)]

    assert _C.select_across(pool, [views], [zeros], [0], specs, [1], passes) == wanted


@every_isa
@pytest.mark.parametrize("elect", [True, False])
@pytest.mark.parametrize("count", [1, 63, 5000, LARGE])
def test_the_bits_of_a_random_draw(pool, memory, count, elect):
    """They are of what survives, and merge as the draw does."""
    base, tuned = fine_tunes(count)
    tensors, origin = [memory.put(x, "BF16") for x in tuned], memory.put(base, "BF16")
    specs = [Sparsify(RANDOM, keep_below=keep_below(d), key=7, rescale=True) for d in (0.3, 0.8)]
    words = np.zeros((2, -(-count // 32)), np.uint32)
    masks = [_C.View(row.ctypes.data, row.size, "F32", row) for row in words]
    chosen = _C.select(pool, tensors, origin, specs, masks)
    assert chosen == _C.select(pool, tensors, origin, specs)
    merged = []
    for given_masks in ((), masks):
        out = memory.blank(count, "BF16")
        _C.consensus(
            pool, tensors, origin, [0.6, 0.4], chosen, _C.MemorySink(out), given_masks,
            elect=elect, normalize=elect,
        )  # fmt: skip
        merged.append(memory.read(out))
    np.testing.assert_array_equal(*merged)
    for selection, row in zip(chosen, words, strict=True):
        kept = np.unpackbits(row.view(np.uint8), bitorder="little")[:count]
        survivors = reference.survivors(selection, np.zeros(count, np.uint32))
        np.testing.assert_array_equal(kept.astype(np.bool_), survivors)


def test_a_random_draw_is_kept_where_memory_has_room(memory, tmp_path):
    base, tuned = fine_tunes(LARGE)
    tensors, origin = [memory.put(x, "BF16") for x in tuned], memory.put(base, "BF16")
    specs = [Sparsify(RANDOM, keep_below=k, key=3) for k in (keep_below(0.5), 1 << 32)]
    words = -(-LARGE // 32)
    for room, kept in ((4 * words, True), (4 * words - 1, False)):
        backend = CpuBackend(1, scratch_folder=tmp_path, scratch_bytes=room)
        found = backend.select(tensors, origin, specs)
        assert [s.mask is not None for s in found] == [kept, False]
        del found
        assert backend._scratch_left == room


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3000),
    st.floats(0, 1),
    st.integers(1, 6),
    st.sampled_from([MIXED, INDEX]),
    st.integers(0, 1000),
)
def test_exactly_keep_survive(memory_class, count, density, levels, rule, seed):
    """Few distinct magnitudes, so that most entries tie."""
    x = np.random.default_rng(seed).integers(-levels, levels + 1, count).astype(np.float32)
    spec = Sparsify(MAGNITUDE, keep_count(density, count), rule)
    check(_C.Pool(1), memory_class(), [x], np.zeros(count, np.float32), [spec])


def test_philox_known_answers():
    # Random123's kat_vectors for philox4x32-10: all zero, and all ones (by its definition, here the
    # high counter words are always 0, so only the first applies to whole counters).
    assert [f"{w:08x}" for w in reference.philox_words(4, 0)] == [
        "6627e8d5",
        "e169c58d",
        "bc57ac4c",
        "9b00dbd8",
    ]


def test_philox_words_do_not_depend_on_where_a_block_begins():
    whole = reference.philox_words(1000, 0x123456789)
    for first in (1, 2, 3, 4, 501):
        assert np.array_equal(reference.philox_words(50, 0x123456789, first), whole[first:][:50])


def mixed_index(index: int) -> int:
    """An oracle in plain integers (fmix32: Appleby, MurmurHash3)."""
    low, high = index & 0xFFFFFFFF, index >> 32
    h = low ^ (high * 0x9E3779B9 & 0xFFFFFFFF)
    h ^= h >> 16
    h = h * 0x85EBCA6B & 0xFFFFFFFF
    h ^= h >> 13
    h = h * 0xC2B2AE35 & 0xFFFFFFFF
    h ^= h >> 16
    return (h << 32) | high


def test_mixed_index_is_one_definition():
    for first in (0, 12345, (1 << 32) - 5, (7 << 32) + 3):
        found = reference.mixed_indices(10, first)
        assert [int(i) for i in found] == [mixed_index(first + i) for i in range(10)]


@pytest.mark.parametrize("rule", [MIXED, INDEX])
def test_ties_that_lie_together_take_one_pass_more(pool, memory, rule):
    """All at the tensor's end: by flat index the first guess of where the last one lies is far off,
    and so would be every half of what is left.
    """
    size, ties, keep = 1 << 22, 3000, 1000
    x, calls = np.zeros(size, np.float32), []
    x[-ties:] = 1

    def passes(number, count):
        calls.append(number)
        return [count(piece) for piece in range(number)]

    inputs, base = [[memory.put(x, "F32")]], memory.put(np.zeros_like(x), "F32")
    spec = Sparsify(MAGNITUDE, keep, rule)
    (found,) = _C.select_across(pool, inputs, [base], [0], [spec], [1], passes)
    orders = np.arange(size - ties, size, dtype=np.uint64)
    if rule == MIXED:
        orders = reference.mixed_indices(ties, size - ties)
    assert found.tie_bound == np.sort(orders)[keep - 1] + 1
    assert len(calls) <= 3  # one for the threshold
