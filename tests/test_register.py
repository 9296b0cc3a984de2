"""Methods of others: rows registered here are rows everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastmerge
from fastmerge import api, ops
from fastmerge.cli import main
from fastmerge.engine.in_memory import materialise_plan
from fastmerge.errors import FastmergeError, RecipeError
from fastmerge.evaluation.journal import Journal
from fastmerge.methods import METHODS, Combination, Consensus, Function, Parameter, find, unregister
from fastmerge.methods import register as add
from fastmerge.methods.shapes import Factors, Keep, Terms
from fastmerge.primitives import Agreement
from fastmerge.retrograde import open_space, walk
from fastmerge.retrograde.schedule import load
from fastmerge.search.lab import Lab
from fastmerge.selection import MAGNITUDE

POWER = Parameter("power", float, 1.0, "exponent", low=0)
SHARE = Parameter("share", float, 1.0, "of each model", per_model=True)


def power_mean(base: Any, tensors: Any, values: Any) -> Any:
    """sign(s) |s|^(1/p), s = sum_i share_i sign(x_i) |x_i|^p: no back end has a kernel for it."""
    assert base is None
    p = values["power"]
    total = sum(
        share * np.sign(x) * np.abs(x) ** p
        for share, x in zip(values["share"], tensors, strict=True)
    )
    return np.sign(total) * np.abs(total) ** (1 / p)


def row(function: Any = power_mean, **changes: Any) -> Function:
    given = {
        "name": "power_mean", "summary": "mean of powers", "paper": "-",
        "parameters": (POWER, SHARE), "base": "operand", "min_operands": 1, "max_operands": None,
        "version": "1", "function": function, **changes,
    }  # fmt: skip
    return Function(**given)


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def models(zoo: Any) -> list[Path]:
    a = zoo.base("a", dtype="BF16")
    return [a, zoo.tune(a, "b", seed=2)]


def recipe_of(models: list[Path], **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "power_mean", "dtype": "bfloat16", "parameters": {"power": 2, **parameters},
        "models": [{"model": str(m), "parameters": {"share": 0.5}} for m in models],
    }  # fmt: skip


def copy(model: Any) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": str(model)}]}


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x.astype(np.float32)).bfloat16().view(torch.uint16).numpy()


def test_a_function_merges_two_models_to_a_folder(models: list[Path], tmp_path: Path) -> None:
    add(row())
    report = fastmerge.merge(recipe_of(models), tmp_path / "out", threads=2)
    assert not report.nonfinite
    made, a, b = (dict(fastmerge.materialise(copy(m))) for m in (tmp_path / "out", *models))
    for name, bits in made.items():
        values = {"power": 2, "share": (0.5, 0.5)}
        expected = power_mean(None, [widened(a[name]), widened(b[name])], values)
        assert (bits == rounded(expected)).all(), name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "power_mean" in card


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_merge_goes_on_with_the_same_version_only(zoo: Any, tmp_path: Path, version: str) -> None:
    table = np.random.default_rng(4).normal(size=(1024, 512))
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(16)]  # 4 to a buffer of 4 MiB
    recipe = recipe_of([zoo.write(f"m{i}", dict.fromkeys(names, table + i)) for i in range(2)])
    out, seen = tmp_path / "out", []

    def stops(base: Any, tensors: Any, values: Any) -> Any:
        seen.append(1)
        if len(seen) == 14:
            raise OSError("the disk with my table\nis gone")
        return power_mean(base, tensors, values)

    add(row(stops))
    with pytest.raises(FastmergeError, match=r"up_proj.weight: method power_mean failed: OSError"):
        fastmerge.merge(recipe, out, threads=1)
    unregister("power_mean")
    add(row(version=version))
    resumed = fastmerge.merge(recipe, out, threads=1).resumed
    assert resumed >= 4 if version == "1" else resumed == 0
    fastmerge.merge(recipe, tmp_path / "whole")
    made, whole = (f / "model.safetensors" for f in (out, tmp_path / "whole"))
    assert made.read_bytes() == whole.read_bytes()


def test_a_function_amid_other_methods(models: list[Path]) -> None:
    """SLERP of a function's result, an intermediate tensor, and a function of that SLERP's."""
    a, b = (str(m) for m in models)
    add(row())
    text = f"""
