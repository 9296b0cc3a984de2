"""What the numbers come to where arithmetic is at its edge: weights that cancel, models that count
for nothing, inputs that are equal.
"""

from __future__ import annotations

import numpy as np
import pytest

from fastmerge import _C, api, ops
from fastmerge.errors import FastmergeError
from fastmerge.methods import METHODS, find
from fastmerge.recipe.document import Recipe
from fastmerge.retrograde import schedule as schedules
from fastmerge.retrograde.opening import open_template
from fastmerge.search.sweep import parse_range

CANCEL = ([0.3, 0.6, -0.9], [0.1, 0.2, -0.3], [0.7, 0.1, -0.8], [1.0, -1.0 - 1e-7])
UNDIVIDED = CANCEL[1:3]  # fp32 adds them to 0
EPS = np.float32(2) ** -24


def entries(models, weights=None, **parameters):
    """``models:`` of a recipe; weights None: no weight."""
    listed = []
    for i, model in enumerate(models):
        own = {**parameters, **({} if weights is None else {"weight": weights[i]})}
        listed.append({"model": str(model), "parameters": own})
    return listed


def merged(recipe):
    return dict(api.materialise(recipe))


@pytest.fixture
def four(zoo):
    base = zoo.base("a", layers=1)
    return [base, *(zoo.tune(base, name, seed=i) for i, name in enumerate("bcd"))]


# ---------------------------------------------------------------- weights that cancel


@pytest.mark.parametrize("weights", CANCEL, ids=str)
@pytest.mark.parametrize("method", ["linear", "multislerp", "task_arithmetic", "dare_linear"])
def test_weights_that_cancel_are_refused_in_the_plan(four, method, weights):
    if find(method).base == "required" and weights in UNDIVIDED:
        return
    models = four[1 : 1 + len(weights)]
    recipe = {"merge_method": method, "models": entries(models, weights)}
    if find(method).base == "required":
        recipe |= {"base_model": str(four[0]), "parameters": {"normalize": True}}
    with pytest.raises(FastmergeError, match=r"^recipe\.models.* sum to 0 but for"):
        api.plan(recipe)


def test_weights_that_cancel_in_one_tensor_name_it(four):
    weights = [1, [{"filter": "lm_head", "value": -1}, {"value": 1}]]
    recipe = {"merge_method": "linear", "models": entries(four[:2], weights)}
    with pytest.raises(FastmergeError, match=r"sum to 0; .* \(tensor 'lm_head\.weight'\)$"):
        api.plan(recipe)


def test_ties_refuses_any_agreement_whose_weights_cancel(four):
    """The first and the last alone leave 1e-7 of their 1."""
    recipe = {
        "merge_method": "ties",
        "base_model": str(four[0]),
        "models": entries(four[1:], [0.5, 1, -0.5000001]),
    }
    with pytest.raises(FastmergeError, match=r"\[0\.5, -0\.5000001\] sum to 0 but for"):
        api.plan(recipe)


@pytest.mark.parametrize("weights", [*UNDIVIDED, [2.0**70, -(2.0**70)]], ids=str)
@pytest.mark.parametrize("method", ["task_arithmetic", "breadcrumbs"])
def test_opposite_weights_leave_deltas_undivided(method, weights):
    """mergekit 0.1.5's rule: a sum of all weights below 1e-8 counts as 1."""
    base, *models = np.random.default_rng(2).normal(size=(4, 2, 30)).astype(np.float32)
    merge, given = getattr(ops, method), [base, models[: len(weights)], weights]
    np.testing.assert_array_equal(merge(*given, normalize=True), merge(*given, normalize=False))


def test_opposite_weights_of_ties_leave_a_sum_undivided():
    """mergekit 0.1.5's rule: a sum of weights that is exactly 0 counts as 1."""
    x = np.full((2, 3), 2.0, np.float32)
    base = np.ones_like(x)
    # Deltas 1 and -1 weigh 1 and 1: they agree, and their weights sum to 0.
    np.testing.assert_array_equal(ops.ties(base, [x, base * 0], [1, -1]), base + 2)


