"""Whatever is handed to a public function, a mistake comes out as FastmergeError: the wrong types,
numbers out of range, paths that no file system has. A walk over every argument.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastmerge
from fastmerge import api, ops
from fastmerge.errors import FastmergeError
from fastmerge.integrations import mergekit

MAPPING_OF_ITSELF: dict[str, Any] = {"merge_method": "linear"}
MAPPING_OF_ITSELF["models"] = [MAPPING_OF_ITSELF]
DEEP: Any = "a"
for _ in range(100_000):
    DEEP = [DEEP]


class Called:
    """A class that takes any arguments."""

    def __init__(self, *_: object) -> None:
        pass


def _closed(tmp_path: Path) -> Any:
    with (tmp_path / "closed").open("w") as file:
        return file


def odd_values(tmp_path: Path) -> dict[str, Any]:
    """What people pass by mistake, by name."""
    return {
        "none": None,
        "true": True,
        "nan": math.nan,
        "inf": math.inf,
        "negative": -1,
        "zero": 0,
        "huge": 1 << 80,
        "fraction": 1.5,
        "complex": 1j,
        "text": "nonsense",
        "empty": "",
        "digits": "12",
        "nul": "a\0b",
        "surrogate": "a\udcff",
        "half": "a\ud800",  # of a pair, which is no byte's stand-in either
        "lines": "a\nb\n",
        "long": "x" * 5000,
        "bytes": b"bytes",
        "path": Path("nowhere"),
        "path-nul": Path("a\0b"),
        "folder": tmp_path,
        "list": [1, 2],
        "tuple": (),
        "set": {1},
        "dict": {"a": 1},
        "dict-keys": {1: 2},
        "deep": {"merge_method": DEEP},
        "cycle": MAPPING_OF_ITSELF,
        "generator": (i for i in range(3)),
        "closed": _closed(tmp_path),
        "object": object(),
        "namespace": SimpleNamespace(),
        "class": Called,
        "function": lambda *_: None,
        "array": np.ones(3, np.float32),
        "scalar-array": np.array(0.5),
        "objects": np.array([object()]),
        "words": np.array(["a", "b"]),
        "no-numbers": np.zeros((0,), np.float32),
        "integers": np.ones(3, np.int64),
        "strided": np.ones(6, np.float32)[::2],
        "numpy-int": np.int64(3),
        "numpy-nan": np.float32("nan"),
    }


def escapes(call: Callable[[Any], Any], values: dict[str, Any]) -> Iterator[str]:
    """What comes out of ``call`` for each value, where it is no FastmergeError of one line."""
    for name, value in values.items():
        try:
            found = call(value)
            if inspect.isgenerator(found):
                list(found)
        except FastmergeError as error:
            if "\n" in str(error) or not str(error).strip():
                yield f"{name}: {error!r}"
        except Exception as error:  # noqa: BLE001
            yield f"{name}: {type(error).__name__}: {error}"


@pytest.fixture
def values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return odd_values(tmp_path)


@pytest.fixture
def recipe(zoo):
    base = zoo.base("base", layers=1)
    tune = zoo.tune(base, "tune")
    return {
        "merge_method": "slerp",
        "base_model": str(base),
        "parameters": {"t": 0.5},
        "models": [{"model": str(base)}, {"model": str(tune)}],
    }


def walk(function: Callable[..., Any], good: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """Every argument of ``function`` with every odd value, the others as in ``good``."""
    names = [p for p in inspect.signature(function).parameters if p != "kwargs"]
    return [
        f"{name}={fault}"
        for name in names
        for fault in escapes(lambda value, name=name: function(**{**good, name: value}), values)
    ]


MERGES = {
    "merge": (fastmerge.merge, "recipe", "out", {"overwrite": True, "fresh": True}),
    "plan": (api.plan, "recipe", None, {}),
    "check": (api.check, "recipe", None, {}),
    "materialise": (fastmerge.materialise, "recipe", None, {}),
    "run_merge": (mergekit.run_merge, "merge_config", "out_path", {"overwrite": True}),
}


@pytest.mark.parametrize("name", MERGES)
def test_arguments_of_a_merge(name, recipe, values, tmp_path) -> None:
    function, what, where, others = MERGES[name]
    good = {what: recipe, **others}
    if where:
        good[where] = tmp_path / "out"
    assert walk(function, good, values) == []


@pytest.mark.parametrize("name", ["extract_lora", "merge_adapters"])
def test_arguments_of_adapters(name, recipe, values, tmp_path) -> None:
    base, tune = (entry["model"] for entry in recipe["models"])
    fastmerge.extract_lora(tune, base, tmp_path / "adapter", rank=2, exclude=["embed", "lm_head"],
                           skip_undecomposable=True)  # fmt: skip
    pair = {"tuned": tune, "base": base, "rank": 1, "include": ["q_proj"]}
    alone = {"adapters": [tmp_path / "adapter"], "weights": [1]}
    good = {"extract_lora": pair, "merge_adapters": alone}[name]
    good |= {"out": tmp_path / "out", "overwrite": True, "fresh": True}
    assert walk(getattr(fastmerge, name), good, values) == []


@pytest.mark.parametrize("key", sorted(mergekit._KNOWN - mergekit.NO_EFFECT))
def test_options_of_mergekit(key, recipe, values, tmp_path) -> None:
    def call(value):
        return mergekit.run_merge(recipe, tmp_path / "out", {key: value}, overwrite=True)

    assert list(escapes(call, values)) == []


@pytest.mark.parametrize("key", ["merge_method", "base_model", "models", "slices", "parameters",
    "dtype", "out_dtype", "tokenizer_source", "tokenizer", "seed", "name"])  # fmt: skip
def test_values_in_a_recipe(key, recipe, values) -> None:
    assert list(escapes(lambda value: api.plan({**recipe, key: value}), values)) == []


X, Y, Z = (np.linspace(0, n, 24, dtype=np.float32).reshape(4, 6) for n in (1, 2, 3))
OPS = {
    ops.linear: {"tensors": [X, Y], "weights": [1, 2]},
    ops.slerp: {"a": X, "b": Y, "t": 0.5},
    ops.nuslerp: {"a": X, "b": Y, "weights": [1, 2]},
    ops.multislerp: {"tensors": [X, Y, Z], "weights": [1, 2, 3]},
    ops.karcher: {"tensors": [X, Y, Z]},
    ops.model_stock: {"base": X, "tensors": [Y, Z]},
    ops.task_arithmetic: {"base": X, "tensors": [Y, Z], "weights": [1, 2]},
    ops.ties: {"base": X, "tensors": [Y, Z], "weights": [1, 2]},
    ops.dare_linear: {"base": X, "tensors": [Y, Z], "weights": [1, 2], "density": 0.5, "seed": 0},
    ops.dare_ties: {"base": X, "tensors": [Y, Z], "weights": [1, 2], "density": 0.5, "seed": 0},
    ops.della: {"base": X, "tensors": [Y, Z], "weights": [1, 2], "density": 0.5, "seed": 0},
    ops.della_linear: {"base": X, "tensors": [Y, Z], "weights": [1, 2], "density": 0.5, "seed": 0},
    ops.breadcrumbs: {"base": X, "tensors": [Y, Z], "weights": [1, 2], "density": 0.5},
    ops.breadcrumbs_ties: {"base": X, "tensors": [Y, Z], "weights": [1, 2], "density": 0.5},
    ops.passthrough: {"tensor": X},
    ops.gram: {"tensors": [X, Y]},
    ops.combine: {"tensors": [X, Y], "coefficients": [1, 2]},
}


@pytest.mark.parametrize("function", OPS, ids=lambda f: f.__name__)
def test_arguments_of_ops(function, values) -> None:
    assert walk(function, OPS[function], values) == []


def test_arguments_of_llama(recipe, values) -> None:
    pytest.importorskip("transformers")
    from fastmerge import llama

    assert walk(llama.load, {}, values) == []
    assert walk(llama.load_merged, {"recipe": recipe}, values) == []
    assert walk(llama.load_tokenizer, {"source": recipe}, values) == []
    model = llama.load(recipe["base_model"])
    assert walk(llama.merge_into, {"model": model, "recipe": recipe}, values) == []


def test_arguments_of_a_walk(recipe, values, tmp_path) -> None:
    from fastmerge import retrograde

    schedule = {
        "baseline": recipe["base_model"],
        "pool": [recipe["models"][1]["model"]],
        "schedule": {
            "cycles": 1,
            "degrade": {"partner": "next", "method": "slerp", "t": 0.3},
            "retrace": {"toward": "baseline", "method": "slerp", "t": 0.5},
        },
    }
    assert walk(retrograde.load, {"source": schedule}, values) == []
    for key in ("baseline", "pool", "schedule", "accept", "evaluate", "compare", "seed", "keep"):

        def load(value, key=key):
            return retrograde.load({**schedule, key: value})

        assert list(escapes(load, values)) == []
    assert walk(retrograde.open_space, {"schedule": retrograde.load(schedule)}, values) == []
    counter = iter(range(10**6))

    def run(source=schedule, out=values, **others):
        folder = tmp_path / f"run{next(counter)}" if out is values else out
        return retrograde.run(source, folder, **{"evaluate": False, **others})

    for key in ("source", "out", "evaluate", "resume", "seed", "threads", "score", "progress",
                "on_step", "on_row"):  # fmt: skip
        assert list(escapes(lambda value, key=key: run(**{key: value}), values)) == []
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text('{"seed": nobody knows}')
    with pytest.raises(FastmergeError, match=r"run\.json: is damaged"):
        run(out=tmp_path / "damaged", resume=True)


def test_arguments_of_a_sweep_and_a_search(recipe, values, tmp_path) -> None:
    from fastmerge import search
    from fastmerge.search.sweep import sweep

    base, tune = (model["model"] for model in recipe["models"])
    slerp = {"merge_method": "slerp", "base_model": base, "parameters": {"t": 0.5}}
    slerp["models"] = [{"model": base}, {"model": tune}]
    ranged = {"model": tune, "parameters": {"weight": {"low": 0, "high": 1, "start": 0.5}}}
    space = {
        "space": {"merge_method": "task_arithmetic", "base_model": base, "models": [ranged]},
        "optimiser": {"name": "random", "population": 1},
        "budget": {"items": 1},
    }
    counter = iter(range(10**6))

    def swept(out=values, **others):
        folder = tmp_path / f"sweep{next(counter)}" if out is values else out
        return sweep(slerp, folder, **{"values": [0.5], **others})

    def searched(out=values, **others):
        folder = tmp_path / f"search{next(counter)}" if out is values else out
        return search.run(space, folder, **{"score": lambda folder: 1.0, **others})

    for key in ("out", "values", "write", "resume", "evaluate", "on_start", "on_point", "data"):
        assert list(escapes(lambda value, key=key: swept(**{key: value}), values)) == []
    for key in ("out", "resume", "seed", "on_trial", "on_score", "on_note", "data"):
        assert list(escapes(lambda value, key=key: searched(**{key: value}), values)) == []


def test_a_budget_that_cannot_be_kept_is_refused(recipe, tmp_path) -> None:
    for limit in (1, (64 << 20) - 1):
        with pytest.raises(
            FastmergeError, match=f"memory_limit: {limit} is less than the 67108864"
        ):
            fastmerge.merge(recipe, tmp_path / "out", memory_limit=limit)
    assert not (tmp_path / "out").exists()


def test_what_a_callback_raises_is_its_own(recipe, tmp_path) -> None:
    def stop(*_: object) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        fastmerge.merge(recipe, tmp_path / "out", progress=stop)


def test_the_home_in_an_outputs_path(recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    report = fastmerge.merge(recipe, "~/out", threads=1)
    assert report.out == tmp_path / "out"
    assert fastmerge.verify(Path("~/out")).whole
    with pytest.raises(FastmergeError, match="out: ~nobody-here/out: no user ~nobody-here"):
        fastmerge.merge(recipe, "~nobody-here/out")