name: mean
merge_method: power_mean
models: [{{model: "{a}"}}, {{model: "{b}"}}]
parameters: {{power: 3, share: 0.5}}
---
name: between
merge_method: slerp
base_model: "{a}"
models: [{{model: "{a}"}}, {{model: mean}}]
parameters: {{t: 0.5}}
dtype: float32
---
merge_method: power_mean
models: [{{model: between}}, {{model: "{b}"}}]
parameters: {{power: 1, share: 0.25}}
dtype: float32
"""
    plan = api.plan(text)
    made = dict(fastmerge.materialise(plan, threads=2))
    assert plan.describe()["passes"] == 4
    for name, found in made.items():
        x, y = (
            widened(raw[name]) for raw in (dict(fastmerge.materialise(copy(m))) for m in (a, b))
        )
        mean = power_mean(None, [x, y], {"power": 3, "share": (0.5, 0.5)})
        between = ops.slerp(x, mean.astype(np.float32), 0.5)
        np.testing.assert_allclose(found, 0.25 * between + 0.25 * y, rtol=1e-5, atol=1e-7)


def test_ops_take_any_row() -> None:
    x, y = np.float32([[1, -2], [3, 0]]), np.float32([[2, 2], [-4, 0]])
    add(row())
    found = ops.merge("power_mean", [x, y], {"power": 2, "share": [0.5, 0.25]})
    expected = power_mean(None, [x, y], {"power": 2, "share": (0.5, 0.25)})
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    half = [torch.from_numpy(t).half() for t in (x, y)]
    got = ops.merge("power_mean", half, {"power": 1, "share": 0.5})
    assert got.dtype == torch.float16 and torch.equal(got, half[0] / 2 + half[1] / 2)
    np.testing.assert_array_equal(ops.merge("linear", [x, y], {"weight": 1}), ops.linear([x, y], 1))
    for given, said in (
        ({"powre": 2}, "power_mean: unknown parameter 'powre'; did you mean 'power'"),
        ({"share": [1, 2, 3]}, "2 tensors but 3 values for 'share'"),
        ({"power": -1}, "'power' must be at least 0"),
    ):
        with pytest.raises(FastmergeError, match=said):
            ops.merge("power_mean", [x, y], given)
    with pytest.raises(FastmergeError, match="takes no base tensor of its own"):
        ops.merge("power_mean", [x], base=y)


def test_what_draws_follows_the_seed() -> None:
    def noisy(base: Any, _: Any, values: Any) -> Any:
        return base + values["rng"].normal(size=base.shape)

    add(row(noisy, name="noisy", parameters=(), base="required", random=True))
    zero = np.zeros(64, np.float32)
    draws = {
        ops.merge("noisy", [zero], base=zero, seed=seed, name=name).tobytes()
        for seed, name in ((1, "a"), (1, "a"), (2, "a"), (1, "b"))
    }
    assert len(draws) == 3
    with pytest.raises(FastmergeError, match="'seed' must be a whole number"):
        ops.merge("noisy", [zero], base=zero)


def test_inputs_cannot_be_written_and_results_are_checked() -> None:
    x = np.ones((2, 3), np.float32)

    def writes(_: Any, tensors: Any, __: Any) -> Any:
        tensors[0][:] = 0

    bad = {
        "writes": (writes, "failed: ValueError: assignment destination is read-only"),
        "flat": (lambda b, t, v: t[0].ravel(), r"returned float32 \[6\] for tensors of \[2, 3\]"),
        "nothing": (lambda b, t, v: None, r"returned object \[\]"),
        "imaginary": (lambda b, t, v: 1j * t[0], "returned complex64"),
    }
    for name, (function, said) in bad.items():
        add(row(function, name=name))
        with pytest.raises(FastmergeError, match=said):
            ops.merge(name, [x])
    assert (x == 1).all()


def test_the_other_shapes() -> None:
    """A rule and a spec of one's own run on the kernels."""

    def rule(gram: Any, *_: Any) -> Factors:
        energy = np.diagonal(gram)
        return Factors(1 / energy, float((1 / energy).sum()))

    def spec(_: Any, operands: Any) -> Terms:
        keep = tuple(Keep(MAGNITUDE, 0.5) for _ in operands)
        return Terms(keep, (1.0,) * len(operands), Agreement(elect=False, normalize=False))

    same = {"summary": "-", "paper": "-", "parameters": (), "max_operands": None, "version": "1"}
    add(Combination("by_energy", base="operand", min_operands=1, rule=rule, **same))
    add(Consensus("halves", base="required", min_operands=1, spec=spec, **same))
    x, y = np.float32([3, 0, 0, 0]), np.float32([0, 0, 0, 1])
    np.testing.assert_allclose(ops.merge("by_energy", [x, y]), [0.3, 0, 0, 0.9], rtol=1e-6)
    got = ops.merge("halves", [np.float32([4, 1, 3, 2])], base=np.zeros(4, np.float32))
    np.testing.assert_array_equal(got, [4, 0, 3, 0])