@pytest.mark.parametrize("weights", [[0.3, -0.2999], [1, 0.5, -1.4], [1e-9, 1e-9]], ids=str)
def test_weights_that_do_not_cancel_are_divided_by(weights):
    x = np.random.default_rng(1).normal(size=(len(weights), 50)).astype(np.float32)
    exact = np.average(x.astype(np.float64), axis=0, weights=weights)
    size = np.abs(weights).sum() / abs(sum(weights))
    np.testing.assert_allclose(ops.linear(list(x), weights), exact, rtol=20 * size * EPS, atol=EPS)


def test_nuslerp_refuses_weights_that_cancel_beside_their_size():
    x, y = np.eye(2, dtype=np.float32)
    with pytest.raises(FastmergeError, match="sum to 0 but for"):
        ops.nuslerp(x, y, [1000.0, -1000.001])


def test_nuslerp_refuses_weights_that_are_a_t_beyond_slerps():
    x, y = np.eye(2, dtype=np.float32)
    with pytest.raises(FastmergeError, match=r"are t = -99, and t must be in \[-1, 2\]"):
        ops.nuslerp(x, y, [1.0, -0.99])
    ops.nuslerp(x, y, [1.0, -0.5])  # t = -1


def test_a_weighted_sum_stays_in_range_until_it_is_divided():
    x = np.array([3e38, -2e38, 1e30], np.float32)
    np.testing.assert_allclose(ops.linear([x, x], [3.0, 3.0]), x, rtol=2 * EPS)
    np.testing.assert_allclose(ops.linear([x, x], [1e30, 1e30]), x, rtol=2 * EPS)
    base = np.zeros_like(x)
    for method in (ops.task_arithmetic, ops.ties):
        np.testing.assert_array_equal(method(base, [x, x], [64.0, 64.0], normalize=True), x)


@pytest.mark.parametrize("size", [1e-44, 1e-310])
def test_weights_below_fp32_are_divided_by_their_sum(size):
    x, y = np.eye(2, dtype=np.float32)
    np.testing.assert_allclose(ops.linear([x, y], [size, 3 * size]), [0.25, 0.75], rtol=1e-6)


# ---------------------------------------------------------------- weight 0, and t 0 or 1


def poisoned(zoo, four):
    """The second model with a NaN and an infinity in its head."""
    tensors = zoo.read(four[1])
    tensors["lm_head.weight"][0, :2] = np.nan, np.inf
    return zoo.write("poisoned", tensors)


HEAD = [{"filter": "lm_head", "value": 0}, {"value": 1}]
UNUSED = {
    "linear": ("linear", [1, HEAD], {}),
    "linear, not normalised": ("linear", [1, HEAD], {"normalize": False}),
    "slerp": ("slerp", None, {"t": [{"filter": "lm_head", "value": 0}, {"value": 0.5}]}),
    "nuslerp": ("nuslerp", [1, HEAD], {}),
    "nuslerp, by rows": ("nuslerp", [1, HEAD], {"nuslerp_flatten": False}),
    "multislerp": ("multislerp", [1, HEAD], {}),
    "multislerp, not normalised": ("multislerp", [1, HEAD], {"normalize_weights": False}),
    "task_arithmetic": ("task_arithmetic", [HEAD], {}),
    "ties": ("ties", [HEAD], {"density": 0.5}),
    "dare_linear": ("dare_linear", [HEAD], {"density": 0.5}),
    "dare_ties": ("dare_ties", [HEAD], {"density": 0.5}),
    "della": ("della", [HEAD], {"density": 0.5}),
    "della_linear": ("della_linear", [HEAD], {"density": 0.5}),
    "breadcrumbs": ("breadcrumbs", [HEAD], {"density": 0.5, "gamma": 0.1}),
    "breadcrumbs_ties": ("breadcrumbs_ties", [HEAD], {"density": 0.5, "gamma": 0.1}),
    "consensus_ta": ("consensus_ta", [HEAD], {"agree": 1}),
    "nearswap": ("nearswap", None, {"t": HEAD}),
    "magmax": ("magmax", None, {"lambda": HEAD}),
}


