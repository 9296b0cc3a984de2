"""Plans of models alone, without a recipe, and the schedules that are opened by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastmerge import api, llama
from fastmerge.dtypes import F32
from fastmerge.errors import FastmergeError
from fastmerge.planning.of_models import of_models
from fastmerge.retrograde import load, run
from fastmerge.retrograde.opening import open_template
from fastmerge.retrograde.runner import describe

SCHEDULE = """\
baseline: m0
pool:
  - m1
schedule:
  steps:
    - degrade: {partner: m1, method: slerp, t: 0.3}
"""


def test_it_is_the_plan_of_the_recipe_that_says_the_same(zoo: Any) -> None:
    a = zoo.base("a", tied=True)
    b = zoo.tune(a, "b", dtype="F16")
    recipe = {
        "merge_method": "linear",
        "parameters": {"normalize": False},
        "models": [
            {"model": str(a), "parameters": {"weight": 1.25}},
            {"model": str(b), "parameters": {"weight": -0.5}},
        ],
    }
    one = of_models([str(a), str(b)], [1.25, -0.5])
    assert (one.key, one.notes) == (api.plan(recipe).key, api.plan(recipe).notes)
    assert one.seed is None and one.references == (str(a), str(b))
    other = of_models([str(a), str(b)], [1.25, -0.5], out_dtype=F32)
    assert other.key == api.plan({**recipe, "out_dtype": "float32"}).key


@pytest.mark.parametrize(
    "models, weights, message",
    [
        (["a", "gone"], None, r"^models\[1\]: gone: not a local folder"),
        (["a", "a"], None, r"^models\[1\]: model '.*a' is listed twice; keep one"),
        (["a", "deep"], None, r"^models\[1\]: model '.*deep' has tensor .* \(3 and 2 layers\)"),
        (["a"], [float("nan")], r"^models\[0\]: 'weight' must be finite"),
        (["a"], [True], r"^models\[0\]: 'weight' must be a number, not True"),
    ],
)
def test_a_fault_names_the_model_s_place(
    zoo: Any, models: list[str], weights: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.base("a")
    zoo.base("deep", layers=3)
    monkeypatch.chdir(zoo.root)
    with pytest.raises(FastmergeError, match=message):
        of_models(models, weights)


def test_coefficients_by_folder_name_the_faulty_one(zoo: Any) -> None:
    a, deep = zoo.base("a"), zoo.base("deep", layers=3)
    model = llama.load(a)
    with pytest.raises(FastmergeError, match=r"^models\[1\]: model '.*deep' has tensor"):
        llama.merge_into(model, {a: 0.5, deep: 0.5})


@pytest.mark.parametrize(
    "change, message",
    [
        ("  - deep", r"schedule\.yml:3: model 'deep' has tensor"),
        ("  - gone", r"schedule\.yml:3: gone: not a local folder"),
        ("  - {model: ./m0, name: x}", r"schedule\.yml:3: model 'm0' is listed twice; keep one"),
    ],
)
def test_a_schedule_s_faulty_model_is_named_by_its_line(
    zoo: Any, change: str, message: str
) -> None:
    base = zoo.base("m0")
    zoo.tune(base, "m1")
    zoo.base("deep", layers=3)
    path = zoo.root / "schedule.yml"
    text = SCHEDULE.replace("  - m1", change).replace("partner: m1", "partner: next")
    path.write_text(text)
    with pytest.raises(FastmergeError, match=message):
        open_template(load(path))
    path.write_text(SCHEDULE + "base_model: deep\n")
    with pytest.raises(FastmergeError, match=r"schedule\.yml:7: model 'deep' has tensor"):
        open_template(load(path))


def test_a_schedule_s_dtype_is_noted_where_it_is_not_the_output_s(zoo: Any) -> None:
    zoo.tune(zoo.base("m0"), "m1")
    path = zoo.root / "schedule.yml"

    def notes(more: str) -> list[str]:
        path.write_text(SCHEDULE + more)
        return [note for note in describe(path)["notes"] if "dtype" in note]

    assert not notes("") and not notes("dtype: bf16\n")
    assert not notes("dtype: float32\nout_dtype: bfloat16\n")
    (note,) = notes("dtype: float32\n")
    assert note.startswith("schedule.yml:7: 'dtype' names the arithmetic")
    assert "is written as bfloat16" in note and note.endswith("give 'out_dtype'")
    result = run(path, zoo.root / "out", threads=1)
    assert result.report is not None and note in result.report.notes
    assert note in (zoo.root / "out" / "model" / "README.md").read_text()
    assert Path(zoo.root / "out" / "model" / "model.safetensors").is_file()
