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
from fastmerge import api, ops
from fastmerge.cli import main
from fastmerge.errors import FastmergeError, RecipeError
from fastmerge.methods import METHODS, Function, Option, find, plugins

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


@pytest.mark.parametrize(
    "function, said",
    [
        (nothing, "its first argument must be called one of gram, models, tensors"),
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