@pytest.mark.parametrize("case", UNUSED)
def test_a_model_of_weight_0_is_not_read(zoo, four, case):
    method, weights, parameters = UNUSED[case]
    bad = poisoned(zoo, four)
    required = find(method).base == "required"
    models = [bad] if required else [four[0], bad]
    recipe = {
        "merge_method": method,
        "models": entries(models, weights),
        "parameters": parameters,
        **({"base_model": str(four[0])} if find(method).base in ("required", "first") else {}),
    }
    plan = api.plan(recipe)
    head = next(item for item in plan.tensors if item.name == "lm_head.weight")
    others = sum(item.nbytes for item in plan.tensors if item is not head)
    assert plan.bytes_in == 2 * others + head.nbytes
    found = merged(plan)
    np.testing.assert_array_equal(found.pop("lm_head.weight"), merged_head(four[0]))
    for bits in found.values():
        assert ((bits & 0x7F80) != 0x7F80).all()


def merged_head(model):
    """A model's own head, as stored."""
    recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    return merged(recipe)["lm_head.weight"]


def test_t_1_takes_the_other_model_as_it_is(zoo, four):
    bad = poisoned(zoo, four)
    recipe = {
        "merge_method": "slerp",
        "base_model": str(bad),
        "models": entries([bad, four[0]]),
        "parameters": {"t": 1},
    }
    assert api.plan(recipe).methods == {"copy": 12}
    np.testing.assert_array_equal(merged(recipe)["lm_head.weight"], merged_head(four[0]))


def test_a_model_of_weight_0_does_not_move_what_is_drawn_for_the_others(four):
    def dare(weights, models):
        return merged(
            {
                "merge_method": "dare_ties",
                "base_model": str(four[0]),
                "models": entries(models, weights, density=0.5),
                "seed": 3,
            }
        )

    among, alone = dare([0, 1], four[1:3]), dare([1e-38, 1], four[1:3])
    for name in among:
        np.testing.assert_array_equal(among[name], alone[name])


@pytest.mark.parametrize("where", ["first", "second"])
def test_weight_0_in_memory(where):
    x = np.array([[1.0, -0.0, 3.0]], np.float32)
    bad = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    pair, weights = ([bad, x], [0, 2]) if where == "first" else ([x, bad], [2, 0])
    t = float(where == "first")
    for found in (
        ops.linear(pair, weights),
        ops.slerp(*pair, t),
        ops.nuslerp(*pair, weights),
        ops.nuslerp(*pair, weights, flatten=False, row_wise=True),
        ops.multislerp(pair, weights),
    ):
        assert found.tobytes() == x.tobytes()
    base = np.zeros_like(x) + 1
    for found in (
        ops.task_arithmetic(base, pair, np.array(weights) / 2),
        ops.ties(base, pair, weights, density=0.9),
        ops.nuslerp(*pair, weights, base=base),
        ops.multislerp(pair, weights, base=base),
    ):
        assert np.isfinite(found).all()
    assert ops.ties(base, [bad, bad], [0, 0]).tobytes() == base.tobytes()


def test_multislerp_of_one_model_that_counts_is_its_length_times_the_weight():
    x, y = np.random.default_rng(2).normal(size=(2, 30)).astype(np.float32)
    found = ops.multislerp([x, y], [0.5, 0], normalize_weights=False)
    np.testing.assert_array_equal(found, x / 2)


# ---------------------------------------------------------------- t


