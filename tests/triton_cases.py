"""The Triton kernels against the CPU's, bit for bit. test_triton.py runs this file under Triton's
interpreter; on a GPU, ``pytest tests/triton_cases.py`` runs it there. The name keeps it out of the
ordinary collection: whether Triton interprets is decided once, when it is imported.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fastmerge import _C
from fastmerge.compute import reference
from fastmerge.errors import FastmergeError
from fastmerge.kernels import combine as combine_module
from fastmerge.kernels import common
from fastmerge.kernels import consensus as consensus_module
from fastmerge.kernels import select as select_module
from fastmerge.kernels.combine import combine, combine_many
from fastmerge.kernels.consensus import consensus, consensus_many
from fastmerge.kernels.gram import gram, gram_many, gram_partials, gram_total
from fastmerge.kernels.select import select, select_many
from fastmerge.primitives import VOTES
from fastmerge.selection import ALL, EVERY, INDEX, MAGNITUDE, MIXED, RANDOM, Selection, Sparsify

torch.set_num_threads(1)
DEVICE = "cpu" if common.interpreted() else "cuda"
POOL = _C.Pool(2)
CODE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MIXES = [(BF16,), (F16, F16), (F32, F32), (BF16, F32), (F32, BF16, F16), (BF16, BF16, BF16)]
SIZES = [1, 7, 1024, 2051, 32768 + 2048 + 5]  # whole blocks, a partial one, a second chunk


def view(tensor: torch.Tensor) -> _C.View:
    assert tensor.device.type == "cpu"
    return _C.View(tensor.data_ptr(), tensor.numel(), CODE[tensor.dtype], tensor)


def cpu(tensors):
    return [tensor.cpu().contiguous() for tensor in tensors]


def normal(seed, *shape, dtype=F32, scale=1.0):
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return torch.from_numpy(values.astype(np.float32)).to(dtype).to(DEVICE)


def like(base, seed, dtype, scale=0.05):
    return (base.float() + normal(seed, *base.shape, scale=scale)).to(dtype)


def strange(tensor):
    """NaN, both infinities and both zeros at fixed places."""
    for start, value in enumerate((float("nan"), float("inf"), -float("inf"), 0.0, -0.0)):
        tensor.view(-1)[start::37] = value
    return tensor


def same(a, b):
    """Bit for bit; any NaN equals any NaN, because NVIDIA's arithmetic keeps no payload."""
    a, b = a.cpu(), b.cpu()
    assert a.dtype == b.dtype and a.shape == b.shape
    bits = {4: torch.int32, 2: torch.int16}[a.element_size()]
    equal = (a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())
    assert bool(equal.all()), f"{int((~equal).sum())} of {a.numel()} differ"


def cpu_combine(inputs, coefficients, dtype, **options):
    xs = cpu(inputs)
    out = torch.full_like(xs[0], 7, dtype=dtype)
    sink = _C.MemorySink(view(out))
    bad = _C.combine(POOL, [view(x) for x in xs], np.asarray(coefficients, float), sink, **options)
    return out, bad


def cpu_consensus(inputs, base, weights, selections, dtype, **options):
    xs, b = cpu(inputs), base.cpu()
    out = torch.full_like(b, 7, dtype=dtype)
    sink = _C.MemorySink(view(out))
    bad = _C.consensus(POOL, [view(x) for x in xs], view(b), weights, selections, sink, **options)
    return out, bad


def cpu_select(inputs, base, specs):
    xs, b = cpu(inputs), base.cpu()
    return [Selection(*s) for s in _C.select(POOL, [view(x) for x in xs], view(b), specs)]


# --- combine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_combine_equals_cpu(mix, size):
    xs = [strange(normal([size, i], size, dtype=dtype)) for i, dtype in enumerate(mix)]
    c = np.array([0.3, -0.7, 1.9])[: len(mix)]
    for dtype in CODE:
        out = torch.full((size,), 7, dtype=dtype, device=DEVICE)
        expected, bad = cpu_combine(xs, c, dtype)
        assert combine(xs, c, out) == bad
        same(out, expected)


