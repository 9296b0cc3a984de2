"""The algebra of walks: what a schedule is equivalent to, against the walk done step by step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmerge import api
from fastmerge.engine import in_memory, products
from fastmerge.evaluation.journal import Journal
from fastmerge.recipe.settings import constant
from fastmerge.retrograde import open_space, run, walk
from fastmerge.retrograde.schedule import load
from fastmerge.search.expressions import Blend, Model, average, blend
from fastmerge.search.lab import Lab
from fastmerge.search.space import Space

Tensors = dict[str, np.ndarray]


def schedule_of(models: list[Path], steps: list[dict[str, Any]], **top: Any) -> Any:
    """A schedule of explicit steps: 'partner' entries degrade, 'toward' entries retrace."""
    entries = [{"degrade" if "partner" in step else "retrace": step} for step in steps]
    first, *pool = map(str, models)
    return load({"baseline": first, "pool": pool, "schedule": {"steps": entries}, **top})


def final_of(schedule: Any) -> tuple[Space, Any]:
    space = open_space(schedule, threads=1)
    lab = Lab(space, None, None, Journal(None), threads=1)
    return space, walk(schedule, space, lab, seed=5)


def floats(space: Space, state: Any) -> Tensors:
    """A state's tensors as float64 arrays."""
    found = {}
    for item, array in in_memory.materialise_plan(space.plan(state), threads=1):
        if array.dtype == np.uint16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        found[item.name] = array.astype(np.float64)
    return found


def bits(plan: Any) -> dict[str, bytes]:
    return {
        item.name: array.tobytes() for item, array in in_memory.materialise_plan(plan, threads=1)
    }