@pytest.mark.parametrize("t", [35, 2.5, -1.5, 1e9])
def test_t_far_outside_is_refused_wherever_it_is_given(t):
    x, y = np.eye(2, dtype=np.float32)
    hint = rf"; for {t:g} % write {t / 100:g}" if 5 <= t <= 100 else ""
    said = rf"in \[-1, 2\], not {t!r}(\.0)?{hint}$"
    recipe = {
        "merge_method": "slerp",
        "models": [{"model": "a"}, {"model": "b"}],
        "base_model": "a",
        "parameters": {"t": [{"filter": "mlp", "value": [0.1, t]}, {"value": 0.5}]},
    }
    step = {"degrade": {"partner": "weakest", "method": "slerp", "t": t}}
    schedule = {
        "baseline": {"model": "a", "accuracy": 50},
        "pool": [{"model": "b", "accuracy": 40}],
        "schedule": {"steps": [step]},
    }
    for call in (
        lambda: ops.slerp(x, y, t),
        lambda: parse_range(f"0,{t}"),
        lambda: Recipe.load(recipe),
        lambda: schedules.load(schedule),
    ):
        with pytest.raises(FastmergeError, match=said):
            call()


def test_t_outside_0_to_1_is_noted(four):
    recipe = {
        "merge_method": "slerp",
        "base_model": str(four[0]),
        "models": entries(four[:2]),
        "parameters": {"t": 1.25},
    }
    note = (
        "recipe.parameters.t: t = 1.25 lies outside [0, 1]: it extrapolates beyond the second of "
        "the two models"
    )
    assert note in api.plan(recipe).notes
    recipe["parameters"] = {"t": 0.25}
    assert not any("extrapolates" in note for note in api.plan(recipe).notes)


def test_a_schedules_t_outside_0_to_1_is_noted(four):
    step = {"partner": "weakest", "method": "slerp", "t": [-0.5, 0.2]}
    schedule = {
        "baseline": {"model": str(four[0]), "accuracy": 50},
        "pool": [{"model": str(four[1]), "accuracy": 40}],
        "schedule": {"steps": [{"degrade": step}]},
    }
    notes = open_template(schedules.load(schedule)).notes
    assert any("t = -0.5 lies outside [0, 1]: it extrapolates" in note for note in notes)
    assert not any("t = 0.2" in note for note in notes)


# ---------------------------------------------------------------- directions


@pytest.mark.parametrize("method", ["karcher"])
def test_a_tolerance_of_0_ends(method):
    x = np.random.default_rng(3).normal(size=(3, 40)).astype(np.float32)
    found = METHODS[method].rule(
        np.float64(x) @ np.float64(x).T, {"max_iter": 10**9, "tol": 0.0}, [{}] * 3, False
    )
    near = METHODS[method].rule(
        np.float64(x) @ np.float64(x).T, {"max_iter": 100, "tol": 1e-7}, [{}] * 3, False
    )
    np.testing.assert_allclose(found.coefficients, near.coefficients, rtol=1e-5)


def test_karcher_of_opposites_with_a_tolerance_of_0_has_numbers():
    x = np.random.default_rng(4).normal(size=20).astype(np.float32)
    assert np.isfinite(ops.karcher([x, -x], tol=0, max_iter=1000)).all()


def test_a_zero_mean_direction_names_the_tensor(zoo):
    x = np.random.default_rng(5).normal(size=(4, 4))
    models = [
        zoo.write(name, {"w": sign * x}) for name, sign in zip("abcd", (1, 1, -1, -1), strict=True)
    ]
    recipe = {"merge_method": "multislerp", "models": entries(models, [1] * 4)}
    with pytest.raises(FastmergeError, match=r"^w: multislerp: the weighted mean direction"):
        merged(recipe)


# ---------------------------------------------------------------- equal inputs


