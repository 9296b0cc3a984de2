"""Where the world plugs in: foreign models, sinks and executors, each made here from nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmerge
from fastmerge import _C, api
from fastmerge.compute.tensor import Outcome
from fastmerge.dtypes import BY_CODE
from fastmerge.engine.executor import Local
from fastmerge.engine.in_memory import materialise_plan
from fastmerge.errors import FastmergeError, UnsupportedError
from fastmerge.models.model import TensorInfo
from fastmerge.output.sink import Sink
from fastmerge.planning.inputs import TensorPlan
from fastmerge.planning.plan import Plan

BF16 = BY_CODE["BF16"]


class Dictionary:
    """A model that is a dict of arrays of bfloat16 bits."""

    stamp: tuple[int, ...] = ()
    folder = None
    places: tuple[Path, ...] = ()

    def __init__(self, label: str, arrays: Mapping[str, np.ndarray], config: dict[str, Any]):
        self.label, self.arrays, self.config = label, arrays, config
        self.read: list[str] = []
        self.changed = False
        self.tensors = {
            name: TensorInfo(name, BF16, array.shape, array.nbytes, array.size)
            for name, array in arrays.items()
        }

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, array in self.arrays.items():
            digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()

    def view(self, name: str, *, raw: bool = False) -> _C.View:
        array = self.arrays[name]
        code, count = ("RAW", array.nbytes) if raw else ("BF16", array.size)
        return _C.View(array.ctypes.data, count, code, array)

    def prefetch(self, name: str) -> None:
        self.read.append(name)

    def drop(self, name: str) -> None:
        pass

    def check_unchanged(self) -> None:
        if self.changed:
            raise FastmergeError(f"{self.label}: somebody wrote to it")

    def side_files(self) -> Mapping[str, bytes | Path]:
        return {"tokenizer.json": b"{}"}


class Bytes:
    """A sink that keeps each tensor's bytes in memory."""

    scratch_folder = None

    def __init__(self) -> None:
        self.kept: dict[str, np.ndarray] = {}
        self.outcomes: dict[str, Outcome] = {}

    def pending(self, items: Iterable[TensorPlan]) -> list[TensorPlan]:
        return list(items)

    def slot(self, item: TensorPlan) -> _C.Sink:
        held = self.kept[item.name] = np.zeros(item.nbytes, np.uint8)
        return _C.MemorySink(_C.View(held.ctypes.data, item.count, item.dtype.code, held))

    def parts(self, item: TensorPlan) -> Callable[[int, int], _C.Sink]:
        raise AssertionError(f"{item.name}: the CPU takes whole tensors")

    def computed(self, item: TensorPlan, outcome: Outcome) -> None:
        self.outcomes[item.name] = outcome


class Last:
    """An executor that computes on this machine, from the last tensor to the first."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def run(self, sink: Sink) -> Iterator[tuple[TensorPlan, Outcome]]:
        class Backwards:
            scratch_folder = sink.scratch_folder
            slot, parts, computed = sink.slot, sink.parts, sink.computed

            def pending(self, items: Iterable[TensorPlan]) -> list[TensorPlan]:
                return sink.pending(items)[::-1]

        yield from Local(self._plan, threads=1).run(Backwards())


def dictionary(zoo, name: str, folder: Path) -> Dictionary:
    bits = {
        tensor: (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        for tensor, values in zoo.read(folder).items()
    }
    config = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False}
    return Dictionary(name, bits, config)


@pytest.fixture
def pair(zoo) -> tuple[dict[str, Dictionary], str, str]:
    """Two models as dicts of arrays, a recipe that names them, and one that names their folders."""
    base = zoo.base("on-disk")
    tune = zoo.tune(base, "tuned")
    models = {"left": dictionary(zoo, "left", base), "right": dictionary(zoo, "right", tune)}
    text = "merge_method: slerp\nbase_model: {a}\nparameters: {{t: 0.3}}\nmodels: [{{model: {a}}}, "
    text += "{{model: {b}}}]\n"
    return models, text.format(a="left", b="right"), text.format(a=base, b=tune)


def test_a_model_may_be_a_dict_of_arrays(pair, tmp_path: Path, zoo) -> None:
    models, recipe, on_disk = pair
    report = fastmerge.merge(recipe, tmp_path / "out", models=models)
    fastmerge.merge(on_disk, tmp_path / "reference")
    made, expected = zoo.read(tmp_path / "out"), zoo.read(tmp_path / "reference")
    assert made.keys() == expected.keys()
    assert all((made[name] == expected[name]).all() for name in made)
    assert report.bytes_read == sum(a.nbytes for m in models.values() for a in m.arrays.values())
    assert set(models["right"].read) == set(models["right"].arrays)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_a_model_that_changes_meanwhile_is_no_result(pair, tmp_path: Path) -> None:
    models, recipe, _ = pair
    models["left"].changed = True
    with pytest.raises(FastmergeError, match="left: somebody wrote to it"):
        fastmerge.merge(recipe, tmp_path / "out", models=models)
    assert not list(tmp_path.glob("*out*"))


def test_a_model_in_no_folder_has_no_tokenizer_to_load(pair) -> None:
    models, recipe, _ = pair
    with pytest.raises(UnsupportedError, match="left: is in no folder"):
        _ = api.plan(recipe, models=models).donor


@pytest.mark.parametrize("executor", [Local, Last])
def test_tensors_go_to_any_sink_from_any_executor(pair, executor: Callable[[Plan], Any]) -> None:
    models, recipe, _ = pair
    plan = api.plan(recipe, models=models)
    sink = Bytes()
    names = [item.name for item, _ in executor(plan).run(sink)]
    order = [item.name for item in plan.tensors]
    assert names == (order if executor is Local else order[::-1])
    expected = {item.name: array.tobytes() for item, array in materialise_plan(plan)}
    assert {name: held.tobytes() for name, held in sink.kept.items()} == expected
    assert all(len(outcome.coefficients or {}) == 2 for outcome in sink.outcomes.values())


def test_a_reference_that_no_given_model_has_names_those_that_are_given():
    models = {"tuned": {"w": np.ones(4, np.float32)}, "other": {"w": np.ones(4, np.float32)}}
    weighed = [{"model": name, "parameters": {"weight": 1}} for name in ("./tuned", "other")]
    with pytest.raises(fastmerge.FastmergeError, match=r"models=: did you mean 'tuned'\?"):
        api.plan({"merge_method": "linear", "models": weighed}, models=models)


def test_progress_of_a_process_without_stderr(tmp_path, monkeypatch):
    models = {name: {"w": np.ones(4, np.float32)} for name in "ab"}
    weighed = [{"model": name, "parameters": {"weight": 1}} for name in models]
    monkeypatch.setattr("sys.stderr", None)
    recipe = {"merge_method": "linear", "models": weighed}
    assert fastmerge.merge(recipe, tmp_path / "out", models=models, progress=True).tensors == 1