def to_bf16(x: np.ndarray) -> np.ndarray:
    raw = x.astype(np.float32).view(np.uint32)
    return ((raw + 0x7FFF + (raw >> 16 & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)


def slerp64(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Shoemake's formula on the weights themselves, in float64."""
    cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


MERGE64 = {"slerp": slerp64, "linear": lambda a, b, t: (1 - t) * a + t * b}


def by_hand(models: list[Tensors], steps: list[dict[str, Any]], rounding: Any) -> Tensors:
    """The walk done on the weights, step by step; ``rounding`` after each."""
    state = models[0]
    for step in steps:
        other = models[int(step["partner"][1:])] if "partner" in step else models[0]
        state = {n: rounding(MERGE64[step["method"]](state[n], other[n], step["t"])) for n in state}
    return state


WALK = [
    {"partner": "m1", "method": "slerp", "t": 0.35},
    {"toward": "baseline", "method": "linear", "t": 0.4},
    {"partner": "m2", "method": "slerp", "t": 0.7},
    {"toward": "baseline", "method": "slerp", "t": 0.3},
    {"partner": "m1", "method": "linear", "t": 0.55},
    {"partner": "m2", "method": "slerp", "t": 0.15},
    {"toward": "baseline", "method": "slerp", "t": 0.6},
]


@pytest.fixture
def models(zoo: Any) -> list[Path]:
    """Three llamas far enough apart for SLERP to leave the line (cosine about 0.7)."""
    base = zoo.base("m0")
    return [base, zoo.tune(base, "m1", seed=1, size=0.05), zoo.tune(base, "m2", seed=2, size=0.05)]


def relative_errors(found: Tensors, truth: Tensors) -> list[float]:
    return [float(np.linalg.norm(found[n] - truth[n]) / np.linalg.norm(truth[n])) for n in truth]


def test_a_collapsed_walk_is_the_walk_done_step_by_step_in_float64(
    zoo: Any, models: list[Path]
) -> None:
    weights = [{n: x.astype(np.float64) for n, x in zoo.read(m).items()} for m in models]
    truth = by_hand(weights, WALK, lambda x: x)
    stepwise = by_hand(weights, WALK, to_bf16)
    space, trajectory = final_of(schedule_of(models, WALK, out_dtype="float32"))
    exact = relative_errors(floats(space, trajectory.states[-1]), truth)
    space, trajectory = final_of(schedule_of(models, WALK))
    rounded = relative_errors(floats(space, trajectory.states[-1]), truth)
    steps = relative_errors(stepwise, truth)
    print(f"\ncollapsed, fp32 out: {max(exact):.1e}; bf16 out: {max(rounded):.1e}; ", end="")
    print(f"step by step in bf16: {max(steps):.1e} (largest relative error of a tensor)")
    assert max(exact) <= 1e-6
    assert all(one < many for one, many in zip(rounded, steps, strict=True))


def test_a_linear_walk_is_one_linear_merge_bit_for_bit(models: list[Path]) -> None:
    steps = [
        {"partner": "m1", "method": "linear", "t": 0.25},
        {"toward": "baseline", "method": "linear", "t": 0.5},
        {"partner": "m2", "method": "task_arithmetic", "t": 0.125},
        {"toward": {"step": 1}, "method": "linear", "t": 0.5},
    ]
    space, trajectory = final_of(schedule_of(models, steps))
    # state 1: .75 .25 0; 2: .875 .125 0; 3: .765625 .109375 .125; 4: the mean of 3 and 1
    expected = [0.7578125, 0.1796875, 0.0625]
    factors = space.coefficients(trajectory.states[-1])
    assert factors is not None and (factors == expected).all()
    recipe = {
        "merge_method": "linear",
        "parameters": {"normalize": False},
        "models": [
            {"model": str(m), "parameters": {"weight": w}}
            for m, w in zip(models, expected, strict=True)
        ],
    }
    assert bits(space.plan(trajectory.states[-1])) == bits(api.plan(recipe))


def ordered(raw: bytes) -> np.ndarray:
    """bf16 bits as integers in the order of their values: neighbours differ by 1."""
    u = np.frombuffer(raw, np.uint16).astype(np.int32)
    return np.where(u & 0x8000, 0x8000 - u, u)


def merge_to(zoo: Any, name: str, recipe: dict[str, Any]) -> Path:
    """The recipe's result as a float32 model folder."""
    plan = api.plan({**recipe, "dtype": "float32"})
    made = {item.name: array for item, array in in_memory.materialise_plan(plan, threads=1)}
    return zoo.write(name, made, plan.config, dtype="F32")


def test_a_slerp_walk_is_sequential_slerps_within_one_ulp(zoo: Any, models: list[Path]) -> None:
    steps = [step for step in WALK if step["method"] == "slerp"]
    space, trajectory = final_of(schedule_of(models, steps))
    state = models[0]
    for number, step in enumerate(steps):
        other = models[int(step["partner"][1:])] if "partner" in step else models[0]
        if other == state:
            continue
        recipe = {
            "merge_method": "slerp",
            "base_model": str(state),
            "models": [{"model": str(state)}, {"model": str(other)}],
            "parameters": {"t": step["t"]},
        }
        if number == len(steps) - 1:
            break
        state = merge_to(zoo, f"s{number}", recipe)
    last = bits(api.plan({**recipe, "dtype": "float32", "out_dtype": "bfloat16"}))
    own = bits(space.plan(trajectory.states[-1]))
    assert own.keys() == last.keys()
    for name in own:
        assert np.abs(ordered(own[name]) - ordered(last[name])).max() <= 1, name


def test_ties_and_dare_steps_equal_merges_done_one_after_another(
    zoo: Any, models: list[Path]
) -> None:
    steps = [
        {"partner": "m1", "method": "ties", "t": 0.5, "density": 0.3},
        {"partner": "m2", "method": "dare_ties", "t": 0.4, "density": 0.6},
        {"toward": "baseline", "method": "linear", "t": 0.25},
    ]
    space, trajectory = final_of(schedule_of(models, steps, out_dtype="float32"))
    assert space.coefficients(trajectory.states[1]) is None
    state = models[0]
    for number, method in enumerate(["ties", "dare_ties"]):
        recipe = {
            "merge_method": method,
            "base_model": str(state),
            "models": [{"model": str(models[number + 1]), "parameters": {"weight": 1.0}}],
            "parameters": {"density": steps[number]["density"], "lambda": steps[number]["t"]},
            "seed": trajectory.state.records[number].move.seed,
        }
        state = merge_to(zoo, f"s{number}", recipe)
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(state), "parameters": {"weight": 0.75}},
            {"model": str(models[0]), "parameters": {"weight": 0.25}},
        ],
        "dtype": "float32",
    }
    assert bits(space.plan(trajectory.states[-1])) == bits(api.plan(recipe))


def test_delta_steps_with_a_fixed_base(models: list[Path]) -> None:
    """TIES of state and partner against base_model; task arithmetic there collapses."""
    steps = [
        {"partner": "m1", "method": "task_arithmetic", "t": 0.25, "lambda": 0.5},
        {"partner": "m1", "method": "ties", "t": 0.25, "density": 0.5},
    ]
    schedule = schedule_of(models[:2], steps, base_model=str(models[2]))
    space, trajectory = final_of(schedule)
    factors = space.coefficients(trajectory.states[1])
    assert factors is not None
    np.testing.assert_allclose(factors, np.tile([0.375, 0.125, 0.5], (len(factors), 1)))
    last = trajectory.states[2]
    assert isinstance(last, Blend) and last.base == Model(2) and len(last.operands) == 2


