"""What a program's own model or sink gets wrong is one line that names the member."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import fastmerge
from fastmerge import FastmergeError
from fastmerge.dtypes import BY_CODE
from fastmerge.engine.executor import Local
from tests.test_docs import DOCS, examples

RECIPE = {
    "merge_method": "slerp",
    "base_model": "one",
    "models": [{"model": "one"}, {"model": "two"}],
    "parameters": {"t": 0.5},
}


@pytest.fixture
def page():
    """The classes of docs/plugins.md."""
    (fence,) = [f for f in examples.fences((DOCS / "plugins.md").read_text()) if "Held" in f.text]
    names = {"np": np, "fastmerge": fastmerge}
    exec(fence.text, names)
    return names


def pair(page, **members):
    array = np.ones((2, 3), np.float32)
    models = {name: page["Held"](name, {"w": array}, {}) for name in ("one", "two")}
    for name, value in members.items():
        if value is None:
            own = {k: v for k, v in vars(page["Held"]).items() if k != name and k[:2] != "__"}
            models["two"].__class__ = type("Held", (), own)
        else:
            setattr(models["two"], name, value)
    return models


@pytest.mark.parametrize(
    "member, value, must",
    [
        ("stamp", 3, "a tuple of what can be hashed"),
        ("stamp", ([],), "a tuple of what can be hashed"),
        ("label", b"two", "text"),
        ("config", [], "a mapping"),
        ("folder", "two", r"a pathlib\.Path or None"),
        ("places", ["two"], r"a tuple of pathlib\.Path"),
        ("tensors", [], "a mapping of names"),
        ("tensors", {"w": (2, 3)}, r"a fastmerge\.models\.model\.TensorInfo"),
        ("prefetch", 1, "a method"),
        ("prefetch", None, "a method"),
        ("check_unchanged", None, "a method"),
        ("side_files", list, "a mapping of names to bytes"),
        ("side_files", lambda: {"a": "text"}, "a mapping of names to bytes"),
    ],
)
def test_a_member_of_another_type_is_named(page, member, value, must) -> None:
    with pytest.raises(FastmergeError, match=rf"^two: Held\.{member}.* must be {must}"):
        fastmerge.plan(RECIPE, models=pair(page, **{member: value}))


@pytest.mark.parametrize(
    "field, value, must",
    [
        ("shape", [2, 3], "a tuple of whole numbers"),
        ("shape", (2.0, 3), "a tuple of whole numbers"),
        ("shape", (2, -3), "a tuple of whole numbers"),
        ("dtype", "F32", r"one of fastmerge\.dtypes\.BY_CODE \(.*F32"),
        ("dtype", np.dtype("f4"), r"one of fastmerge\.dtypes\.BY_CODE"),
        ("count", 5, "6, the elements of shape"),
        ("nbytes", 6, "24, of 6 float32"),
        ("name", "v", "text, the name that it is found by"),
    ],
)
def test_a_tensor_s_facts_are_held_to_one_another(page, field, value, must) -> None:
    models = pair(page)
    info = dataclasses.replace(models["two"].tensors["w"], **{field: value})
    models["two"].tensors["w"] = info
    with pytest.raises(FastmergeError, match=rf"tensors\['w'\]\.{field} is .* must be {must}"):
        fastmerge.plan(RECIPE, models=models)


def test_a_view_must_be_one(page) -> None:
    models = pair(page, view=lambda name, raw=False: np.ones(6, np.float32))
    with pytest.raises(FastmergeError, match=r"^two: Held\.view gives array.* must be a fastmerge"):
        dict(fastmerge.materialise(RECIPE, models=models))


def test_what_a_sink_gives_must_be_memory_and_tensors(page) -> None:
    plan = fastmerge.plan(RECIPE, models=pair(page))
    sink = page["Kept"]()
    sink.slot = lambda item: np.empty(item.nbytes, np.uint8)
    with pytest.raises(FastmergeError, match=r"^Kept\.slot gives array.* for 'w'; .*_C\.Sink"):
        list(Local(plan).run(sink))
    sink = page["Kept"]()
    sink.pending = lambda items: [item.name for item in items]
    with pytest.raises(FastmergeError, match=r"^Kept\.pending gives \['w'\]; it must be a list"):
        list(Local(plan).run(sink))


def test_the_page_s_model_and_sink_merge_what_a_folder_would_hold(page) -> None:
    (row,) = page["kept"].bytes.items()
    expected = dict(fastmerge.materialise(page["plan"]))
    assert row[0] == "w" and row[1].tobytes() == expected["w"].tobytes()
    assert page["plan"].tensors[0].dtype is BY_CODE["F32"]


def test_fastmerge_s_own_models_keep_the_protocol(zoo) -> None:
    from fastmerge.models.checkpoint import Checkpoint
    from fastmerge.models.foreign import held_to_protocol

    model = Checkpoint.open(zoo.base("base"))
    assert held_to_protocol(model, "base") is model