EQUAL = {
    "slerp": {"parameters": {"t": 0.3}},
    "nuslerp": {"weights": [0.3, 0.45]},
    "nuslerp, rows": {"weights": [0.3, 0.45], "parameters": {"nuslerp_flatten": False}},
    "nuslerp, base": {"weights": [0.3, 0.45], "base": True},
    "linear": {"weights": [0.3, 0.45, 0.7]},
    "linear, opposite signs": {"weights": [1.7, -0.2, 0.7]},
    "linear, to 1": {"weights": [0.25, 0.25, 0.5], "parameters": {"normalize": False}},
    "karcher": {"models": 3},
    "multislerp": {"weights": [1, 0.3, 0.7]},
    "multislerp, base": {"weights": [1, 0.3], "base": True},
    "model_stock": {"models": 2, "base": True},
    "model_stock, rows": {"models": 2, "base": True, "parameters": {"filter_wise": True}},
    "task_arithmetic": {"weights": [1, 0.7], "base": True},
    "ties": {"weights": [1, 0.7], "base": True, "parameters": {"density": 0.5}},
    "ties, whole": {
        "weights": [1, 1],
        "base": True,
        "parameters": {"density": 0.5, "trim": "model"},
    },
    "ties, rescaled": {
        "weights": [1, 1],
        "base": True,
        "parameters": {"density": 0.5, "rescale": True},
    },
    "dare_linear": {"weights": [1, 0.7], "base": True, "parameters": {"density": 0.1}},
    "dare_ties": {"weights": [1, 0.7], "base": True, "parameters": {"density": 0.2}},
    "della": {"weights": [1, 0.7], "base": True, "parameters": {"density": 0.5}},
    "della_linear": {"weights": [1, 0.7], "base": True, "parameters": {"density": 0.3}},
    "breadcrumbs": {"weights": [1, 0.7], "base": True, "parameters": {"density": 0.5}},
    "breadcrumbs_ties": {"weights": [1, 0.7], "base": True, "parameters": {"density": 0.2}},
}


@pytest.fixture(scope="module")
def frozen(shared_zoo):
    """Four models in float32 whose tensors are equal but for one, w."""
    rng = np.random.default_rng(6)
    equal = {
        "embedding": rng.normal(size=(300, 40)),
        "mask": np.triu(np.full((8, 8), -np.inf), 1),
        "zeros": np.zeros(32),
        "negative_zeros": np.full(32, -0.0),
        "largest": np.full(5, np.finfo(np.float32).max),
        "smallest": np.full(5, 1e-45),
        "scalar": np.array(2.6592),
        "one": np.array([-7.25]),
    }
    for name in equal:
        equal[name] = equal[name].astype(np.float32)
    return equal, [
        shared_zoo.write(f"frozen{i}", {**equal, "w": rng.normal(size=(6, 7))}, dtype="F32")
        for i in range(4)
    ]


@pytest.mark.parametrize("case", EQUAL)
def test_equal_tensors_come_out_as_their_bytes(frozen, case):
    equal, models = frozen
    said = EQUAL[case]
    method = case.split(",")[0]
    count = said.get("models") or len(said.get("weights", models[:2]))
    has_base = said.get("base", False)
    chosen = models[1 : 1 + count] if has_base else models[:count]
    recipe = {
        "merge_method": method,
        "models": entries(chosen, said.get("weights")),
        "parameters": said.get("parameters", {}),
        **({"base_model": str(models[0])} if has_base or method == "slerp" else {}),
    }
    found = merged(recipe)
    for name, wanted in equal.items():
        assert found[name].tobytes() == wanted.tobytes(), name
    assert found["w"].tobytes() != merged_tensor(models[0], "w")


def merged_tensor(model, name):
    recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    return merged(recipe)[name].tobytes()


