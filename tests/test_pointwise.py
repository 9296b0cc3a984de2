"""Methods that work entry by entry: the formulas' kernels against NumPy, the methods against their
definitions in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastmerge import _C, ops
from fastmerge.compute import formulas, reference
from fastmerge.compute.cpu import cpu
from fastmerge.errors import FastmergeError
from fastmerge.selection import INDEX, MAGNITUDE, MIXED, Selection, Sparsify

RNG = np.random.default_rng(3)
BASE = RNG.normal(size=(16, 40))
MODELS = BASE + 0.1 * RNG.normal(size=(3, 16, 40)) * (RNG.random((3, 16, 40)) < 0.6)
SPECIAL = np.float32([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, 3e38])

# Formula -> inputs it takes, numbers, whether it has factors.
FORMULAS: dict[str, tuple[int, list[float], bool]] = {
    "zero": (1, [], False),
    "near_swap": (1, [0.05], False),
    "active": (3, [0.02, 1], False),
    "reinforced": (3, [0.02, 1.0, 1.1, 0.9], False),
    "variance": (3, [], False),
    "varied": (3, [], False),
    "varied_delta": (3, [1], False),
    "select_and_erase": (3, [0.2, 0.5, 0.3], False),
    "importance": (1, [], True),
    "fuse": (1, [0.1], True),
    "largest": (3, [0.7], False),
    "agreed": (3, [2, 0.8, 1, 0.4, 0.5, 0.3, 1.2, 0.6], False),
}


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Any:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def numbers(count: int, seed: int, special: bool) -> np.ndarray:
    rng = np.random.default_rng([seed, count])
    x = rng.normal(size=count).astype(np.float32)
    if special:
        x[rng.random(count) < 0.1] = rng.choice(SPECIAL, 1)
    x[rng.random(count) < 0.2] = 0.5  # equal in several models
    return x


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    as_bits = [
        np.where(np.isnan(a), np.float32(np.nan), a).view(np.uint32) for a in (found, wanted)
    ]
    return np.array_equal(*as_bits)


@pytest.mark.usefixtures("isa")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("count", [1, 255, 2048, 6151])
@pytest.mark.parametrize("formula", FORMULAS)
def test_a_formula_has_numpys_bits(memory: Any, formula: str, count: int, special: bool) -> None:
    k, given, by_row = FORMULAS[formula]
    types = ["BF16", "F32", "F16"][:k]
    stored = [reference.round_to(numbers(count, i, special), t) for i, t in enumerate(types)]
    base = reference.round_to(numbers(count, 9, special), "BF16")
    views = [
        memory.put(reference.widen(x), t, offset=1) for x, t in zip(stored, types, strict=True)
    ]
    on = memory.put(reference.widen(base), "BF16", offset=1)
    factors = np.array([0.3, 0.8, 1.5])[: 3 if count % 3 == 0 else 1] if by_row else None
    selections = [None]
    if k > 1:
        keys = reference.magnitude_keys(
            formulas.pointwise("variance", stored, base), np.zeros(count, np.float32)
        )
        for rule in (MIXED, INDEX):
            spec = Sparsify(MAGNITUDE, count // 3, rule)
            selections.append(
                reference.select([keys.view(np.float32)], np.float32([0] * count), [spec])[0]
            )
    for selection in selections:
        wanted = formulas.pointwise(
            formula, stored, base, given, selection=selection, factors=factors,
            arithmetic=np.float32,
        )  # fmt: skip
        each = None if factors is None else factors.astype(np.float32)
        view = _C.pointwise(formula, views, on, given, selection=selection, factors=each)
        for threads in (1, 3):
            out = memory.blank(count, "F32")
            _C.copy(_C.Pool(threads), view, _C.MemorySink(out))
            found = memory.read(out)
            assert same(found, np.asarray(wanted, np.float32)), (formula, selection)
        begin = count // 3  # in the middle of a tile
        part = memory.blank(count - begin, "F32")
        _C.copy(_C.Pool(1), view.slice(begin, count), _C.MemorySink(part))
        assert same(memory.read(part), found[begin:])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("cols", [1, 3, 40, 5000, 70000])
def test_divergences(memory: Any, cols: int) -> None:
    """Right to 1e-6 even where the rows differ by a bf16 step, and the same for all threads."""
    rng = np.random.default_rng(cols)
    base = rng.normal(size=(4, cols)).astype(np.float32) * 3
    x = base + np.float32([[1], [0.1], [1e-3], [0]]) * rng.normal(size=base.shape)
    views = [memory.put(a.astype(np.float32), "F32") for a in (x, base)]
    found = [_C.divergences(_C.Pool(threads), *views, cols) for threads in (1, 3)]
    assert np.array_equal(*found)
    wanted = formulas.divergences(x.astype(np.float32), base, cols)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-6, atol=1e-15)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("cols", [2, 777, 70000])
def test_divergences_of_what_hardly_moved(memory: Any, cols: int) -> None:
    """Right to some 1e-6 however little a row moved, up to where another formula takes over; and 0
    of what has not.
    """
    rng = np.random.default_rng(cols)
    base = (rng.normal(size=(7, cols)) * [[3]] + [[0], [60], [-60], [0], [0], [0], [0]]).clip(
        -64, 64
    )
    steps = np.array([[1e-4], [1e-5], [1e-6], [1e-3], [0.1], [0.1249], [0]])
    base = base.astype(np.float32)
    x = (base + steps * rng.uniform(-1, 1, base.shape)).astype(np.float32)
    found = _C.divergences(_C.Pool(1), memory.put(x, "F32"), memory.put(base, "F32"), cols)
    exact = []
    for row in (x, base):  # sums of p ln(p / q) in fp64 are wrong here
        powers = np.exp(row.astype(np.longdouble) - row.max(axis=1, keepdims=True))
        exact.append(powers / powers.sum(axis=1, keepdims=True) + np.longdouble(1e-8))
    p, q = exact
    wanted = (p * np.log(p / q)).sum(axis=1).astype(float)
    np.testing.assert_allclose(found[:-1], wanted[:-1], rtol=5e-6)
    assert found[-1] == 0.0


def test_divergences_of_extremes(memory: Any) -> None:
    rows = np.float32([[0, -3e38], [np.inf, 0], [np.nan, 0], [1e4, -1e4]])
    x, base = (memory.put(a, "F32") for a in (rows, np.zeros_like(rows)))
    found = _C.divergences(_C.Pool(1), x, base, 2)
    assert np.isfinite(found[[0, 3]]).all() and np.isnan(found[[1, 2]]).all()
    back = _C.divergences(_C.Pool(1), base, x, 2)  # a NaN of the base is no smaller fault
    assert np.isfinite(back[[0, 3]]).all() and np.isnan(back[[1, 2]]).all()


@pytest.mark.parametrize(
    "formula, inputs, given, said",
    [
        ("square", 1, [], "no formula 'square'"),
        ("near_swap", 2, [1], "number of inputs"),
        ("near_swap", 1, [], "other numbers"),
        ("agreed", 2, [1, 1, 1], "other numbers"),
        ("varied_delta", 2, [2], "no input"),
        ("fuse", 1, [1], "one factor for each row"),
    ],
)
def test_what_does_not_fit_is_refused(
    memory: Any, formula: str, inputs: int, given: list[float], said: str
) -> None:
    x = memory.put(np.ones(8, np.float32), "F32")
    with pytest.raises(ValueError, match=said):
        _C.pointwise(formula, [x] * inputs, x, given)


# --- the methods, in float64 ----------------------------------------------------------------------


def merged(name: str, models: Any, **values: Any) -> np.ndarray:
    made = ops.merge(name, [m.astype(np.float32) for m in models], values, base=F32)
    return np.asarray(made)


F32 = BASE.astype(np.float32)
DELTAS = (MODELS.astype(np.float32) - F32).astype(np.float64)


def near(found: np.ndarray, delta: np.ndarray) -> None:
    np.testing.assert_allclose(found, F32.astype(np.float64) + delta, rtol=1e-6, atol=1e-6)


def test_nearswap() -> None:
    weight = np.clip(0.05 / np.maximum(np.abs(DELTAS[0]), 1e-6), 0, 1)
    near(ops.nearswap(F32, MODELS[0].astype(np.float32), 0.05), weight * DELTAS[0])


def test_ram() -> None:
    active = np.abs(DELTAS) > 0.01
    wanted = (DELTAS * active).sum(axis=0) / np.maximum(active.sum(axis=0), 1)
    near(merged("ram", MODELS, epsilon=0.01), wanted)


def test_ramplus_strengthens_what_is_unique() -> None:
    active = np.abs(DELTAS) > 0.01
    count = active.sum(axis=0)
    unique, shared = ((active & c).sum(axis=(1, 2)) for c in (count == 1, count > 1))
    gains = 1 + 0.5 * np.minimum(shared / unique, 1.5)
    each = np.where(count == 1, gains[:, None, None], 1 / np.maximum(count, 1))
    near(
        merged("ramplus_tl", MODELS, epsilon=0.01, r=0.5, alpha=1.5),
        (DELTAS * active * each).sum(axis=0),
    )


@pytest.mark.parametrize("moved", [0.0, 1.0])
@pytest.mark.filterwarnings("error")
def test_ramplus_without_epsilon_warns_of_no_division(moved: float) -> None:
    models = [F32 + np.float32(moved)] * 2  # nothing is moved by one alone
    np.testing.assert_array_equal(ops.ramplus_tl(F32, models, epsilon=0.0), models[0])


@pytest.mark.parametrize("fraction", [1.0, 0.4, 0.0])
def test_sce(fraction: float) -> None:
    variance = DELTAS.var(axis=0)
    count = int((variance > 0).sum() * fraction)
    kept = variance >= np.sort(variance.ravel())[::-1][count - 1] if count else variance < 0
    chosen = DELTAS * (kept if fraction < 1 else 1)
    weights = (chosen**2).sum(axis=(1, 2)) / max((chosen**2).sum(), 1e-30)
    agrees = np.sign(chosen) == np.where(chosen.sum(axis=0) >= 0, 1, -1)
    used = weights[:, None, None] * agrees
    wanted = (chosen * used).sum(axis=0) / np.maximum(used.sum(axis=0), 1e-6)
    found = merged("sce", MODELS, select_topk=fraction)
    near(found, wanted)
    assert int((found != F32).sum()) == int((wanted != 0).sum())


def test_sce_weighs_small_deltas_alike() -> None:
    """Below a sum of mean squares of 1e-6 the weights are equal, as in mergekit 0.1.5."""
    base = np.zeros(4, np.float32)
    found = ops.sce(base, [np.full(4, 1e-4, np.float32), np.full(4, 4e-4, np.float32)])
    np.testing.assert_allclose(found, 2.5e-4, rtol=1e-6)


def test_arcee_fusion() -> None:
    def softmax(x: np.ndarray) -> np.ndarray:
        powers = np.exp(x)
        return powers / powers.sum(axis=-1, keepdims=True) + 1e-8

    p, q = softmax(F32 + DELTAS[0]), softmax(F32.astype(np.float64))
    importance = np.abs(DELTAS[0]) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    ordered = np.sort(importance.ravel())
    first, median, third = ordered[[int(f * (ordered.size - 1)) for f in (0.25, 0.5, 0.75)]]
    kept = importance >= median + 1.5 * (third - first)
    assert 10 < kept.sum() < 200
    near(ops.arcee_fusion(F32, MODELS[0].astype(np.float32)), DELTAS[0] * kept)


def test_arcee_fusion_of_equal_and_single_entries() -> None:
    assert np.array_equal(ops.arcee_fusion(F32, F32), F32)
    for shape in ((), (1,), (0,), (3, 1)):
        base, x = np.zeros(shape, np.float32), np.ones(shape, np.float32)
        # A row of one entry diverges by nothing: all are at the threshold, 0.
        assert np.array_equal(ops.arcee_fusion(base, x), x)


def test_magmax() -> None:
    best = np.take_along_axis(DELTAS, np.abs(DELTAS).argmax(axis=0)[None], axis=0)[0]
    near(merged("magmax", MODELS, **{"lambda": 0.5}), 0.5 * best)


def test_consensus_ta() -> None:
    weights = np.array([1.0, 0.5, 0.7])[:, None, None]
    total = (weights * DELTAS).sum(axis=0)
    claims = np.abs(DELTAS) >= np.abs(total - DELTAS) * 0.6
    wanted = 0.9 * total * (claims.sum(axis=0) >= 2)
    found = merged(
        "consensus_ta", MODELS, weight=[1.0, 0.5, 0.7], mask_lambda=0.6, agree=2, **{"lambda": 0.9}
    )
    near(found, wanted)


def test_geometric_median() -> None:
    """The gradient of the sum of distances is 0 there, and an outlier has little say."""
    points = RNG.normal(size=(4, 50)).astype(np.float32)
    found = ops.geometric_median(list(points), tol=1e-9, max_iter=1000).astype(np.float64)
    off = found - points
    gradient = (off / np.linalg.norm(off, axis=1, keepdims=True)).sum(axis=0)
    assert np.linalg.norm(gradient) < 1e-4
    crowd = [np.ones(50, np.float32) + 1e-3 * p for p in points]
    robust = ops.geometric_median([*crowd, np.full(50, 100, np.float32)])
    assert np.abs(robust - 1).max() < 0.01
    np.testing.assert_allclose(ops.geometric_median([points[0]] * 3), points[0], rtol=1e-6)
    with pytest.raises(FastmergeError, match="must not be negative"):
        ops.geometric_median(list(points), [1, 1, -1, 1])


def test_primitives_read_what_is_computed() -> None:
    """Every primitive reads such a tensor as if it were stored."""
    x, base = RNG.normal(size=(2, 5000)).astype(np.float32)
    on = cpu(2)
    made = on.pointwise("largest", [on.tensor(x)], on.tensor(base), [2.0])
    stored = base + (x - base) * np.float32(2)
    assert np.array_equal(on.array(made), stored)
    assert np.array_equal(
        on.gram([made, on.tensor(x)]), on.gram([on.tensor(a) for a in (stored, x)])
    )
    specs = [Sparsify(MAGNITUDE, 700, INDEX, rescale=True)]
    zero = on.tensor(np.zeros_like(x))
    assert on.select([made], zero, specs) == on.select([on.tensor(stored)], zero, specs)
    assert isinstance(on.select([made], zero, specs)[0], Selection)


# --- in schedules, and where there are no kernels -------------------------------------------------


def test_steps_take_the_state_as_base(zoo: Any) -> None:
    from fastmerge.api import materialise
    from fastmerge.engine.in_memory import materialise_plan
    from fastmerge.evaluation.journal import Journal
    from fastmerge.retrograde import open_space, walk
    from fastmerge.retrograde.schedule import load
    from fastmerge.search.lab import Lab

    a = zoo.base("a", dtype="F32")
    b, c = zoo.tune(a, "b", seed=2), zoo.tune(a, "c", seed=3)
    own, near_b, near_c = (
        dict(materialise({"merge_method": "passthrough", "models": [{"model": str(m)}]}))
        for m in (a, b, c)
    )

    def walked(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
        schedule = load({
            "baseline": str(a), "pool": [str(b), str(c)], **more,
            "schedule": {"steps": [{"degrade": step} for step in steps]},
        })  # fmt: skip
        space = open_space(schedule, threads=1)
        lab = Lab(space, None, None, Journal(None), threads=1)
        state = walk(schedule, space, lab, seed=5).states[-1]
        return {item.name: array for item, array in materialise_plan(space.plan(state))}

    found = walked(
        {"partner": "b", "method": "nearswap", "t": 0.002},
        {"partner": "c", "method": "arcee_fusion"},
    )
    for name, array in found.items():
        between = ops.nearswap(own[name], near_b[name], 0.002)
        assert np.array_equal(array, ops.arcee_fusion(between, near_c[name])), name
    found = walked({"partner": "b", "method": "ram"}, base_model=str(c))
    for name, array in found.items():
        assert np.array_equal(array, ops.ram(near_c[name], [own[name], near_b[name]])), name
    with pytest.raises(FastmergeError, match="takes one model besides the base: give base 'state'"):
        walked({"partner": "b", "method": "nearswap", "t": 0.1}, base_model=str(c))
    with pytest.raises(FastmergeError, match="sce needs a base other than the state"):
        walked({"partner": "b", "method": "sce"})


def test_the_gpu_refuses_by_name() -> None:
    backend = pytest.importorskip("fastmerge.kernels.backend")
    from fastmerge.methods import find
    from fastmerge.tree.nodes import Merge, Stored

    # ramplus_tl takes the entries that one model alone moved beside those of each.
    for name, most in (("sce", 16), ("ram", 16), ("ramplus_tl", 15)):
        leaves = tuple(Stored(i, "x", (4,), "BF16") for i in range(most + 1))
        for count, said in (
            (most, None),
            (most + 1, f"has {most + 1} inputs and the GPU kernels take {most}"),
        ):
            node = Merge(find(name), leaves[:count], leaves[0], {}, ({},) * count)
            assert backend.TritonBackend.takes(node, node.operands) == said
