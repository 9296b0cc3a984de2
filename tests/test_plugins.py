"""Methods from plain functions, and from installed packages; the examples of docs/plugins.md."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from safetensors import safe_open

import fastmerge
from fastmerge import _C, api, ops
from fastmerge.cli import main
from fastmerge.errors import FastmergeError, RecipeError
from fastmerge.methods import (
    METHODS,
    Elementwise,
    Function,
    Option,
    find,
    plugins,
    register,
    unregister,
)
from fastmerge.methods.entries import maximum, minimum, where

DOCS = Path(__file__).parents[1] / "docs" / "plugins.md"
X, Y, Z = np.random.default_rng(2).normal(size=(3, 6, 50)).astype(np.float32)


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    before = dict(METHODS)
    plugins.load.cache_clear()
    yield
    plugins.load.cache_clear()
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def documented() -> dict[str, Any]:
    """What the documentation's examples define, run one after another."""
    names: dict[str, Any] = {"__name__": "documented"}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        exec(compile(block, str(DOCS), "exec"), names)
    return names


def test_the_documented_methods(documented: dict[str, Any]) -> None:
    energy = np.array([(x.astype(float) ** 2).sum() for x in (X, Y)])
    share = (1 / energy**2) / (1 / energy**2).sum()
    found = ops.merge("by_energy", [X, Y], {"power": 2})
    np.testing.assert_allclose(found, share[0] * X + share[1] * Y, rtol=1e-5, atol=1e-6)
    assert documented["by_energy"](np.eye(2)).tolist() == [0.5, 0.5]  # still a function

    found = ops.merge("trimmed_mean", [X, Y], {"density": [1.0, 0.1]}, base=Z)
    delta = Y - Z
    kept = np.abs(delta) >= np.sort(np.abs(delta).ravel())[-30]
    np.testing.assert_allclose(found, Z + (X - Z) / 2 + delta * kept / 2, rtol=1e-5, atol=1e-6)

    found = ops.merge("clipped_sum", [X, Y], {"weight": [1.0, 0.5], "most": 0.75}, base=Z)
    halves = np.float32([1, 0.5])
    expected = documented["clipped_sum"](np.stack([X, Y]), Z, weight=halves, most=np.float32(0.75))
    assert np.array_equal(found, expected) and expected.dtype == np.float32
    assert 0 < (np.abs(found - Z) >= 0.74).mean() < 1

    assert np.array_equal(ops.merge("median", [X, Y, Z]), np.median([X, Y, Z], axis=0))


@pytest.mark.usefixtures("documented")
def test_a_recipe_and_its_lineage(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("base", dtype="BF16")
    models = [{"model": str(zoo.tune(base, name, seed=i))} for i, name in enumerate("ab")]
    recipe = {
        "merge_method": "trimmed_mean", "base_model": str(base), "models": models,
        "parameters": {"density": 0.3}, "dtype": "bfloat16",
    }  # fmt: skip
    fastmerge.merge(recipe, tmp_path / "out", threads=1)
    lineage = json.loads((tmp_path / "out" / "fastmerge.json").read_text())
    assert lineage["fastmerge_methods"] == "trimmed_mean 1"
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata()["fastmerge_methods"] == "trimmed_mean 1"
    bad = {**recipe, "parameters": {"density": 1.5}}
    with pytest.raises(RecipeError, match=r"'density' must be in \[0, 1\], not 1.5"):
        api.plan(bad)


def test_fastmerges_own_methods_have_no_version(zoo: Any) -> None:
    from fastmerge.output.lineage import metadata

    recipe = {"merge_method": "linear", "models": [{"model": str(zoo.base("own"))}]}
    recipe["parameters"] = {"weight": 1}
    assert "fastmerge_methods" not in metadata(api.plan(recipe))


@pytest.mark.usefixtures("documented")
def test_the_command_line_describes_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["methods", "trimmed_mean"])
    said = capsys.readouterr().out
    assert "trimmed_mean: Average what is left of trimmed deltas" in said
    assert "per model" in said and "kept" in said


