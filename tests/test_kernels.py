"""gram, combine and consensus on every instruction set, against fastmerge.compute.reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge import _C
from fastmerge.compute import reference
from fastmerge.primitives import FREQUENCY, PLAIN, WEIGHTED
from fastmerge.selection import INDEX, MAGNITUDE, MIXED, RANDOM, Selection, Sparsify, keep_below

DTYPES = ("BF16", "F16", "F32")
SIZES = (0, 1, 7, 63, 1000, 65537)
SPECIAL = np.float32([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 6e4, 3e38, 1e-40, 6e-8, 1e-5])


@pytest.fixture(params=_C.isas())
def isa(request):
    """Each instruction set that this CPU runs."""
    before = _C.isa()
    _C.set_isa(request.param)
    assert _C.isa() == request.param
    yield request.param
    _C.set_isa(before)


every_isa = pytest.mark.usefixtures("isa")


@pytest.fixture(scope="module")
def pool():
    return _C.Pool(2)


def values(count: int, seed: int, *, special: bool = False, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng([seed, count])
    x = (scale * rng.standard_normal(count)).astype(np.float32)
    if special and count:
        places = rng.integers(0, count, count // 5 + 1)
        x[places] = rng.choice(SPECIAL, len(places))
    return x


def bits(array: np.ndarray) -> np.ndarray:
    """Bit patterns, with one pattern for every NaN: which of two NaNs survives an operation is up
    to the instruction set."""
    as_bits = array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32).copy()
    with np.errstate(invalid="ignore"):
        nan = np.isnan(reference.widen(array))
    as_bits[nan] = 0x7FC0
    return as_bits


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.dtype == wanted.dtype and np.array_equal(bits(found), bits(wanted))


def nonfinite(array: np.ndarray) -> int:
    return int(np.count_nonzero(~np.isfinite(reference.widen(array))))


def every_mix():
    """Each dtype in and out, then two and three different ones."""
    pairs = [((a, a), b) for a, b in itertools.product(DTYPES, DTYPES)]
    return [*pairs, (("BF16", "F32"), "BF16"), (("F16", "BF16", "F32"), "F16")]


# --- combine ------------------------------------------------------------------------------------


@every_isa
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("types", "out_type"), every_mix(), ids=str)
@pytest.mark.parametrize("count", SIZES)
def test_combine(pool, memory, types, out_type, count):
    c = np.array([0.3, 0.7, -1.3][: len(types)])
    tensors = [
        memory.put(values(count, i, special=True), t, offset=2 * i + 1) for i, t in enumerate(types)
    ]
    arrays = [memory.read(t) for t in tensors]
    for divisor in (None, 1.7):
        out = memory.blank(count, out_type, offset=3)
        bad = _C.combine(pool, tensors, c, _C.MemorySink(out), divisor=divisor)
        exact = reference.combine(arrays, c, divisor=divisor, arithmetic=np.float32)
        wanted = reference.round_to(exact, out_type)
        assert same(memory.read(out), wanted)
        assert bad == nonfinite(wanted)


@every_isa
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("types", "out_type"), every_mix(), ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_wide_combine(pool, memory, types, out_type, axis):
    rows, cols = 3, 1111
    vectors = {None: 1, 0: cols, 1: rows}[axis]
    c = np.random.default_rng(5).choice([0.0, 1e9, -1.25, 1 / 3], (vectors, len(types)))
    c = c[0] if axis is None else c
    tensors = [
        memory.put(values(rows * cols, i, special=True), t, offset=2 * i + 1)
        for i, t in enumerate(types)
    ]
    out = memory.blank(rows * cols, out_type, offset=3)
    shape = {"axis": axis, "rows": rows, "cols": cols}
    bad = _C.combine(pool, tensors, c, _C.MemorySink(out), wide=True, **shape)
    arrays = [memory.read(t).reshape(rows, cols) for t in tensors]
    exact = reference.combine(arrays, c, axis=axis, wide=True).astype(np.float32)
    wanted = reference.round_to(exact, out_type).ravel()
    assert same(memory.read(out), wanted)
    assert bad == nonfinite(wanted)


def test_a_wide_combine_has_no_divisor(pool, memory):
    x = memory.put(values(10, 1), "F32")
    with pytest.raises(ValueError, match="no divisor"):
        _C.combine(pool, [x], np.ones(1), _C.MemorySink(x), divisor=2.0, wide=True)


@every_isa
def test_combine_is_within_rounding_of_float64(pool, memory):
    tensors = [memory.put(values(5000, i), "F32") for i in range(5)]
    c = np.array([0.1, 0.2, -0.3, 0.4, 0.6])
    out = memory.blank(5000, "F32")
    _C.combine(pool, tensors, c, _C.MemorySink(out))
    arrays = [memory.read(t) for t in tensors]
    exact = reference.combine(arrays, c)
    size = sum(abs(x * f) for x, f in zip(arrays, c, strict=True))
    assert np.all(abs(memory.read(out) - exact) <= 5 * 2.0**-24 * size)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_with_one_coefficient_copies(pool, memory, dtype):
    x = memory.put(values(999, 1, special=True), dtype, offset=1)
    poison = memory.put(np.full(999, np.nan, np.float32), dtype)
    for position in (0, 1):
        tensors = [poison, poison]
        tensors[position] = x
        c = np.zeros(2)
        c[position] = 1
        out = memory.blank(999, dtype)
        bad = _C.combine(pool, tensors, c, _C.MemorySink(out))
        assert memory.read(out).tobytes() == memory.read(x).tobytes()
        assert bad == nonfinite(memory.read(x))


@every_isa
def test_combine_of_nothing_is_zero(pool, memory):
    x = memory.put(values(100, 1, special=True), "BF16")
    out = memory.blank(100, "BF16")
    assert _C.combine(pool, [x], np.zeros(1), _C.MemorySink(out)) == 0
    assert not memory.read(out).any()


@every_isa
def test_a_sum_of_negative_zeros_is_zero(pool, memory):
    # mergekit 0.1.5 accumulates onto +0, and -0 + +0 is +0.
    x = memory.put(np.full(20, -0.0, np.float32), "BF16")
    out = memory.blank(20, "BF16")
    _C.combine(pool, [x, x], np.array([0.5, 0.5]), _C.MemorySink(out))
    assert not memory.read(out).any()


@every_isa
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 130), (130, 7), (2, 5000), (0, 4), (4, 0)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("types", "out_type"), [(("BF16", "BF16"), "BF16"), (("F16", "F32"), "BF16")]
)
def test_combine_by_rows_and_columns(pool, memory, shape, axis, types, out_type):
    rows, cols = shape
    rng = np.random.default_rng(3)
    c = rng.choice([0.0, 0.5, -1.25, 0.3], (shape[1 - axis], 2))
    tensors = [
        memory.put(values(rows * cols, i, special=True), t, offset=i) for i, t in enumerate(types)
    ]
    out = memory.blank(rows * cols, out_type)
    sink = _C.MemorySink(out)
    _C.combine(pool, tensors, c, sink, divisor=0.9, axis=axis, rows=rows, cols=cols)
    arrays = [memory.read(t).reshape(shape) for t in tensors]
    exact = reference.combine(arrays, c, divisor=0.9, axis=axis, arithmetic=np.float32)
    assert same(memory.read(out), reference.round_to(exact, out_type).ravel())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.floats(-4, 4, width=32)), min_size=1, max_size=6
    ),
    st.sampled_from(DTYPES),
    st.integers(0, 300),
    st.integers(0, 7),
)
def test_combine_of_anything(memory_class, terms, out_type, count, offset):
    memory, pool = memory_class(), _C.Pool(1)
    tensors = [memory.put(values(count, i), t, offset=offset) for i, (t, _) in enumerate(terms)]
    c = np.array([factor for _, factor in terms])
    out = memory.blank(count, out_type, offset=offset)
    _C.combine(pool, tensors, c, _C.MemorySink(out))
    exact = reference.combine([memory.read(t) for t in tensors], c, arithmetic=np.float32)
    assert same(memory.read(out), reference.round_to(exact, out_type))


# --- gram ---------------------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize(
    "types", [*((t,) * k for t in DTYPES for k in (1, 2, 3, 6)), ("BF16", "F32")]
)
@pytest.mark.parametrize("count", SIZES)
def test_gram(pool, memory, types, count):
    tensors = [memory.put(values(count, i), t, offset=2 * i + 1) for i, t in enumerate(types)]
    base = memory.put(values(count, 9), types[-1], offset=5)
    arrays = [memory.read(t) for t in tensors]
    for origin in (None, base):
        found = _C.gram(pool, tensors, origin)
        wanted = reference.gram(arrays, None if origin is None else memory.read(origin))
        size = np.sqrt(np.outer(wanted.diagonal(), wanted.diagonal()))
        assert found.shape == wanted.shape
        assert np.array_equal(found, found.T)
        assert np.all(abs(found - wanted) <= 1e-13 * size)


@every_isa
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 300), (600, 7), (2, 70001), (0, 4), (4, 0)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("based", [False, True])
def test_gram_by_rows_and_columns(pool, memory, shape, axis, based):
    rows, cols = shape
    tensors = [memory.put(values(rows * cols, i), "BF16", offset=i) for i in range(2)]
    base = memory.put(values(rows * cols, 7), "BF16") if based else None
    found = _C.gram(pool, tensors, base, axis=axis, rows=rows, cols=cols)
    arrays = [memory.read(t).reshape(shape) for t in tensors]
    origin = memory.read(base).reshape(shape) if based else None
    wanted = reference.gram(arrays, origin, axis=axis)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(
        found, wanted, rtol=1e-12, atol=1e-12 * max(1, cols if axis else rows)
    )


# --- consensus ----------------------------------------------------------------------------------


def selections(count: int, inputs: int) -> list[list[Selection]]:
    """Several ways to keep entries, mixed among the inputs."""
    half = int(np.float32(0.7).view(np.int32))
    trims = [
        Selection(MAGNITUDE, half),
        Selection(MAGNITUDE, half, 1 << 63, MIXED),
        Selection(MAGNITUDE, half, count // 2, INDEX),
        Selection(MAGNITUDE, half, 0),
        Selection(MAGNITUDE, half, 1 << 62, MIXED, rescale=1.7),
        Selection(RANDOM, keep_below=keep_below(0.5), key=0x1234567890ABCDEF, rescale=1.9),
        Selection(MAGNITUDE, half, ceiling_bits=half, ceiling_bound=1 << 62),
        Selection(MAGNITUDE, 0, 1 << 63, ceiling_bits=half, ceiling_bound=None),
        Selection(MAGNITUDE, half, 0, INDEX, ceiling_bits=half + 1, ceiling_bound=0),
        Selection(MAGNITUDE, 0x7FFFFFFF, 0, ceiling_bits=half, ceiling_bound=None),
        Selection(RANDOM, keep_below=0),
        Selection(RANDOM, keep_below=1 << 32),
        Selection(RANDOM, keep_below=keep_below(0.2), key=7),
    ]
    return [
        [Selection()] * inputs,
        [trims[1]] * inputs,
        [trims[5]] * inputs,
        [(trims * 3)[j] for j in range(inputs)],
        [(trims * 3)[j + 2] for j in range(inputs)],
        [(trims * 3)[j + 5] for j in range(inputs)],
    ]


@every_isa
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("inputs", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 63, 1000, 5001])
def test_consensus(pool, memory, inputs, dtype, count):
    check_consensus(pool, memory, (dtype,) * inputs, dtype, dtype, count)


@every_isa
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("types", "base_type", "out_type"),
    [
        (("BF16", "F32"), "BF16", "BF16"),
        (("F16", "F16"), "BF16", "F16"),
        (("F32", "BF16", "F16"), "F16", "F32"),
        *((("BF16", "BF16"), "BF16", out) for out in ("F32", "F16")),
        *((("F32", "F32"), "F32", out) for out in ("BF16", "F16")),
    ],
)
def test_consensus_of_mixed_types(pool, memory, types, base_type, out_type):
    check_consensus(pool, memory, types, base_type, out_type, 4999)


def check_consensus(pool, memory, types, base_type, out_type, count):
    base = memory.put(values(count, 50, special=True), base_type, offset=1)
    tensors = [
        memory.put(values(count, i, special=True), t, offset=i % 8) for i, t in enumerate(types)
    ]
    arrays, origin = [memory.read(t) for t in tensors], memory.read(base)
    weights = [float(np.float32(w)) for w in np.linspace(0.9, -0.3, len(types))]
    rules = itertools.cycle(itertools.product((True, False), (True, False), (1.0, 0.7)))
    for chosen in selections(count, len(types)):
        for elect, normalize, scale in itertools.islice(rules, 3):
            rule = {"elect": elect, "normalize": normalize, "scale": scale}
            out = memory.blank(count, out_type, offset=7)
            bad = _C.consensus(pool, tensors, base, weights, chosen, _C.MemorySink(out), **rule)
            exact = reference.consensus(
                arrays, origin, weights, chosen, **rule, arithmetic=np.float32
            )
            wanted = reference.round_to(exact, out_type)
            assert same(memory.read(out), wanted), (chosen, rule)
            assert bad == nonfinite(wanted)


@every_isa
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("inputs", [1, 2, 3, 5])
@pytest.mark.parametrize("votes", [WEIGHTED, PLAIN, FREQUENCY])
@pytest.mark.parametrize("elect", [False, True])
def test_votes_and_divisors_of_other_definitions(pool, memory, inputs, votes, elect):
    count = 1003
    base = memory.put(values(count, 50, special=True), "BF16", offset=1)
    tensors = [memory.put(values(count, i, special=True), "F32") for i in range(inputs)]
    arrays, origin = [memory.read(t) for t in tensors], memory.read(base)
    weights = [float(np.float32(w)) for w in np.linspace(0.9, -0.3, inputs)]
    for chosen in selections(count, inputs):
        rule = {"elect": elect, "normalize": True, "votes": votes, "counted": True}
        out = memory.blank(count, "F32")
        _C.consensus(pool, tensors, base, weights, chosen, _C.MemorySink(out), **rule)
        wanted = reference.consensus(arrays, origin, weights, chosen, **rule, arithmetic=np.float32)
        assert same(memory.read(out), wanted), (chosen, rule)


@every_isa
def test_weights_that_cancel_leave_the_sum_alone(pool, memory):
    base = memory.put(values(100, 0), "F32")
    tensors = [memory.put(values(100, i), "F32") for i in (1, 2)]
    arrays, origin = [memory.read(t) for t in tensors], memory.read(base)
    for elect in (True, False):
        out = memory.blank(100, "F32")
        everything = [Selection()] * 2
        rule = {"elect": elect, "normalize": True}
        _C.consensus(pool, tensors, base, [1.0, -1.0], everything, _C.MemorySink(out), **rule)
        exact = reference.consensus(
            arrays, origin, [1.0, -1.0], everything, **rule, arithmetic=np.float32
        )
        assert same(memory.read(out), exact)


@every_isa
def test_pieces_may_begin_anywhere(memory, pool, tmp_path):
    """A file's pieces cut a tensor at odd places; masks follow the flat index all the same."""
    count = 30000
    base = memory.put(values(count, 1), "BF16")
    tensors = [memory.put(values(count, i), "BF16") for i in (2, 3)]
    half = int(np.float32(0.7).view(np.int32))
    for chosen in (
        Selection(RANDOM, keep_below=keep_below(0.5), key=99),
        Selection(MAGNITUDE, half, 1 << 63, MIXED),
        Selection(MAGNITUDE, half, count // 2, INDEX),
    ):
        args = (tensors, base, [0.5, 0.5], [chosen] * 2)
        out = memory.blank(count, "BF16")
        _C.consensus(pool, *args, _C.MemorySink(out), elect=True, normalize=True)
        path, offset = tmp_path / "out", 1234 + 2 * len(list(tmp_path.iterdir()))
        staging = _C.Staging(4096, 8, 1)
        file = _C.StagedFile(staging, str(path), offset + 2 * count, io="buffered")
        file.write(0, bytes(offset))
        _C.consensus(pool, *args, file.sink(offset, count, "BF16"), elect=True, normalize=True)
        file.finish()
        staging.close()
        assert path.read_bytes()[offset:] == memory.read(out).tobytes()
        path.unlink()


# --- the same bits everywhere -------------------------------------------------------------------


def test_every_isa_and_thread_count_gives_the_same_bits(memory):
    count = 300_003
    base = memory.put(values(count, 1, scale=0.02), "BF16")
    tensors = [
        memory.put(reference.widen(memory.read(base)) + values(count, i, scale=1e-4), "BF16")
        for i in (2, 3)
    ]
    specs = [
        Sparsify(MAGNITUDE, count // 3, rescale=True),
        Sparsify(RANDOM, keep_below=keep_below(0.4), key=5, rescale=True),
    ]
    seen = set()
    before = _C.isa()
    for name, threads in itertools.product(_C.isas(), (1, 2, 7)):
        _C.set_isa(name)
        pool = _C.Pool(threads)
        chosen = _C.select(pool, tensors, base, specs)
        merged, mixed = memory.blank(count, "BF16"), memory.blank(count, "BF16")
        _C.consensus(
            pool,
            tensors,
            base,
            [0.6, 0.4],
            chosen,
            _C.MemorySink(merged),
            elect=True,
            normalize=True,
        )
        _C.combine(pool, tensors, np.array([0.3, 0.7]), _C.MemorySink(mixed))
        wide = memory.blank(count, "F32")
        _C.combine(pool, tensors, np.array([0.3, 0.7]), _C.MemorySink(wide), wide=True)
        grams = [
            _C.gram(pool, tensors),
            _C.gram(pool, tensors, base),
            _C.gram(pool, [base, *tensors]),
            _C.gram(pool, tensors, base, axis=1, rows=3, cols=count // 3),
            _C.gram(pool, tensors, base, axis=0, rows=3, cols=count // 3),
        ]
        parts = [merged.owner, mixed.owner, wide.owner, *grams]
        seen.add((tuple(chosen), b"".join(p.tobytes() for p in parts)))
    _C.set_isa(before)
    assert len(seen) == 1


# --- arguments ----------------------------------------------------------------------------------


def test_bad_arguments_are_refused(memory, pool):
    x, short = memory.put(values(8, 1), "F32"), memory.put(values(7, 1), "F32")
    raw = _C.View(x.address, 8, "RAW", x)
    sink = _C.MemorySink(memory.blank(8, "F32"))
    one = np.ones(1)
    rule = {"elect": True, "normalize": True}
    calls = [
        lambda: _C.Pool(0),
        lambda: _C.gram(pool, []),
        lambda: _C.gram(pool, [x, short]),
        lambda: _C.gram(pool, [raw]),
        lambda: _C.gram(pool, [x], short),
        lambda: _C.gram(pool, [x], axis=2, rows=2, cols=4),
        lambda: _C.gram(pool, [x], axis=1, rows=2, cols=3),
        lambda: _C.combine(pool, [short], one, sink),
        lambda: _C.combine(pool, [x], np.ones(2), sink),
        lambda: _C.combine(pool, [x], one, _C.MemorySink(raw)),
        lambda: _C.consensus(pool, [x], x, [], [Selection()], sink, **rule),
        lambda: _C.consensus(pool, [x], x, [1.0], [], sink, **rule),
        lambda: _C.consensus(pool, [x], short, [1.0], [Selection()], sink, **rule),
        lambda: _C.consensus(pool, [x], x, [1.0], [(0, 0)], sink, **rule),
        lambda: _C.consensus(pool, [x], x, [1.0], [Selection(kind=3)], sink, **rule),
        lambda: _C.select(pool, [x], x, []),
        lambda: _C.select(pool, [x], x, [Sparsify(MAGNITUDE, 9)]),
        lambda: _C.select(pool, [x], x, [Sparsify(RANDOM, keep_below=1 << 33)]),
        lambda: _C.copy(pool, short, sink),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^.+$"):
            call()


def test_copy(memory, pool):
    x = memory.put(values(200_001, 1, special=True), "BF16", offset=1)
    out = memory.blank(200_001, "BF16", offset=3)
    _C.copy(pool, x, _C.MemorySink(out))
    assert memory.read(out).tobytes() == memory.read(x).tobytes()