def test_gradients_and_filters_resolve_tensor_by_tensor(models: list[Path]) -> None:
    t = [{"filter": "mlp", "value": [0.1, 0.3]}, {"filter": "norm", "value": 0.0}, {"value": 0.5}]
    steps = [{"partner": "m1", "method": "linear", "t": t}]
    space, trajectory = final_of(schedule_of(models, steps))
    factors = space.coefficients(trajectory.states[1])
    assert factors is not None
    taken = dict(zip(space.names, factors[:, 1], strict=True))
    assert taken["model.layers.0.mlp.up_proj.weight"] == 0.1
    assert taken["model.layers.1.mlp.up_proj.weight"] == 0.3
    assert taken["model.norm.weight"] == 0.0
    assert taken["lm_head.weight"] == 0.5
    np.testing.assert_allclose(factors.sum(axis=1), 1.0)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher"])
def test_batched_coefficients_equal_the_engines(models: list[Path], method: str) -> None:
    """The run's cached Gram matrices against the Gram pass of an ordinary merge."""
    step = {"partner": "m1", "method": method}
    if method != "karcher":
        step["t"] = 0.3
    space, trajectory = final_of(schedule_of(models, [step], out_dtype="float32"))
    weights = [0.7, 0.3] if method != "karcher" else [None, None]
    recipe = {
        "merge_method": method,
        "dtype": "float32",
        "models": [
            {"model": str(m), "parameters": {} if w is None else {"weight": w}}
            for m, w in zip(models, weights, strict=False)
        ],
    }
    truth = {
        item.name: array.astype(np.float64)
        for item, array in in_memory.materialise_plan(api.plan(recipe), threads=1)
    }
    assert max(relative_errors(floats(space, trajectory.states[1]), truth)) < 1e-6


def test_geometry_against_the_weights(zoo: Any, models: list[Path]) -> None:
    space, trajectory = final_of(schedule_of(models, WALK, out_dtype="float32"))
    found = trajectory.geometry[-1]

    def flatten(tensors: Tensors) -> np.ndarray:
        return np.concatenate([tensors[n].astype(np.float64).ravel() for n in space.names])

    flat = [flatten(zoo.read(m)) for m in models]
    state = flatten(floats(space, trajectory.states[-1]))
    delta = state - flat[0]
    assert found.norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)
    angle = np.degrees(
        np.arccos(state @ flat[0] / (np.linalg.norm(state) * np.linalg.norm(flat[0])))
    )
    assert found.angle == pytest.approx(angle, rel=1e-3)
    other = flat[1] - flat[0]
    between = np.degrees(np.arccos(delta @ other / (np.linalg.norm(delta) * np.linalg.norm(other))))
    assert found.angles[1] == pytest.approx(between, rel=1e-4)
    line = sum(w * x for w, x in zip(found.one_shot, flat, strict=True))
    rest = np.linalg.norm(state - line) / np.linalg.norm(delta)
    assert found.residual == pytest.approx(rest, abs=1e-4)


def test_the_one_shot_of_a_slerp_walk_is_the_nearest_merge(zoo: Any) -> None:
    """Its coefficients differ from tensor to tensor; their mean would be off by twice as much."""
    base = zoo.base("m0")
    models = [base, *(zoo.tune(base, f"m{i}", seed=i, size=0.05) for i in (1, 2))]
    steps = [
        {"partner": "m1", "method": "slerp", "t": 0.4},
        {"partner": "m2", "method": "slerp", "t": 0.3},
    ]
    space, trajectory = final_of(schedule_of(models, steps, out_dtype="float32"))
    found = trajectory.geometry[2]

    def flatten(tensors: Tensors) -> np.ndarray:
        return np.concatenate([tensors[n].astype(np.float64).ravel() for n in space.names])

    flat = np.stack([flatten(zoo.read(m)) for m in models])
    state = flatten(floats(space, trajectory.states[2]))
    nearest = np.linalg.lstsq(flat.T, state, rcond=None)[0]
    np.testing.assert_allclose(found.one_shot, nearest, rtol=1e-5)
    rest = np.linalg.norm(state - nearest @ flat) / np.linalg.norm(state - flat[0])
    assert found.residual == pytest.approx(rest, rel=1e-4) and rest > 1e-3


