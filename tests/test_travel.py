"""Objects that travel: plans in pickles and copies, tensors as numbers, calls of many threads."""

from __future__ import annotations

import copy
import inspect
import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest

import fastmerge
from fastmerge import FastmergeError, api, ops
from fastmerge.methods import METHODS


@pytest.fixture
def recipe(zoo) -> dict:
    base = zoo.base()
    tuned = [str(zoo.tune(base, name)) for name in ("one", "two")]
    each = {"weight": 0.5, "density": 0.5}
    return {
        "merge_method": "dare_ties", "base_model": str(base), "dtype": "bfloat16",
        "models": [{"model": model, "parameters": each} for model in tuned],
    }  # fmt: skip


def digest(plan) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in api.materialise(plan, threads=1)}


@pytest.mark.parametrize("way", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_plan_is_copied_and_pickled(recipe, way):
    plan = api.plan(recipe, seed=5)
    before = digest(plan)  # its models are mapped by now
    other = way(plan)
    assert other.key == plan.key
    assert digest(other) == before


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plan_is_pickled_by_protocols_that_can(recipe, protocol):
    plan = api.plan(recipe, seed=5)
    if protocol < 2:
        with pytest.raises(fastmerge.FastmergeError, match="protocol 2 or later"):
            pickle.dumps(plan, protocol)
    else:
        assert pickle.loads(pickle.dumps(plan, protocol)).key == plan.key


def test_a_plan_goes_to_a_process(recipe, zoo, tmp_path):
    plan = api.plan(recipe, seed=5)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        report = pool.submit(api.merge, plan, tmp_path / "there", threads=1).result()
    fastmerge.merge(plan, tmp_path / "here")
    there, here = zoo.read(tmp_path / "there"), zoo.read(tmp_path / "here")
    assert report.tensors == len(there) == len(here)
    assert all(np.array_equal(there[name], here[name]) for name in here)


def test_rows_travel_as_their_names():
    for row in METHODS.values():
        assert pickle.loads(pickle.dumps(row)) is row
        assert copy.deepcopy(row) is row


def test_a_report_is_json(recipe, tmp_path):
    report = fastmerge.merge(recipe, tmp_path / "out", seed=5)
    assert json.loads(json.dumps(report.as_dict()))["tensors"] == report.tensors
    assert pickle.loads(pickle.dumps(report)) == report


def test_materialised_tensors_are_numbers(recipe):
    torch, ml_dtypes = pytest.importorskip("torch"), pytest.importorskip("ml_dtypes")
    kinds = {kind: dict(api.materialise(recipe, seed=5, as_=kind))
             for kind in ("bits", "numpy", "ml_dtypes", "torch")}  # fmt: skip
    for name, bits in kinds["bits"].items():
        numbers = (bits.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(kinds["numpy"][name], numbers)
        own = kinds["ml_dtypes"][name]
        assert own.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(own.astype(np.float32), numbers)
        tensor = kinds["torch"][name]
        assert tensor.dtype == torch.bfloat16
        np.testing.assert_array_equal(tensor.float().numpy(), numbers)
    with pytest.raises(FastmergeError, match="as_: unknown 'jax'; use bits, numpy"):
        next(api.materialise(recipe, as_="jax"))


def test_copied_tensors_are_numbers_too():
    state = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "flag": np.array([True, False]),
             "w": np.ones(3, np.float32)}  # fmt: skip
    recipe = {"merge_method": "passthrough", "models": [{"model": "x"}]}
    made = dict(api.materialise(recipe, models={"x": state}, as_="numpy"))
    for name, array in state.items():
        np.testing.assert_array_equal(made[name], array)
        assert made[name].dtype == array.dtype


def test_thirty_two_threads_merge_what_one_does():
    drawn = np.random.default_rng(0)
    base = drawn.standard_normal((64, 200), dtype=np.float32)
    pairs = [drawn.standard_normal((2, 64, 200), dtype=np.float32) for _ in range(64)]

    def merged(pair):
        kept = ops.ties(base, list(pair), [0.3, 0.7], density=0.5, threads=2)
        return ops.slerp(kept, pair[0], 0.3, threads=2).tobytes()

    expected = [merged(pair) for pair in pairs]
    with ThreadPoolExecutor(32) as pool:
        for _ in range(3):
            assert list(pool.map(merged, pairs)) == expected


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_merge_after_their_parent_did(method):
    drawn = np.random.default_rng(1)
    pairs = [list(drawn.standard_normal((2, 300_000), dtype=np.float32)) for _ in range(3)]
    expected = [ops.linear(pair, [0.3, 0.7], threads=2) for pair in pairs]  # threads are there now
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        for call in (ops.linear, ops.combine):
            tasks = [pool.submit(call, pair, [0.3, 0.7], threads=2) for pair in pairs]
            for task, wanted in zip(tasks, expected, strict=True):
                np.testing.assert_allclose(task.result(), wanted, rtol=1e-6)


def test_every_op_is_found_by_pickle():
    for name in (name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))):
        assert pickle.loads(pickle.dumps(getattr(ops, name))) is getattr(ops, name)


# A name or an argument that goes away breaks callers; one that is new is added here.
SURFACE = {
    "merge": "recipe out threads memory_limit overwrite fresh seed device gpu_memory io "
    "max_shard_bytes progress models check keep_paths part",
    "plan": "recipe seed models truncate_embeddings",
    "materialise": "recipe seed threads models as_",
    "fold": "base adapter out dtype options",
    "verify": "folder against sample threads progress models",
    "merge_state_dicts": "models method base parameters dtype out seed threads",
    "ops.merge": "method tensors parameters base seed name out threads",
    "ops.linear": "tensors weights normalize out threads",
    "ops.slerp": "a b t out threads",
    "ops.nuslerp": "a b weights base flatten row_wise out threads",
    "ops.combine": "tensors coefficients out threads",
    "ops.gram": "tensors base threads",
    "ops.coefficient_gradients": "grads models base threads",
    "ops.prune": "tensor density how rescale epsilon gamma seed name out threads",
    "ops.passthrough": "tensor scale out threads",
}


@pytest.mark.parametrize("name", SURFACE)
def test_public_signatures_keep_their_names(name):
    home, _, function = name.rpartition(".")
    own = getattr(getattr(fastmerge, home) if home else fastmerge, function)
    found = list(inspect.signature(own).parameters)
    assert [argument for argument in SURFACE[name].split() if argument not in found] == []


def test_public_names_stay():
    names = set(fastmerge.__all__)
    assert names >= {
        "FastmergeError", "MergeReport", "ModelError", "OutputError", "RecipeError",
        "ResourceError", "UnsupportedError", "adapters", "api", "extract_lora", "fold", "live",
        "llama", "materialise", "merge", "merge_adapters", "merge_state_dicts", "method", "ops",
        "plan", "retrograde", "verify",
    }  # fmt: skip
    for name in names:
        assert getattr(fastmerge, name) is not None
    errors = [getattr(fastmerge, name) for name in names if name.endswith("Error")]
    assert all(issubclass(error, FastmergeError) for error in errors)
    assert set(METHODS) <= set(ops.__all__)