def test_sums_and_scaled_copies_of_equal_tensors_are_no_copies(frozen):
    equal, models = frozen
    for parameters, weights, factor in (
        ({"normalize": False}, [0.5, 1.0], 1.5),
        ({"normalize": False}, [2.0, 2.0], 4.0),
    ):
        recipe = {"merge_method": "linear", "models": entries(models[:2], weights)}
        found = merged({**recipe, "parameters": parameters})
        np.testing.assert_allclose(found["embedding"], factor * equal["embedding"], rtol=1e-6)
    recipe = {
        "merge_method": "passthrough",
        "models": entries(models[:1]),
        "parameters": {"scale": 2},
    }
    np.testing.assert_array_equal(merged(recipe)["one"], [-14.5])


def test_a_chain_of_means_keeps_equal_tensors(frozen):
    equal, models = frozen
    first = {"name": "half", "merge_method": "slerp", "base_model": str(models[0])}
    first |= {"models": entries(models[:2]), "parameters": {"t": 0.3}}
    second = {"merge_method": "linear", "models": entries(["half", models[2]], [0.3, 0.5])}
    found = merged([first, second])
    assert all(found[name].tobytes() == wanted.tobytes() for name, wanted in equal.items())


def test_infinities_of_equal_tensors_are_counted(frozen, tmp_path):
    _, models = frozen
    recipe = {"merge_method": "linear", "models": entries(models[:2], [1, 1])}
    assert api.merge(recipe, tmp_path / "out").nonfinite == {"mask": 28}


def test_tensors_of_equal_values_in_other_types_are_merged(zoo):
    x = np.float32(1.5) * np.ones(5)
    a, b = zoo.write("a", {"w": x}), zoo.write("b", {"w": x}, dtype="F32")
    recipe = {"merge_method": "linear", "models": entries([a, b], [1, 1])}
    np.testing.assert_array_equal(merged(recipe)["w"], x)


@pytest.mark.parametrize("at", [0, 1023, 1024, 300_000, 524_287])
def test_equal_tells_every_byte(memory, at):
    pool = _C.Pool(2)
    values = np.arange(524_288, dtype=np.float32)
    a, b = memory.put(values, "F32"), memory.put(values, "F32", offset=4)
    assert _C.equal(pool, a, b)
    values[at] += 0.5
    assert not _C.equal(pool, a, memory.put(values, "F32"))
    assert not _C.equal(pool, a, memory.put(np.arange(524_288, dtype=np.float32), "BF16"))


# ---------------------------------------------------------------- factors at their ends


def test_a_model_of_weight_0_claims_no_entry(zoo, four):
    """consensus_ta counts the models that claim an entry."""
    parameters = {"agree": 2, "mask_lambda": 0.0}  # every model claims every entry
    found = merged(
        {
            "merge_method": "consensus_ta",
            "base_model": str(four[0]),
            "models": entries([four[1], four[2]], [1, 0]),
            "parameters": parameters,
            "dtype": "float32",
        }
    )
    base = zoo.read(four[0])
    assert all(np.array_equal(found[name], base[name]) for name in base)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear"])
def test_lambda_0_is_the_base_alone(zoo, four, method):
    density = {} if method == "task_arithmetic" else {"density": 0.5}
    tensors = zoo.read(four[1])
    tensors["lm_head.weight"] = np.full_like(tensors["lm_head.weight"], np.nan)
    broken = zoo.write("broken", tensors, {})
    recipe = {
        "merge_method": method,
        "base_model": str(four[0]),
        "models": entries([broken], [1.0], **density),
        "parameters": {"lambda": 0},
        "dtype": "float32",
    }
    found, base = merged(recipe), zoo.read(four[0])
    assert all(np.array_equal(found[name], base[name]) for name in base)


@pytest.mark.parametrize("weight", [1e39, -1e300])
def test_a_weight_beyond_float32_is_refused(four, weight):
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(four[0]),
        "models": entries(four[1:2], [weight]),
    }
    with pytest.raises(FastmergeError, match=r"'weight' must fit into float32 \(up to 3\.4e\+38\)"):
        api.plan(recipe)