def test_geometry_of_a_materialised_state_agrees_with_the_algebra(models: list[Path]) -> None:
    """TIES at density 1 of one delta is a lerp: measured from its weights it must be the lerp."""
    ties = [{"partner": "m1", "method": "ties", "t": 0.3, "density": 1.0}]
    lerp = [{"partner": "m1", "method": "linear", "t": 0.3}]
    space, trajectory = final_of(schedule_of(models, ties, out_dtype="float32"))
    lab = Lab(space, None, None, Journal(None), threads=1)
    measured = lab.geometry(trajectory.states[1])
    _, other = final_of(schedule_of(models, lerp, out_dtype="float32"))
    computed = other.geometry[1]
    assert measured.norm == pytest.approx(computed.norm, rel=1e-5)
    np.testing.assert_allclose(measured.one_shot, computed.one_shot, atol=1e-5)
    assert measured.residual < 1e-3


def test_nearest_and_farthest_follow_the_angle(zoo: Any) -> None:
    base = zoo.base("m0")
    near = zoo.tune(base, "m1", seed=1)
    twin = zoo.tune(near, "m2", seed=3, size=0.002)  # almost m1
    far = zoo.tune(base, "m3", seed=9)
    models = [base, near, far, twin]
    for policy, expected in (("nearest", 3), ("farthest", 2)):
        steps = [
            {"partner": "m1", "method": "linear", "t": 0.5},
            {"partner": policy, "method": "linear", "t": 0.5},
        ]
        _, trajectory = final_of(schedule_of(models, steps))
        chosen = trajectory.state.records[1].move.other[1]
        # m1 itself has angle 0 and is the nearest; the farthest is the unrelated one.
        assert chosen == {"nearest": 1, "farthest": expected}[policy]


def test_equal_states_have_equal_fingerprints(models: list[Path]) -> None:
    space, _ = final_of(schedule_of(models, WALK))
    one = average([Model(0), Model(1)], [0.75, 0.25])
    two = average([Model(0), average([Model(0), Model(1)], [0.5, 0.5])], [0.5, 0.5])
    assert space.fingerprint(one) == space.fingerprint(two)
    assert space.fingerprint(one) != space.fingerprint(Model(0))
    dare = [
        blend(
            "dare_ties",
            [Model(1)],
            [1.0],
            base=Model(0),
            parameters={"density": constant(0.5)},
            seed=s,
        )
        for s in (1, 1, 2)
    ]
    assert space.fingerprint(dare[0]) == space.fingerprint(dare[1])
    assert space.fingerprint(dare[0]) != space.fingerprint(dare[2])


def test_the_gram_pass_is_cached_by_content(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = schedule_of(models, WALK)
    cache = tmp_path / "grams.npz"
    first = open_space(schedule, cache=cache)
    calls = []
    real = products.grams
    monkeypatch.setattr(products, "grams", lambda *a, **k: calls.append(1) or real(*a, **k))
    again = open_space(schedule, cache=cache)
    assert not calls and (again.grams == first.grams).all()
    other = schedule_of([models[0], models[2], models[1]], WALK)
    open_space(other, cache=cache)
    assert calls


def test_a_walk_that_measures_nothing_finds_the_same_inner_products(
    models: list[Path], tmp_path: Path
) -> None:
    """On its way through the merge, of all models in their order, whatever the merge reads."""
    schedule = schedule_of(models, WALK)
    run(schedule, tmp_path / "run", seed=1)
    found = open_space(schedule, cache=tmp_path / "run" / "grams.npz").grams
    np.testing.assert_array_equal(found, open_space(schedule).grams)


def test_planning_ten_steps_over_known_grams_is_quick(zoo: Any) -> None:
    """The size that the issue names: 201 tensors, as in a llama of 22 layers; under 0.1 s."""
    base = zoo.base("m0", layers=22, hidden=8, vocab=16)
    models = [base, zoo.tune(base, "m1", seed=1), zoo.tune(base, "m2", seed=2)]
    steps = (WALK + WALK)[:10]
    schedule = schedule_of(models, steps)
    space = open_space(schedule, threads=1)
    assert len(space.names) == 201
    seconds = []
    for _ in range(5):
        fresh = Space(space.template, space.grams, [0.0] * 201)
        begin = time.process_time()
        trajectory = walk(schedule, fresh, None, seed=0)
        fresh.plan(trajectory.states[-1])
        seconds.append(time.process_time() - begin)
    print(f"\nten steps over 201 tensors planned in {1e3 * min(seconds):.1f} ms")
    assert min(seconds) < 0.1
