"""TIES trimmed by one threshold over a model, and its tie rules, against the definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmerge
from fastmerge import _C, api, llama
from fastmerge.compute import cpu
from fastmerge.compute.across import TILE_ENTRIES
from fastmerge.compute.reference import mixed_indices
from fastmerge.engine import in_memory
from fastmerge.errors import FastmergeError
from fastmerge.output import lineage as lineage_module
from fastmerge.primitives import Agreement
from fastmerge.retrograde.schedule import load
from fastmerge.selection import INDEX, MAGNITUDE, MIXED, Sparsify


def recipe_of(models: list[Path], **parameters: Any) -> dict[str, Any]:
    base, *tunes = models
    return {
        "merge_method": "ties",
        "base_model": str(base),
        "dtype": "float32",
        "models": [{"model": str(m), "parameters": {"weight": 0.5, "density": 0.3}} for m in tunes],
        "parameters": {"trim": "model", **parameters},
    }


@pytest.fixture
def models(zoo: Any) -> list[Path]:
    """A base and two tunes: in the first, some layers move ten times as far as others."""
    base = zoo.base("base", layers=3, dtype="F32")
    one = zoo.tune(base, "one", seed=1, size=0.002)
    tensors = zoo.read(one)
    origin = zoo.read(base)
    far = {n: origin[n] + 10 * (x - origin[n]) if ".1." in n else x for n, x in tensors.items()}
    config = json.loads((base / "config.json").read_text())
    return [base, zoo.write("far", far, config), zoo.tune(base, "two", seed=2, size=0.004)]


def survivors(deltas: list[np.ndarray], keep: int, rule: int, start: int = 0) -> list[np.ndarray]:
    """The ``keep`` largest magnitudes of all deltas as one vector, ties as defined."""
    origins = start + np.cumsum([0, *(-(-d.size // TILE_ENTRIES) * TILE_ENTRIES for d in deltas)])
    starts = list(zip(deltas, origins[:-1].tolist(), strict=True))
    index = np.concatenate([np.arange(o, o + d.size, dtype=np.uint64) for d, o in starts])
    order = index
    if rule == MIXED:
        order = np.concatenate([mixed_indices(d.size, o) for d, o in starts])
    size = np.abs(np.concatenate([d.ravel() for d in deltas]))
    ranked = np.lexsort((order, -size))
    mask = np.zeros(size.size, bool)
    mask[ranked[:keep]] = True
    return np.split(mask, np.cumsum([d.size for d in deltas])[:-1])


@pytest.mark.parametrize("rule", ["mixed", "index"])
def test_one_threshold_over_all_tensors(zoo: Any, models: list[Path], rule: str) -> None:
    plan = api.plan(recipe_of(models, ties=rule))
    names = [tensor.name for tensor in plan.tensors]
    base, one, two = (zoo.read(m) for m in models)
    total = sum(base[n].size for n in names)
    kept = []
    for tune in (one, two):
        deltas = [tune[n] - base[n] for n in names]
        code = INDEX if rule == "index" else MIXED
        masks = survivors(deltas, int(0.3 * total), code)
        kept.append([d * m.reshape(d.shape) for d, m in zip(deltas, masks, strict=True)])
    made = dict(fastmerge.materialise(plan))
    shares = []
    for n, x, y in zip(names, *kept, strict=True):
        weighted = np.stack([x, y]) * np.float32(0.5)
        sign = np.where(weighted.sum(0) >= 0, 1, -1)
        agree = (np.sign(weighted) == sign) & (weighted != 0)
        weight = agree.sum(0) * np.float32(0.5)
        merged = np.where(agree, weighted, 0).sum(0) / np.where(weight == 0, 1, weight)
        np.testing.assert_allclose(made[n], base[n] + merged, rtol=1e-6, atol=1e-7, err_msg=n)
        shares.append((x != 0).mean())
    assert max(shares) > 0.9 and min(shares) < 0.05  # what moved far is kept, the rest is not


def test_the_folder_and_every_thread_count_agree(
    zoo: Any, models: list[Path], tmp_path: Path
) -> None:
    recipe = recipe_of(models)
    made = dict(fastmerge.materialise(recipe, threads=1))
    fastmerge.merge(recipe, tmp_path / "out", threads=3)
    written = zoo.read(tmp_path / "out")
    assert all((written[n] == x).all() for n, x in made.items())
    found = llama.load_merged(recipe).state_dict()
    assert all((found[n].numpy() == x).all() for n, x in made.items())
    per_tensor = dict(fastmerge.materialise(recipe_of(models, trim="tensor")))
    assert any((per_tensor[n] != x).any() for n, x in made.items())
    assert api.plan(recipe).describe()["passes"] == 3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tensors_any_ties(data: st.DataObject) -> None:
    """Few distinct magnitudes, many of them tied, over tensors of any sizes, empty ones too."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 5, 2047, 2048, 2049, 9000]), min_size=1))
    kinds = data.draw(st.sampled_from([1, 3, 50, 10**6]))
    deltas = [(rng.integers(-kinds, kinds + 1, n) / 64).astype(np.float32) for n in sizes]
    total = sum(sizes)
    keep = data.draw(st.integers(0, total))
    rule = data.draw(st.sampled_from([MIXED, INDEX]))
    bases = [np.zeros(n, np.float32) for n in sizes]
    backend = cpu.cpu(2)
    views = [[_C.View(d.ctypes.data, d.size, "F32", d)] for d in deltas]
    zeros = [_C.View(b.ctypes.data, b.size, "F32", b) for b in bases]
    start = data.draw(
        st.sampled_from([0, (1 << 32) - 2 * TILE_ENTRIES, 5 << 32])
    )  # across 2**32 too
    steps = [-(-n // TILE_ENTRIES) * TILE_ENTRIES for n in sizes]
    origins = (start + np.cumsum([0, *steps])[:-1]).tolist()
    spec = Sparsify(MAGNITUDE, keep, rule)
    chosen = backend.select_across(views, zeros, origins, [spec])
    expected = survivors(deltas, keep, rule, start) if total else deltas
    for delta, view, zero, mask, origin in zip(
        deltas, views, zeros, expected, origins, strict=True
    ):
        out = np.empty_like(delta)
        sink = _C.MemorySink(_C.View(out.ctypes.data, out.size, "F32", out))
        backend.consensus(
            view, zero, [1.0], chosen, sink,
            Agreement(elect=False, normalize=False, scale=1.0, origin=origin),
        )  # fmt: skip
        np.testing.assert_array_equal(out, delta * mask)


def test_ties_by_index_within_a_tensor(zoo: Any, models: list[Path]) -> None:
    base, one, _ = models
    deltas = {n: np.sign(x - zoo.read(base)[n]) / 64 for n, x in zoo.read(one).items()}
    tied = {n: zoo.read(base)[n] + d for n, d in deltas.items()}
    config = json.loads((base / "config.json").read_text())
    flat = zoo.write("flat", {n: np.zeros_like(x) for n, x in tied.items()}, config, dtype="F32")
    steps = zoo.write("steps", deltas, config, dtype="F32")
    made = dict(fastmerge.materialise(recipe_of([flat, steps], trim="tensor", ties="index")))
    for n, x in made.items():
        keep = max(1, int(0.3 * x.size))
        assert (x.ravel()[:keep] != 0).all() and not x.ravel()[keep:].any(), n


REFUSALS = {
    "word": ({"trim": "global"}, "'trim' must be tensor or model, not 'global'"),
    "gradient": ({"trim": ["model", "tensor"]}, "'trim' takes no gradient"),
    "ties": ({"ties": 3}, "'ties' must be mixed or index"),
}


@pytest.mark.parametrize("change, message", REFUSALS.values(), ids=REFUSALS)
def test_what_is_no_rule_is_refused(
    models: list[Path], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(FastmergeError, match=message):
        api.plan(recipe_of(models, **change))


def test_what_has_no_one_threshold_is_refused(models: list[Path]) -> None:
    recipe = recipe_of(models)
    recipe["models"][0]["parameters"]["density"] = [0.1, 0.9]
    with pytest.raises(FastmergeError, match=r"the density of .* differ"):
        api.plan(recipe)
    for name, value in (("rescale", "true"), ("ties", "index")):
        mixed = [{"filter": "mlp", "value": value}, {"value": "mixed" if name == "ties" else False}]
        with pytest.raises(FastmergeError, match=rf"the {name} of .* differ"):
            api.plan(recipe_of(models, **{name: mixed}))
    first = {**recipe_of(models), "name": "first"}
    with pytest.raises(FastmergeError, match="another document's result"):
        api.plan([first, recipe_of([models[0], Path("first")])])
    average = {
        "merge_method": "linear", "dtype": "float32",
        "models": [{"model": n, "parameters": {"weight": 1}} for n in ("first", "second")],
    }  # fmt: skip
    with pytest.raises(FastmergeError, match="only one document"):
        api.plan([first, {**first, "name": "second"}, average])


def test_a_model_is_trimmed_whole_or_not_at_all(models: list[Path]) -> None:
    base, one, two = map(str, models)

    def slices(*tunes: str) -> dict[str, Any]:
        found = []
        for i, tune in enumerate(tunes):
            own = {"model": tune, "layer_range": [i, i + 1], "parameters": {"weight": 1}}
            found.append({"sources": [{"model": base, "layer_range": [i, i + 1]}, own]})
        parameters = {"trim": "model", "density": 0.3}
        return {"merge_method": "ties", "base_model": base, "slices": found,
                "dtype": "float32", "parameters": parameters}  # fmt: skip

    api.plan(slices(one, one, one))
    with pytest.raises(FastmergeError, match=r"the models of .* differ"):
        api.plan(slices(one, two, one))
    first = {**recipe_of(models), "name": "first"}
    part = {"merge_method": "passthrough", "dtype": "float32",
            "slices": [{"sources": [{"model": "first", "layer_range": [0, 1]}]}]}  # fmt: skip
    with pytest.raises(FastmergeError, match="and then left out"):
        api.plan([first, part])


def test_density_1_trims_nothing(models: list[Path]) -> None:
    recipe = recipe_of(models)
    for model in recipe["models"]:
        model["parameters"]["density"] = 1.0
    plain = {**recipe, "parameters": {}}
    second = {**recipe, "name": "second"}
    made = dict(fastmerge.materialise([{**recipe, "name": "first"}, second, {
        "merge_method": "linear", "dtype": "float32",
        "models": [{"model": n, "parameters": {"weight": 1}} for n in ("first", "second")],
    }]))  # fmt: skip
    for n, x in dict(fastmerge.materialise(plain)).items():
        np.testing.assert_allclose(made[n], x, rtol=1e-6)


def test_a_factor_that_is_no_number_ends_nothing_but_the_merge(
    zoo: Any, models: list[Path], tmp_path: Path
) -> None:
    tensors = zoo.read(models[1])
    tensors["model.norm.weight"][0] = np.nan
    config = json.loads((models[0] / "config.json").read_text())
    broken = zoo.write("broken", tensors, config, dtype="F32")
    with pytest.raises(FastmergeError, match="NaN or infinite weights"):
        fastmerge.merge(recipe_of([models[0], broken], rescale=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_lineage_has_the_counts(zoo: Any, models: list[Path], tmp_path: Path) -> None:
    fastmerge.merge(recipe_of(models), tmp_path / "out")
    lineage = json.loads((tmp_path / "out" / lineage_module.LINEAGE_FILE).read_text())
    total = sum(x.size for x in zoo.read(models[0]).values())
    assert lineage["kept"] == {m.name: int(0.3 * total) for m in models[1:]}


def test_a_schedule_refuses_it(models: list[Path]) -> None:
    step = {"partner": "next", "method": "ties", "t": 0.5, "density": 0.5, "trim": "model"}
    with pytest.raises(FastmergeError, match="trims tensor by tensor"):
        load({"baseline": str(models[0]), "pool": [str(models[1])],
              "schedule": {"steps": [{"degrade": step}]}})  # fmt: skip


def test_a_chain_over_it_is_merged(zoo: Any, models: list[Path]) -> None:
    first = {**recipe_of(models), "name": "first"}
    last = {
        "merge_method": "linear", "dtype": "float32",
        "models": [{"model": n, "parameters": {"weight": 1}} for n in ("first", str(models[0]))],
    }  # fmt: skip
    alone = dict(fastmerge.materialise(recipe_of(models)))
    made = dict(engine_values([first, last]))
    base = zoo.read(models[0])
    for n, x in made.items():
        np.testing.assert_allclose(x, (alone[n] + base[n]) / 2, rtol=1e-6, atol=1e-7)


def engine_values(recipe: Any) -> Any:
    return ((item.name, array) for item, array in in_memory.materialise_plan(api.plan(recipe)))