def test_bounds_are_named_before_float32():
    with pytest.raises(FastmergeError, match=r"'t' must be in \[-1, 2\], not 1e\+300"):
        ops.slerp(np.ones(4, np.float32), np.zeros(4, np.float32), 1e300)


# ---------------------------------------------------------------- where sums cancel


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("slerp", {"t": 0.5}),
        ("nuslerp", {"weight": 1.0}),
        ("nuslerp", {"weight": 1.0, "nuslerp_flatten": False}),
    ],
    ids=str,
)
def test_opposite_entries_of_models_that_count_the_same_come_to_nothing(method, values, dtype):
    """One fused multiply-add left 1e-8 of them."""
    torch = pytest.importorskip("torch")
    x, y = torch.randn(2, 9, 70, generator=torch.Generator().manual_seed(3)).to(
        getattr(torch, dtype)
    )
    y[:, 1::3] = -x[:, 1::3]
    made = ops.merge(method, [x, y], values)
    assert not made[:, 1::3].any() and made[:, ::3].all()


def _misrounded(made: np.ndarray, exact: np.ndarray) -> float:
    return float((made != exact.astype(np.float32)).mean())


@pytest.mark.parametrize("by", ["tensor", "rows", "columns"])
def test_nuslerp_with_a_base_is_rounded_once_in_float32(by):
    rng = np.random.default_rng(4)
    base = rng.normal(size=(20, 300)).astype(np.float32)
    x, y = (base + 0.01 * rng.normal(size=base.shape).astype(np.float32) for _ in range(2))
    how = {
        "tensor": {},
        "rows": {"flatten": False},
        "columns": {"flatten": False, "row_wise": True},
    }
    made = ops.nuslerp(x, y, [0.3, 0.7], base=base, **how[by])
    u, v = (z.astype(np.float64) - base for z in (x, y))
    axis = {"tensor": None, "rows": 1, "columns": 0}[by]
    norms = [np.sqrt((d * d).sum(axis=axis, keepdims=True)) for d in (u, v)]
    angle = np.arccos((u * v).sum(axis=axis, keepdims=True) / (norms[0] * norms[1]))
    arc = (np.sin(0.3 * angle) * u + np.sin(0.7 * angle) * v) / np.sin(angle)
    assert _misrounded(made, base + arc) < 1e-3  # 0.13 to 0.37 in float32


@pytest.mark.parametrize("by_rows", [False, True])
def test_model_stock_is_rounded_once_in_float32(by_rows):
    rng = np.random.default_rng(4)
    base = rng.normal(size=(20, 300)).astype(np.float32)
    models = [base + 0.01 * rng.normal(size=base.shape).astype(np.float32) for _ in range(3)]
    models = [m + 0.01 for m in models]  # so that their deltas have a common part
    made = ops.model_stock(base, models, filter_wise=by_rows)
    deltas = [m.astype(np.float64) - base for m in models]
    axis = 1 if by_rows else None
    size = [np.sqrt((d * d).sum(axis=axis, keepdims=True)) for d in deltas]
    cosine = (
        sum(
            (deltas[i] * deltas[j]).sum(axis=axis, keepdims=True) / (size[i] * size[j])
            for i, j in ((0, 1), (0, 2), (1, 2))
        )
        / 3
    )
    ratio = 3 * cosine / (1 + 2 * cosine)
    exact = base + ratio * sum(deltas) / 3
    assert _misrounded(made, exact) < 1e-3


def test_opposite_rows_are_summed_with_the_digits_that_they_need():
    """Coefficients of 4e7 that cancel."""
    x = np.random.default_rng(1).normal(size=(40, 96)).astype(np.float32)
    made = ops.nuslerp(x, -x, [0.3, 0.7], flatten=False)
    assert np.abs(made).max() < 1.01 * np.abs(x).max()