def test_recipes_and_the_command_line_know_it(
    models: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    misplaced = {**recipe_of(models), "power": 2}
    with pytest.raises(RecipeError, match="unknown method 'power_mean'"):
        api.plan(recipe_of(models))
    add(row())
    told = "'power' (recipe.power; it belongs under 'parameters:')"
    assert any(told in note for note in api.plan(misplaced).notes)
    with pytest.raises(RecipeError, match="unknown parameter 'powre' for power_mean"):
        api.plan(recipe_of(models, powre=2))
    linear = {**recipe_of(models), "merge_method": "linear"}
    linear["parameters"] = {"weight": 1, "power": 2}
    assert any("'power' has no effect" in note for note in api.plan(linear).notes)
    with pytest.raises(SystemExit):
        main(["methods", "--json"])
    rows = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert [p["name"] for p in rows["power_mean"]["parameters"]] == ["power", "share"]


def test_a_method_that_mergekit_has_can_be_registered(models: list[Path], monkeypatch) -> None:
    monkeypatch.delitem(METHODS, "breadcrumbs")  # one that has no row
    add(row(name="breadcrumbs"))
    plan = api.plan({**recipe_of(models), "merge_method": "breadcrumbs"})
    assert plan.methods == {"breadcrumbs": len(plan.tensors)}


def test_a_walk_by_a_rule_that_takes_no_stack(models: list[Path]) -> None:
    """Rows say whether a rule takes a stack of Gram matrices; one that says nothing gets one."""

    def rule(gram: Any, *_: Any) -> Factors:
        energy = np.diagonal(gram)
        assert gram.shape == (2, 2)
        return Factors(1 / energy, float((1 / energy).sum()))

    add(Combination("by_energy", "-", "-", (), "operand", 2, None, version="1", rule=rule))
    step = {"partner": "b", "method": "by_energy"}
    schedule = load({
        "baseline": str(models[0]), "pool": [str(models[1])],
        "schedule": {"steps": [{"degrade": step}]},
    })  # fmt: skip
    space = open_space(schedule, threads=1)
    lab = Lab(space, None, None, Journal(None), threads=1)
    found = space.coefficients(walk(schedule, space, lab, seed=5).states[-1])
    stored = [dict(fastmerge.materialise(copy(m))) for m in models]
    for name, own in zip(space.names, found, strict=True):
        energy = [1 / (widened(tensors[name]).astype(float) ** 2).sum() for tensors in stored]
        np.testing.assert_allclose(own, np.array(energy) / sum(energy), rtol=1e-9)


def test_schedules_walk_with_it(models: list[Path]) -> None:
    def walked() -> tuple[Any, Any, Any]:
        step = {"partner": "b", "method": "power_mean", "power": 2, "share": 0.5}
        made = load({
            "baseline": str(models[0]), "pool": [str(models[1])],
            "schedule": {"steps": [{"degrade": step}]},
        })  # fmt: skip
        space = open_space(made, threads=1)
        lab = Lab(space, None, None, Journal(None), threads=1)
        return made, space, walk(made, space, lab, seed=5).states[-1]

    with pytest.raises(FastmergeError, match="unknown method 'power_mean'"):
        walked()
    add(row())
    schedule, space, state = walked()
    assert schedule.foreign == ["power_mean 1"]
    found = dict(fastmerge.materialise(recipe_of(models)))
    for item, array in materialise_plan(space.plan(state)):
        assert (array == found[item.name]).all()
    first = space.fingerprint(state)
    unregister("power_mean")
    add(row(version="2"))
    _, space, state = walked()
    assert space.fingerprint(state) != first


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"name": "slerp"}, "there is one of this name; choose another$"),
        ({"name": "my method"}, "one word"),
        ({"version": ""}, "give it a version"),
        ({"base": "maybe"}, "base must be one of required, optional"),
        ({"min_operands": 3, "max_operands": 2}, "no less than that"),
        ({"parameters": (POWER, POWER)}, "two of its parameters have one name"),
        ({"parameters": (Parameter("word", str, "a", ""),)}, "'word': text needs choices"),
        ({"parameters": (Parameter("p", float, "a", ""),)}, "'p' must be a number"),
        ({"parameters": (Parameter("p", list, [], ""),)}, "float, int, bool or str"),
    ],
)
def test_rows_that_cannot_work_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FastmergeError, match=said):
        add(row(**changes))
    with pytest.raises(FastmergeError, match="no method 'slerp' was registered"):
        unregister("slerp")
    add(row())
    with pytest.raises(FastmergeError, match="or unregister that first"):
        add(row())
    assert find("power_mean").version == "1"