@pytest.mark.parametrize(
    "c", [(0, 1), (1, 0), (0, 0), (0.5, 0), (1e-46, 2), (float("nan"), 1), (-0.0, 1)], ids=str
)
@pytest.mark.parametrize("divisor", [None, 3.0, -1.0])
def test_combine_skips_zero_coefficients(c, divisor):
    xs = [strange(normal(1, 100, dtype=BF16)), strange(normal(2, 100, dtype=BF16))]
    out = torch.full((100,), 7, dtype=BF16, device=DEVICE)
    expected, bad = cpu_combine(xs, c, BF16, divisor=divisor)
    assert combine(xs, np.array(c), out, divisor=divisor) == bad
    same(out, expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows, cols", [(1, 1), (3, 70), (70, 3), (5, 1030), (33, 64)])
def test_combine_by_vectors_equals_cpu(axis, rows, cols):
    xs = [strange(normal(1, rows, cols, dtype=BF16)), strange(normal(2, rows, cols, dtype=F32))]
    c = np.random.default_rng(3).normal(size=(rows if axis else cols, 2))
    c[::3, 0] = 0
    c[::2, 1] = 0
    for divisor in (None, 0.3):
        shape = {"axis": axis, "rows": rows, "cols": cols, "divisor": divisor}
        out = torch.full((rows, cols), 7, dtype=BF16, device=DEVICE)
        expected, bad = cpu_combine(xs, c, BF16, **shape)
        assert combine(xs, c, out, **shape) == bad
        same(out, expected)


def test_combine_sixteen_inputs_in_place():
    xs = [normal(i, 5000, dtype=(BF16, F16, F32)[i % 3]) for i in range(16)]
    c = np.linspace(-1, 1, 16)
    expected, _ = cpu_combine(xs, c, F32)
    combine(xs, c, xs[2])
    same(xs[2], expected)


def test_rounding_to_nearest_even_bit_for_bit():
    # Every exponent and sign, each with mantissas around the ties of both 16-bit types.
    high = np.arange(0, 1 << 16, 5, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001], np.uint32)
    x = torch.from_numpy((high[:, None] | low).reshape(-1).view(np.float32)).to(DEVICE)
    for dtype in (BF16, F16):
        out = torch.empty_like(x, dtype=dtype)
        combine([x], np.ones(1), out)
        same(out, x.cpu().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_inputs_are_exact(dtype):
    x = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(dtype)
    out = torch.empty(256, device=DEVICE)
    combine([x], np.ones(1), out)
    same(out, x.float())
    np.testing.assert_allclose(gram([x[:32]])[0, 0], float((x[:32].double() ** 2).sum()))


def test_combine_many_mixes_types_sizes_and_alignment():
    pad = normal(9, 5000, dtype=BF16)
    xs = [[normal([n, i], n, dtype=d) for i in range(2)] for n in (0, 1, 300) for d in (BF16, F32)]
    xs.append([pad[1:4000], pad[3:4002]])  # 2-byte aligned
    c = [np.array([0.1 * n, 1 - 0.1 * n]) for n in range(len(xs))]
    outs = [torch.full_like(pair[0], 7) for pair in xs]
    counts = combine_many(xs, c, outs)
    for pair, terms, out, bad in zip(xs, c, outs, counts.tolist(), strict=True):
        expected, expected_bad = cpu_combine(pair, terms, out.dtype)
        assert bad == expected_bad
        same(out, expected)


# --- gram ---------------------------------------------------------------------------------------


def expected_gram(xs, base=None):
    vectors = [x.cpu().float() for x in xs]
    if base is not None:
        vectors = [base.cpu().float(), *(x - base.cpu().float() for x in vectors)]
    stacked = torch.stack([v.reshape(-1).double() for v in vectors])
    return (stacked @ stacked.T).numpy()


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize(
    "k, size", [(1, 1), (2, 32768 * 2 + 77), (3, 1024), (6, 515), (7, 515), (16, 100), (2, 0)]
)
def test_gram_equals_float64(k, size, based):
    base = normal(0, size, dtype=BF16) if based else None
    xs = [normal([k, i], size, dtype=(BF16, F32, F16)[i % 3]) for i in range(k)]
    found = gram(xs, base)
    wanted = expected_gram(xs, base)
    scale = np.sqrt(np.outer(wanted.diagonal(), wanted.diagonal()))
    assert (np.abs(found - wanted) <= 1e-14 * (scale + 1e-300) * max(size, 1) ** 0.5).all()
    assert (gram(xs, base) == found).all()  # the same bits every time
    on_cpu = _C.gram(POOL, [view(x) for x in cpu(xs)], None if base is None else view(base.cpu()))
    assert (np.abs(found - on_cpu) <= 1e-14 * (scale + 1e-300) * max(size, 1) ** 0.5).all()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows, cols", [(1, 1), (3, 700), (45, 3), (33, 65)])
def test_gram_by_vectors(axis, rows, cols):
    base = normal(0, rows, cols, dtype=BF16)
    xs = [normal(i, rows, cols, dtype=(BF16, F32)[i % 2]) for i in range(3)]
    found = gram(xs, base, axis=axis, rows=rows, cols=cols)
    pick = (lambda t, v: t[v]) if axis == 1 else (lambda t, v: t[:, v])
    for v in range(rows if axis else cols):
        wanted = expected_gram([pick(x, v) for x in xs], pick(base, v))
        np.testing.assert_allclose(found[v], wanted, rtol=1e-12, atol=1e-12)


def test_gram_many_is_gram():
    xs = [[normal([n, i], n, dtype=d) for i in range(2)] for n in (0, 1, 3000) for d in (BF16, F32)]
    for one, pair in zip(gram_many(xs), xs, strict=True):
        assert (one == gram(pair)).all()


@pytest.mark.parametrize("based", [False, True])
def test_gram_of_pieces_is_gram_bit_for_bit(based):
    size = 3 * common.CHUNK + 77
    base = normal(0, size, dtype=BF16) if based else None
    xs = [normal(1, size, dtype=BF16), normal(2, size, dtype=F32)]
    parts = [
        gram_partials([x[a:b] for x in xs], None if base is None else base[a:b])
        for a, b in itertools.pairwise([0, common.CHUNK, 3 * common.CHUNK, size])
    ]
    assert (gram_total(np.concatenate(parts), DEVICE) == gram(xs, base)).all()


def test_gram_of_nan_is_nan():
    xs = [normal(0, 10), strange(normal(1, 10))]
    found = gram(xs)
    assert np.isfinite(found[0, 0]) and np.isnan(found[1, 0]) and np.isnan(found[1, 1])


# --- select -------------------------------------------------------------------------------------


def keeps_the_same(got, want, x, base):
    """Equal, and the same entries survive. The bound of a trim may differ: the GPU's stops at the
    last tied entry that is kept, the CPU's is 2**64 where all are.
    """
    plain = {"tie_bound": 0, "ceiling_bound": 0, "rescale": 0}
    assert got._replace(**plain) == want._replace(**plain)
    keys = reference.magnitude_keys(x.float().cpu().numpy(), base.float().cpu().numpy())
    kept = [reference.survivors(selection, keys) for selection in (got, want)]
    np.testing.assert_array_equal(*kept)
    assert np.isnan(got.rescale) == np.isnan(want.rescale)
    if np.isfinite(want.rescale):
        np.testing.assert_allclose(got.rescale, want.rescale, rtol=1e-7)


def deltas(kind, size, dtype):
    base = normal([size, 1], size, dtype=dtype, scale=0.02)
    if kind == "normal":
        return base, like(base, 2, dtype, 0.002)
    if kind == "equal":
        return base, base.clone()
    if kind == "two":  # two magnitudes only
        steps = torch.from_numpy(np.random.default_rng(3).choice([0.25, -0.5], size)).to(DEVICE)
        return torch.zeros_like(base), steps.to(dtype)
    if kind == "rising":  # the sample sees nothing like it: all large entries at the end
        return torch.zeros_like(base), torch.arange(size, device=DEVICE).float().to(dtype)
    return base, strange(like(base, 2, dtype, 0.002))


@pytest.mark.parametrize("kind", ["normal", "equal", "two", "rising", "strange"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("sampled", [False, True])
def test_select_equals_cpu(kind, dtype, sampled, monkeypatch):
    size = 1500
    monkeypatch.setattr(select_module, "PART", 512)  # several programs a query
    if sampled:  # small rooms: sample, count, gather, search on, as a large tensor does
        monkeypatch.setattr(select_module, "ROOM", 200)
        monkeypatch.setattr(select_module, "SAMPLES", 150)
    base, x = deltas(kind, size, dtype)
    specs = [
        Sparsify(MAGNITUDE, size // 2, MIXED),
        Sparsify(MAGNITUDE, 3, INDEX),
        Sparsify(MAGNITUDE, size - 1, MIXED, rescale=True),
        Sparsify(MAGNITUDE, size // 5, INDEX, rescale=True),
        Sparsify(MAGNITUDE, size // 2, MIXED, rescale=True, skip=size // 100),
        Sparsify(MAGNITUDE, 7, INDEX, skip=size // 3),
        Sparsify(MAGNITUDE, 0, skip=size // 3),
        Sparsify(MAGNITUDE, size // 3, EVERY, skip=size // 100),
    ]
    found = select([x] * len(specs), base, specs)
    for got, want in zip(found, cpu_select([x] * len(specs), base, specs), strict=True):
        keeps_the_same(got, want, x, base)


@pytest.mark.parametrize("size", [0, 1, 2, 1025])
def test_select_keeps_none_or_all(size):
    base, x = deltas("normal", size, BF16)
    specs = [Sparsify(MAGNITUDE, 0), Sparsify(MAGNITUDE, size), Sparsify(ALL), Sparsify(RANDOM)]
    specs += [Sparsify(RANDOM, keep_below=1 << 32, key=5, rescale=True)]
    wanted = cpu_select([x] * 5, base, specs)
    for got, want in zip(select([x] * 5, base, specs), wanted, strict=True):
        keeps_the_same(got, want, x, base)


def test_select_of_few_values_that_do_not_fit(monkeypatch):
    """Granules that programs leave almost empty: few values, more slots than there are."""
    chunk = 3072
    for name, value in {"CHUNK": chunk, "ROOM": 384, "SAMPLES": 512}.items():
        monkeypatch.setattr(select_module, name, value)
    monkeypatch.setattr(common, "CHUNK", chunk)
    passes = []
    one_pass = select_module._pass
    monkeypatch.setattr(select_module, "_pass", lambda *given: passes.append(one_pass(*given)))
    x = torch.zeros(chunk + 1024)
    # One, 128 and one in the steps of the first program, one in the second: four granules.
    places = [5, *range(1024, 1024 + 128), 2048 + 7, chunk + 3]
    x[places] = torch.from_numpy(1 + np.random.default_rng(0).random(131)).float()
    x, base = x.to(DEVICE), torch.zeros(chunk + 1024, device=DEVICE)
    specs = [Sparsify(MAGNITUDE, 60)]
    keeps_the_same(select([x], base, specs)[0], cpu_select([x], base, specs)[0], x, base)
    assert 1 < len(passes) < 10


def test_searches_share_a_pass_as_far_as_memory_goes(monkeypatch):
    monkeypatch.setattr(select_module, "BUFFER_BYTES", 40_000)  # each takes 9 to 16 KiB
    together = []
    answers = select_module._answers

    def counted(tables, *rest):
        together.append(len(tables.rows))
        return answers(tables, *rest)

    monkeypatch.setattr(select_module, "_answers", counted)
    pairs = [deltas("normal", n, BF16) for n in (300, 1000, 10, 700)]
    found = select_many(
        [[x] for _, x in pairs],
        [base for base, _ in pairs],
        [[Sparsify(MAGNITUDE, base.numel() // 2)] for base, _ in pairs],
    )
    assert together == [3, 1]
    for (base, x), (got,) in zip(pairs, found, strict=True):
        assert got == select([x], base, [Sparsify(MAGNITUDE, base.numel() // 2)])[0]


def test_select_random_equals_cpu():
    base, x = deltas("normal", 3001, BF16)
    specs = [Sparsify(RANDOM, keep_below=1 << 31, key=(1 << 64) - 5, rescale=True)]
    specs += [Sparsify(RANDOM, keep_below=12345678, key=77, rescale=False)]
    for got, want in zip(select([x, x], base, specs), cpu_select([x, x], base, specs), strict=True):
        keeps_the_same(got, want, x, base)


def test_select_many_is_select():
    pairs = [deltas("normal", n, d) for n in (1, 900, 0) for d in (BF16, F32)]
    specs = [
        [Sparsify(MAGNITUDE, b.numel() // 3, rescale=True), Sparsify(MAGNITUDE, b.numel() // 2)]
        for b, _ in pairs
    ]
    found = select_many([[x, x] for _, x in pairs], [b for b, _ in pairs], specs)
    for (base, x), given, got in zip(pairs, specs, found, strict=True):
        assert got == select([x, x], base, given)


# --- consensus ----------------------------------------------------------------------------------

CHOICES = {
    "all": [Sparsify(), Sparsify()],
    "trim": [Sparsify(MAGNITUDE, 700), Sparsify(MAGNITUDE, 400, INDEX)],
    "random": [Sparsify(RANDOM, keep_below=1 << 31, key=k, rescale=True) for k in (3, 1 << 63)],
    "band": [Sparsify(MAGNITUDE, 700, skip=50), Sparsify(MAGNITUDE, 400, INDEX, skip=1100)],
    "mixed": [Sparsify(MAGNITUDE, 600, rescale=True), Sparsify(RANDOM, keep_below=0)],
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_consensus_equals_cpu(choice, elect, normalize, scale):
    size = 1531
    base = strange(normal(0, size, dtype=BF16))
    xs = [strange(like(base, 1, F32, 0.3)), like(base, 2, BF16, 0.3)]
    selections = cpu_select(xs, base, CHOICES[choice])
    options = {"elect": elect, "normalize": normalize, "scale": scale}
    for weights in ([0.4, 0.8], [-0.5, 0.5]):
        out = torch.full((size,), 7, dtype=BF16, device=DEVICE)
        expected, bad = cpu_consensus(xs, base, weights, selections, BF16, **options)
        assert consensus(xs, base, weights, selections, out, **options) == bad
        same(out, expected)


@pytest.mark.parametrize("choice", ["all", "trim", "mixed"])
@pytest.mark.parametrize("votes, counted", itertools.product(VOTES, [False, True]))
def test_votes_and_divisors_equal_those_of_the_cpu(choice, votes, counted):
    base = strange(normal(0, 1531, dtype=BF16))
    xs = [strange(like(base, 1, F32, 0.3)), like(base, 2, BF16, 0.3)]
    selections, out = cpu_select(xs, base, CHOICES[choice]), torch.empty(1531, device=DEVICE)
    for elect, weights in itertools.product((False, True), ([0.4, 0.8], [-0.5, 0.25], [1.0, 1.0])):
        options = {"elect": elect, "normalize": True, "votes": votes, "counted": counted}
        expected, bad = cpu_consensus(xs, base, weights, selections, F32, **options)
        assert consensus(xs, base, weights, selections, out, **options) == bad
        same(out, expected)


@pytest.mark.parametrize("k", [1, 3, 9, 16])
def test_consensus_of_many_inputs_equals_cpu(k):
    size = 2100
    base = normal(0, size, dtype=BF16)
    xs = [like(base, i, (BF16, F16, F32)[i % 3]) for i in range(k)]
    weights = list(np.linspace(0.1, 1, k))
    selections = cpu_select(xs, base, [Sparsify(MAGNITUDE, 1000)] * k)
    expected, _ = cpu_consensus(xs, base, weights, selections, F32, elect=True, normalize=True)
    out = torch.empty(size, device=DEVICE)
    consensus(xs, base, weights, selections, out, elect=True, normalize=True)
    same(out, expected)


@pytest.mark.parametrize(
    "weights", [(1, 1), (0.5, 0.5), (1, 1, 2), (2.0**-100,), (1, -1), (0.3, 1)]
)
def test_division_by_a_sum_of_weights_is_that_of_the_cpu(weights):
    """As a product where all sums are powers of two: subnormal, infinite and NaN quotients too."""
    size = 1000
    base = torch.zeros(size, device=DEVICE)
    scale = torch.from_numpy(np.geomspace(1e-45, 1e38, size, dtype=np.float32)).to(DEVICE)
    xs = [strange(normal(i, size) * scale) for i in range(len(weights))]
    options = {"elect": True, "normalize": True}
    keep = [Selection()] * len(weights)
    expected, bad = cpu_consensus(xs, base, weights, keep, F32, **options)
    out = torch.empty(size, device=DEVICE)
    assert consensus(xs, base, weights, keep, out, **options) == bad
    same(out, expected)
    assert consensus_module._exact(weights) == (weights not in [(1, 1, 2), (1, -1), (0.3, 1)])


def test_consensus_many_and_pieces():
    size = 32768 + 4100
    base = normal(0, size, dtype=BF16)
    xs = [like(base, 1, BF16), like(base, 2, BF16)]
    specs = [Sparsify(RANDOM, keep_below=1 << 30, key=11), Sparsify(MAGNITUDE, size // 3)]
    selections = cpu_select(xs, base, specs)
    expected, _ = cpu_consensus(xs, base, [0.5, 1], selections, BF16, elect=True, normalize=True)
    out = torch.full_like(base, 7)
    cuts = [0, 4, 2048, 36000, size]
    pieces = list(itertools.pairwise(cuts))
    consensus_many(
        [[x[a:b] for x in xs] for a, b in pieces],
        [base[a:b] for a, b in pieces],
        [[0.5, 1]] * len(pieces),
        [selections] * len(pieces),
        [out[a:b] for a, b in pieces],
        elect=True,
        normalize=True,
        origins=cuts[:-1],
    )
    same(out, expected)


# --- beyond 2**31 elements ----------------------------------------------------------------------


def mixed_index(index):
    return int(reference.mixed_indices(1, index)[0])


def philox(key, counter):
    """Philox4x32-10 of one counter: an oracle in plain integers (Salmon et al., SC11)."""
    c, k, mask = (
        [counter & 0xFFFFFFFF, counter >> 32, 0, 0],
        [key & 0xFFFFFFFF, key >> 32],
        (1 << 32) - 1,
    )
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & mask, a >> 32 ^ c[3] ^ k[1], a & mask]
        k = [k[0] + 0x9E3779B9 & mask, k[1] + 0xBB67AE85 & mask]
    return c


def test_philox_known_answer():
    assert philox(0, 0) == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]  # Random123's kat_vectors


@pytest.mark.parametrize("start", [(1 << 31) + 32768, (1 << 33) + 32768 * 5])
@pytest.mark.parametrize("rule", ["mixed", "index", "random"])
def test_far_elements_of_a_huge_tensor(start, rule):
    """A segment whose base address lies far before a small buffer: only the last chunk's addresses
    are real.
    """
    size = 1300
    base = torch.zeros(size, device=DEVICE)
    x = torch.ones(size, device=DEVICE)
    out = torch.full((size,), 7.0, device=DEVICE)
    index = range(start, start + size)
    if rule == "random":
        selection = Selection(RANDOM, keep_below=1 << 31, key=12345)
        kept = [philox(12345, i // 4)[i % 4] < 1 << 31 for i in index]
    else:
        tie_rule = MIXED if rule == "mixed" else INDEX
        orders = [mixed_index(i) if rule == "mixed" else i for i in index]
        bound = sorted(orders)[size // 3]
        selection = Selection(MAGNITUDE, 0x3F800000, bound, tie_rule)
        kept = [order < bound for order in orders]
    mode, numbers = consensus_module.rule_of(selection, wide=True)
    batch = common.group([0], [[base, x, out]])
    table = batch.table.clone()
    table[0, 0] = start + size
    table[0, 1] = -(start // common.CHUNK)  # program 0 is then the chunk at `start`
    table[0, 2:] -= 4 * start
    counts = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    common.launch(
        consensus_module.consensus_kernel,
        1,
        base.device,
        table,
        batch.owners,
        torch.tensor([numbers], device=DEVICE),
        torch.tensor([1.0, 1.0, 1.0, 1.0], device=DEVICE),
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        counts,
        CODES=(0, 0), OUT=0, MODES=(mode,), RESCALED=(False,), ELECT=False, NORMALIZE=False,
        EXACT=False, SCALED=False, WIDE=True, ALIGNED=False, CHUNK=common.CHUNK, BLOCK=512,
        HEAD=common.HEAD, RULE=consensus_module.RULE,
    )  # fmt: skip
    assert out.cpu().tolist() == [1.0 if k else 0.0 for k in kept]


@pytest.mark.parametrize("kind", ["two", "strange"])
@pytest.mark.parametrize("tie_rule", [MIXED, INDEX])
def test_select_in_33_bit_orders(tie_rule, kind, monkeypatch):
    """The path of tensors beyond 2**32 elements, forced on a small one: the same answer."""
    monkeypatch.setattr(select_module, "NARROW", 0)
    monkeypatch.setattr(select_module, "ROOM", 60)
    monkeypatch.setattr(select_module, "SAMPLES", 40)
    base, x = deltas(kind, 700, BF16)
    specs = [Sparsify(MAGNITUDE, 10, tie_rule, rescale=True)]  # of NaNs, where there are any
    got, want = select([x], base, specs)[0], cpu_select([x], base, specs)[0]
    keeps_the_same(got, want, x, base)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 20 GB on a GPU")
def test_a_real_tensor_beyond_32_bits():
    size = (1 << 32) + 4097
    x = torch.zeros(size, dtype=BF16, device=DEVICE)
    y = torch.zeros(size, dtype=BF16, device=DEVICE)
    x[-4097:] = 1
    y[-1] = 3
    assert gram([x, y])[0, 0] == 4097 and gram([x, y])[1, 0] == 3
    got = select([x], y, [Sparsify(MAGNITUDE, 4000)])[0]
    assert got.threshold_bits == 0x3F800000
    consensus([x], y, [1.0], [got], x, elect=True, normalize=True)
    assert int((x[-4097:] == 1).sum()) == 4000 and float(x[-1]) == 1  # |1 - 3| is kept too


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message, change",
    [
        ("input 1 is not contiguous", lambda x, o: ([x, torch.ones(20, device=DEVICE)[::2]], o)),
        ("input 1 has 3 elements", lambda x, o: ([x, x[:3]], o)),
        ("input 1: cannot merge torch.int32", lambda x, o: ([x, x.int()], o)),
        ("input 1 is on meta", lambda x, o: ([x, torch.empty(10, device="meta")], o)),
        ("out: cannot merge torch.float8", lambda x, o: ([x, x], o.to(torch.float8_e5m2))),
        ("no input tensors", lambda x, o: ([], o)),
        ("17 inputs", lambda x, o: ([x] * 17, o)),
        ("1 coefficients for 2 inputs", lambda x, o: ([x, x], o)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_combine_refuses_by_name(message, change):
    xs, out = change(torch.ones(10, device=DEVICE), torch.ones(10, device=DEVICE))
    count = 1 if message.startswith("1 coeff") else len(xs)
    with pytest.raises(FastmergeError, match=message):
        combine(xs, np.ones(count), out)


def test_shapes_and_origins_are_refused():
    x = torch.ones(12, device=DEVICE)
    with pytest.raises(FastmergeError, match="rows 3 x cols 5"):
        gram([x], axis=1, rows=3, cols=5)
    with pytest.raises(FastmergeError, match="axis 2"):
        combine([x], np.ones((3, 1)), x, axis=2, rows=3, cols=4)
    with pytest.raises(FastmergeError, match="multiple of 4"):
        consensus([x], x, [1], [Selection()], x, elect=False, normalize=False, origin=2)
    with pytest.raises(FastmergeError, match="keep 13"):
        select([x], x, [Sparsify(MAGNITUDE, 13)])


def test_cpu_tensors_without_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(common, "interpreted", lambda: False)
    with pytest.raises(FastmergeError, match="need a GPU; use device cpu"):
        combine_module.combine([torch.ones(3)], np.ones(1), torch.ones(3))