def test_bases_and_draws() -> None:
    @fastmerge.method("shrunk", version="1")
    def rule(gram: Any, base: Any, *, by: float = 0.5) -> Any:
        assert base > 0
        return np.full(len(gram), by / len(gram))

    np.testing.assert_allclose(
        ops.merge("shrunk", [X, Y], base=Z), Z + 0.25 * (X - Z) + 0.25 * (Y - Z), atol=1e-6
    )

    @fastmerge.method(version="1")
    def noisy(tensors: Any, base: Any = None, *, rng: Any, size: float = 1.0) -> Any:
        assert base is None
        return tensors[0] + size * rng.normal(size=tensors[0].shape)

    one, again, other = (ops.merge("noisy", [X], seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert find("noisy").base == "optional"


def test_torch_functions_cannot_write_the_weights() -> None:
    @fastmerge.method(version="1", torch=True)
    def zeroed(tensors: Any) -> Any:
        return tensors[0].zero_()

    x = X.copy()
    assert not ops.merge("zeroed", [x]).any()
    assert np.array_equal(x, X)


def nothing() -> None: ...


def untyped(tensors: Any, *, power=2): ...  # type: ignore[no-untyped-def]


def listed(tensors: Any, *, power: dict[str, float]) -> None: ...


def drawn(gram: Any, *, rng: Any) -> None: ...


def doubled(gram: Any, *, share: Annotated[float, Option(high=1)] = 2.0) -> None: ...


def misnamed(tensors: Any, *, power: Nowhere = 2): ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    "function, said",
    [
        (int, r"its arguments cannot be read \(no signature found"),
        (misnamed, r"its arguments cannot be read \(name 'Nowhere' is not defined"),
        (nothing, "its first argument must be called one of gram, models, entries, tensors"),
        (untyped, "argument 'power': annotate it as float"),
        (listed, "argument 'power': annotate it as float"),
        (drawn, "only a function of tensors draws"),
        (doubled, "'share' must be at most 1"),
    ],
)
def test_what_cannot_be_a_method_is_refused(function: Any, said: str) -> None:
    with pytest.raises(FastmergeError, match=said):
        fastmerge.method(version="1")(function)
    assert function.__name__ not in METHODS


def test_bad_answers_name_the_method() -> None:
    @fastmerge.method(version="1")
    def three(gram: Any) -> Any:
        return [1, 2, *gram[0]]

    @fastmerge.method(version="1")
    def numbers(models: int, *, share: Sequence[float] = 1.0) -> Any:  # type: ignore[assignment]
        return share[:models]

    with pytest.raises(FastmergeError, match=r"three returned .* not 2 finite coefficients"):
        ops.merge("three", [X, Y])
    with pytest.raises(FastmergeError, match="numbers must return Terms"):
        ops.merge("numbers", [X], base=Y)


# --- expressions of entries ---


def everything(entries: Any, base: Any) -> Any:
    """Every operation, places that are taken again, and a constant that overflows no float32."""
    a, b, *_ = entries
    ratio = a / b - -b
    high = maximum(a, b * 2) + 0.1 * 3
    low = minimum(abs(a - base), 1.5)
    picked = where((a < b) * (b <= 1), ratio, where(low >= 0.5, high, low))
    return sum(x * (x > base) for x in entries) / 3 + picked


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_expressions_are_numpys_float32(isa: str, dtype: str) -> None:
    row = Elementwise(
        "everything", "-", "-", (), "required", 2, None, version="1",
        function=lambda base, entries, values: everything(entries, base),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(4, 70_001)).astype(dtype)
    inputs[0, 5::911], inputs[1, 7::833], inputs[3, 7::833] = np.nan, np.inf, -np.inf
    before = _C.isa()
    try:
        _C.set_isa(isa)
        register(row)
        found = [ops.merge("everything", inputs[:3], base=inputs[3], threads=n) for n in (1, 2)]
    finally:
        _C.set_isa(before)
    wide = inputs.astype(np.float32)
    with np.errstate(all="ignore"):
        expected = everything(wide[:3], wide[3])
    assert expected.dtype == np.float32
    expected = expected.astype(dtype)
    np.testing.assert_array_equal(found[0], expected)
    assert found[0].tobytes() == found[1].tobytes()


def test_an_expression_of_a_thousand_models() -> None:
    @fastmerge.method(version="1")
    def many(entries: Any) -> Any:
        deltas = [entry - entries[0] for entry in entries]  # all alive until the sum is known
        total = sum(deltas)
        return sum(where(abs(d) <= abs(total), d, 0.0) for d in deltas) + 0

    models = np.random.default_rng(1).normal(size=(1000, 40)).astype(np.float32)
    deltas = models - models[0]
    total = np.zeros(40, np.float32)
    for delta in deltas:
        total = total + delta
    merged = np.zeros(40, np.float32)
    for delta in deltas:
        merged = merged + np.where(abs(delta) <= abs(total), delta, np.float32(0))
    assert np.array_equal(ops.merge("many", list(models)), merged)


def test_an_expression_may_be_an_entry_or_a_number() -> None:
    @fastmerge.method(version="1")
    def second(entries: Any) -> Any:
        return entries[1]

    @fastmerge.method(version="1")
    def seven(entries: Any) -> Any:  # noqa: ARG001
        return 7

    assert np.array_equal(ops.merge("second", [X, Y]), Y)
    assert np.array_equal(ops.merge("seven", [X, Y]), np.full_like(X, 7))


def chosen(entries: Any) -> Any:
    return max(entries)


def compared(entries: Any) -> Any:
    return entries[0] == entries[1]


def failing(entries: Any) -> Any:
    return entries[99]


def untold(entries: Any) -> Any: ...


@pytest.mark.parametrize(
    "function, said",
    [
        (chosen, r"use where\(condition, a, b\), minimum and maximum"),
        (compared, "entries are not compared with =="),
        (failing, "method failing failed: IndexError: list index out of range"),
        (untold, "entries and numbers, not NoneType"),
    ],
)
def test_bad_expressions_are_refused_before_the_merge(function: Any, said: str, zoo: Any) -> None:
    fastmerge.method(version="1")(function)
    models = [{"model": str(zoo.base(name))} for name in ("one", "two")]
    with pytest.raises(FastmergeError, match=said):
        api.plan({"merge_method": function.__name__, "models": models})


def test_an_expression_is_part_of_the_key(zoo: Any) -> None:
    recipe = {"merge_method": "scaled", "models": [{"model": str(zoo.base("keyed"))}]}

    def key(by: float) -> str:
        register(
            Elementwise(
                "scaled", "-", "-", (), "operand", 1, None, version="1",
                function=lambda base, entries, values: entries[0] * by,
            )
        )  # fmt: skip
        try:
            return api.plan(recipe).key
        finally:
            unregister("scaled")

    assert key(2.0) == key(2.0) != key(3.0)


# --- entry points -----------------------------------------------------------------------------


def install(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution on the path, as pip leaves it."""
    info = folder / "merge_plugin-3.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: merge-plugin\nVersion: 3.1\n")
    (info / "entry_points.txt").write_text("[fastmerge.methods]\nmine = merge_plugin_module\n")
    (folder / "merge_plugin_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "merge_plugin_module", raising=False)


CODE = """
import fastmerge

@fastmerge.method(version="3.1")
def first_of(tensors):
    '''The first model.'''
    return tensors[0]
"""


def test_an_installed_package_is_looked_at_when_a_name_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    entry_points = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **by: looked.append(by) or entry_points(**by)
    )
    install(tmp_path, CODE, monkeypatch)
    ops.merge("linear", [X], {"weight": 1})
    assert looked == []
    assert np.array_equal(ops.merge("first_of", [X, Y]), X)
    assert isinstance(find("first_of"), Function) and find("first_of").version == "3.1"
    with pytest.raises(RecipeError, match="unknown method 'fist_of'; did you mean 'first_of'"):
        find("fist_of")
    assert looked == [{"group": "fastmerge.methods"}]


def test_a_package_that_does_not_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "import a_module_that_is_not_there", monkeypatch)
    with pytest.raises(
        FastmergeError, match=r"'mine' of merge-plugin does not load \(ModuleNotFoundError"
    ):
        find("anything")
