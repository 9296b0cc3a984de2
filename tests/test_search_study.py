"""Searches over a recipe's ranges: what is asked, what it costs, what is left at the end."""

from __future__ import annotations

import gc
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmerge
from fastmerge import extras, retrograde, search
from fastmerge.errors import FastmergeError, command_line
from fastmerge.search import optimisers
from fastmerge.search.folder import LOCK_FILE
from fastmerge.search.report import lines_for, verdict
from fastmerge.search.search import Search, drive
from fastmerge.search.sweep import sweep

REPOSITORY = Path(__file__).parent.parent
IDS = np.random.default_rng(0).integers(1, 39, (80, 8))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(shared_zoo: Any) -> list[Path]:
    """A base and two of its fine-tunes."""
    base = shared_zoo.base("search0", dtype="F32")
    tuned = [shared_zoo.tune(base, f"search{i}", seed=i, dtype="F32", size=0.05) for i in (1, 2)]
    return [base, *tuned]


def file_of(models: list[Path], weight: Any = "0..1", **keys: Any) -> dict[str, Any]:
    base, *tuned = map(str, models)
    space = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": path, "parameters": {"weight": weight}} for path in tuned],
    }
    found = {
        "space": space,
        "optimiser": "random",
        "budget": {"items": 400},
        "evaluate": {"callable": "stand:in"},
        "seed": 5,
    }
    return {**found, **keys}


def likelihood(model: Any, split: str = "steer", limit: int | None = None) -> Mapping[str, Any]:
    """Two tasks of 20 items a split: cheap, and they move with every weight."""
    import torch

    rows = torch.tensor(IDS[:40] if split == "steer" else IDS[40:])
    with torch.no_grad():
        logits = model(input_ids=rows, use_cache=False).logits.log_softmax(-1)
    chosen = logits[:, :-1].gather(-1, rows[:, 1:, None])[..., 0].mean(1)
    values = (1000 * chosen.exp()).tolist()
    return {"a": values[:20][:limit], "b": values[20:][:limit]}


def near(study: Any, target: Any = 0.7) -> float:
    """A score that ends at the point ``target``, as shares of the ranges: no model is made."""
    units = study.ranges.units(study.point)
    return 100 - 100 * float(np.square(units - target).mean())


def told(models: list[Path], out: Path, score: Callable[[Any], Any] = near, **keys: Any) -> Any:
    study = search.open_study(file_of(models, **keys), out, threads=1)
    typed: Search = study
    while (candidate := typed.ask()) is not None:
        typed.tell(candidate, score(study))
    return study


def points_of(study: Any) -> list[Any]:
    return [(trial.point, trial.limit, trial.scores.value) for trial in study.trials]


@pytest.mark.parametrize("name", [n for n in optimisers.OPTIMISERS if n != "gradient"])
def test_an_optimiser_follows_from_its_seed_and_finds_the_better_points(
    models: list[Path], tmp_path: Path, name: str
) -> None:
    keys = {"optimiser": name, "budget": {"items": 60}, "weight": {"low": -0.5, "high": 1.5}}
    # A walk stays among its models.
    score = partial(near, target=np.array([0.7, 0.2])) if name == "walk" else near
    first, second = (told(models, tmp_path / str(i), score, **keys) for i in range(2))
    assert points_of(first) == points_of(second)
    assert first.trials[0].point == first.ranges.start == (0.5, 0.5)
    assert first.best.value > first.start.value + 2.0
    assert first.spent <= 60 and len(first.trials) <= 60
    assert name in ("line", "coordinate") or first.spent == 60  # those two converge
    low, high = np.min([t.point for t in first.trials]), np.max([t.point for t in first.trials])
    assert low >= -0.5 and high <= 1.5
    other = told(models, tmp_path / "other", score, **{**keys, "seed": 6})
    assert (points_of(other) == points_of(first)) == (name == "line")


@pytest.mark.parametrize("name", ["tpe", "random", "coordinate"])
def test_words_are_searched_too(models: list[Path], tmp_path: Path, name: str) -> None:
    file = file_of(models, optimiser=name, budget={"candidates": 30})
    file["space"]["merge_method"] = {"choose": ["ties", "dare_ties", "dare_linear"]}
    file["space"]["parameters"] = {"density": "0.2..1"}
    study = search.open_study(file, tmp_path, threads=1)
    while (candidate := study.ask()) is not None:
        is_dare = study.point[0] == "dare_ties"
        study.tell(candidate, 50 * is_dare + 10 * study.point[-1])
    assert study.best.point[0] == "dare_ties"
    assert {trial.point[0] for trial in study.trials} == {"ties", "dare_ties", "dare_linear"}
    recipe = study.recipe(study.best.point)
    assert recipe["merge_method"] == "dare_ties" and recipe["seed"] == 5


def test_a_killed_search_ends_as_one_that_was_not(models: list[Path], tmp_path: Path) -> None:
    class Calls:  # no plain value, of which a change would be another scorer
        count, killed_after = 0, -1

    calls = Calls()

    def counted(model: Any, split: str = "steer", limit: int | None = None) -> Any:
        if calls.count == calls.killed_after:
            raise KeyboardInterrupt
        calls.count += 1
        return likelihood(model, split, limit)

    file = file_of(models, optimiser="cma", budget={"items": 900})
    file["evaluate"]["stages"] = [5]
    search.run(file, tmp_path / "whole", score=counted, threads=1)
    total, calls.count, calls.killed_after = calls.count, 0, 17
    with pytest.raises(KeyboardInterrupt):
        search.run(file, tmp_path / "killed", score=counted, threads=1)
    with (tmp_path / "killed" / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"key": "score:half')  # what it was writing as it was killed
    with pytest.raises(FastmergeError, match="holds a run already; use resume=True"):
        search.run(file, tmp_path / "killed", score=counted, threads=1)
    calls.killed_after = -1
    search.run(file, tmp_path / "killed", score=counted, threads=1, resume=True)
    assert calls.count == total  # nothing was measured twice
    for name in ("search.json", "recipe.yml", "report.md", "model/model.safetensors"):
        whole, killed = (tmp_path / run / name for run in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes(), name


def test_a_search_goes_on_with_a_larger_budget_and_no_other_change(
    models: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    small = told(models, out, budget={"items": 10})
    whole = told(models, tmp_path / "whole", budget={"items": 25})
    study = search.open_study(file_of(models, budget={"items": 25}), out, resume=True, threads=1)
    asked = 0
    while (candidate := study.ask()) is not None:
        asked += 1
        study.tell(candidate, near(study))
    assert (len(small.trials), asked) == (10, 15)
    assert points_of(study) == points_of(whole)
    for change in ({"optimiser": "line"}, {"weight": "0..2"}, {"seed": 6}):
        with pytest.raises(FastmergeError, match="was begun with other 'search'"):
            search.open_study(file_of(models, **change), out, resume=True, threads=1)


def test_the_budget_counts_items_and_a_stage_keeps_a_third(
    models: list[Path], tmp_path: Path
) -> None:
    file = file_of(models, optimiser={"name": "random", "population": 9}, budget={"items": 1000})
    file["evaluate"]["stages"] = [2, 6]
    study = search.open_study(file, tmp_path, threads=1)
    while (candidate := study.ask()) is not None:
        study.tell(candidate, {"task": [near(study)] * (study.limit or 20)})
    limits = [trial.limit for trial in study.trials]
    assert limits[:14] == [None] + [2] * 9 + [6] * 3 + [None]
    assert study.trials[13].spent == 20 + 9 * 2 + 3 * 6 + 20
    # The one that is scored on all items is the best of its population.
    best = max(study.trials[1:10], key=lambda trial: trial.value)
    assert study.trials[13].point == best.point
    spent = [trial.spent for trial in study.trials]
    assert spent[-1] <= 1000 < spent[-1] + 20 and spent == sorted(spent)


def test_a_point_once_more_costs_nothing(models: list[Path], tmp_path: Path) -> None:
    study = told(models, tmp_path, optimiser="coordinate", budget={"candidates": 500})
    states = [study.lab.space.fingerprint(trial.state) for trial in study.trials]
    assert len(set(states)) == len(states) < 500


def test_what_is_written_is_what_was_scored(models: list[Path], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    calls: list[tuple[str, int | None]] = []

    def counted(model: Any, split: str = "steer", limit: int | None = None) -> Any:
        calls.append((split, limit))
        return likelihood(model, split, limit)

    weight = {"low": 0, "high": 1, "layers": 2, "per": ["mlp"], "start": 0.25}
    out = tmp_path / "out"
    file = file_of(models, weight, optimiser="coordinate", budget={"items": 1600})
    found = search.run(file, out, score=counted, threads=1)
    assert {path.name for path in out.iterdir()} >= {
        "model", "recipe.yml", "search.json", "journal.jsonl", "report.md", "report.html",
        "budget.png", "coefficients.png", "comparison.png",
    }  # fmt: skip
    written = json.loads((out / "search.json").read_text())
    assert written["best"] == found.best.number > 0
    assert len(written["dimensions"]) == 8 == len(set(written["dimensions"]))
    # Read back by transformers: to the bit, as float32.
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    again = likelihood(model)
    assert {k: float(np.mean(v)) for k, v in again.items()} == pytest.approx(
        {name: task.value for name, task in found.best.scores.tasks.items()}, rel=1e-12
    )
    # The recipe makes that model, to rounding.
    fastmerge.merge(out / "recipe.yml", tmp_path / "again", threads=1)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    for name, tensor in other.state_dict().items():
        assert torch.allclose(tensor, model.state_dict()[name], atol=2e-6), name
    # The hold-out is looked at once, by the best and by what needs no search.
    rows = {row["name"]: row for row in written["comparison"]}
    assert list(rows) == ["search", "start", "uniform", "best_single"]
    assert calls.count(("holdout", None)) == 4
    assert rows["search"]["holdout"]["value"] == pytest.approx(
        float(np.mean([np.mean(v) for v in likelihood(model, "holdout").values()]))
    )
    assert 0 <= rows["start"]["p_holm"] <= 1
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page.replace(
        "http-equiv", ""
    )
    assert "## The front over the tasks" in (out / "report.md").read_text()


def test_the_front_holds_what_nothing_beats(models: list[Path], tmp_path: Path) -> None:
    def two(study: Any) -> Any:
        a, b = study.point
        return {"first": 100 * a, "second": 100 * (1 - a) - b}

    study = told(models, tmp_path, two, budget={"candidates": 40})
    values = {t.number: [task.value for task in t.scores.tasks.values()] for t in study.trials}
    front = {trial.number for trial in study.front}
    for number, own in values.items():
        beaten = any(
            other != own and other[0] >= own[0] and other[1] >= own[1] for other in values.values()
        )
        assert (number in front) != beaten
    assert 1 < len(front) < 40


def test_among_copies_of_one_model_nothing_is_found(models: list[Path], tmp_path: Path) -> None:
    import shutil

    twin, third = (tmp_path / name for name in ("twin", "third"))
    shutil.copytree(models[0], twin)
    shutil.copytree(models[0], third)
    file = file_of([models[0], twin, third], budget={"items": 480})
    found = search.run(file, tmp_path / "out", score=likelihood, threads=1)
    lines = lines_for(found)
    assert found.best is found.study.start
    assert verdict(found.study, lines).startswith("Nothing beat the start")
    assert all(line.value == lines[0].value and line.lead[:3] == (0, 0, 0) for line in lines[1:])


def test_a_search_over_noise_claims_nothing(models: list[Path], tmp_path: Path) -> None:
    """At the level of 5 % some of many noisy searches may: of ten, more than two with p = 0.01."""
    claims = 0
    for seed in range(10):

        def noise(model: Any, split: str = "steer", _seed: int = seed) -> Any:
            weight = float(model.state_dict()["model.layers.0.mlp.up_proj.weight"][3, 5])
            own = int(abs(weight) * 2**40)
            draws = np.random.default_rng([own, _seed, len(split)]).normal(50, 10, 40)
            return {"noise": draws.tolist()}

        file = file_of(models, optimiser="random", seed=seed, budget={"items": 600})
        found = search.run(file, tmp_path / str(seed), score=noise, threads=1)
        start = lines_for(found)[1]
        assert start.row.name == "start" and found.best.number > 0
        assert found.best.value > found.study.start.value  # the best of many looks better
        claims += "better" in verdict(found.study, lines_for(found))
    assert claims <= 2


def test_without_a_hold_out_nothing_is_claimed(models: list[Path], tmp_path: Path) -> None:
    def steering(model: Any) -> Any:
        return likelihood(model)["a"][0]

    file = file_of(models, budget={"candidates": 6})
    found = search.run(file, tmp_path, score=steering, threads=1)
    said = verdict(found.study, lines_for(found))
    assert "nothing is claimed" in said or "Nothing beat" in said
    assert "No hold-out was given" in (tmp_path / "report.md").read_text()


def test_a_score_that_is_no_number_is_never_the_best(models: list[Path], tmp_path: Path) -> None:
    def odd(study: Any) -> float:
        return (math.nan, near(study), math.inf)[len(study.trials) % 3]

    for name in ("cma", "tpe", "coordinate", "walk"):
        study = told(models, tmp_path / name, odd, optimiser=name, budget={"candidates": 25})
        assert math.isfinite(study.best.value) and len(study.trials) == 25
    found = search.run(
        file_of(models, "1e-1..1", budget={"candidates": 2}),
        tmp_path / "none",
        threads=1,
        score=lambda model: math.inf,
    )
    said = "No candidate's score is a number: the model written is the start point."
    assert verdict(found.study, lines_for(found)) == said


def test_weights_that_sum_to_0_are_no_candidate(models: list[Path], tmp_path: Path) -> None:
    file = file_of(models, optimiser="line", budget={"candidates": 30})
    file["space"] |= {"merge_method": "linear"}
    del file["space"]["base_model"]
    study = search.open_study(file, tmp_path, threads=1)
    while (candidate := study.ask()) is not None:
        study.tell(candidate, near(study, 0.1))
    assert study.ranges.ends()[0] == (0.0, 0.0) not in [trial.point for trial in study.trials]
    # Equal weights, divided by their sum, are one state: it was told once.
    assert len(study.trials) == 1


@pytest.mark.parametrize("other", [{"a": 1.0}, {"a": 1.0, "c": 2.0}])
def test_models_scored_on_other_tasks_are_not_compared(
    models: list[Path], tmp_path: Path, other: Any
) -> None:
    """Their means chose the best, or the report ended in a traceback after all the reading."""
    answers = iter([{"a": 1.0, "b": 2.0}, {"b": math.nan}, other])
    file = file_of(models, budget={"candidates": 5})
    with pytest.raises(FastmergeError, match=r"scored one model on \['a', 'b'\] and another on"):
        search.run(file, tmp_path / "run", score=lambda model: next(answers), threads=1)
    study = search.open_study(file, tmp_path / "told", threads=1)
    study.tell(study.ask(), {"a": 1.0, "b": 2.0})
    with pytest.raises(FastmergeError, match="tell: scored one model on"):
        study.tell(study.ask(), other)


def test_values_that_the_method_does_not_take_together_are_no_candidate(
    models: list[Path], tmp_path: Path
) -> None:
    """della's epsilon above the density: the search ended there, and so did its continuation."""
    file = file_of(models, 1, budget={"candidates": 12})
    for entry in file["space"]["models"]:
        entry["parameters"] |= {"density": "0.1..0.9", "epsilon": "0..0.5"}
    file["space"]["merge_method"] = "della"
    study = search.open_study(file, tmp_path, threads=1)
    while (candidate := study.ask()) is not None:
        study.tell(candidate, near(study))
    assert len(study.trials) == 12
    points = np.array([trial.point for trial in study.trials])
    assert (points[:, 1::2] <= np.minimum(points[:, ::2], 1 - points[:, ::2])).all()


@pytest.mark.parametrize("name", ["cma", "tpe", "line"])
def test_a_start_of_many_digits_is_in_its_range(models: Any, tmp_path: Path, name: str) -> None:
    """Six digits of it lay above: cma and tpe ended in a traceback."""
    weight = {"low": 0.1234, "high": 0.1234567, "start": 0.1234567}
    study = told(models, tmp_path, weight=weight, optimiser=name, budget={"candidates": 4})
    assert study.start.point == (0.1234567, 0.1234567) and len(study.trials) > 1


def test_an_optimiser_that_turns_in_a_circle_ends(models: list[Path], tmp_path: Path) -> None:
    file = file_of(models, 0.5, budget={"candidates": 100})
    file["space"]["merge_method"] = {"choose": ["ties", "dare_ties"]}
    study = search.open_study(file, tmp_path, threads=1)
    while (candidate := study.ask()) is not None:
        study.tell(candidate, 1.0)
    assert len(study.trials) == 2 == study.spent


def test_a_drive_is_the_same_loop(models: list[Path], tmp_path: Path) -> None:
    study = search.open_study(file_of(models, budget={"candidates": 5}), tmp_path, threads=1)
    drive(study, lambda state: near(study))  # type: ignore[arg-type,return-value]
    found = search.finish(study, tmp_path, threads=1)
    assert [row.name for row in found.rows] == ["search", "start"]
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_state_that_was_not_asked_for_is_refused(models: list[Path], tmp_path: Path) -> None:
    study = search.open_study(file_of(models), tmp_path, threads=1)
    candidate = study.ask()
    assert candidate is study.ask()
    study.tell(candidate, 1.0)
    with pytest.raises(FastmergeError, match="was not asked for"):
        study.tell(candidate, 1.0)
    with pytest.raises(FastmergeError, match="tell: must return a dict"):
        study.tell(study.ask(), "much")


def test_a_missing_library_is_one_line(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for name, library in (("cma", "cma"), ("tpe", "optuna")):
        message = rf"{name} needs the library {library}; .*pip install .*\[search\]'"
        with pytest.raises(FastmergeError, match=message):
            search.open_study(file_of(models, optimiser=name), tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


MISTAKES: Mapping[str, tuple[dict[str, Any], str]] = {
    "optimiser": ({"optimiser": "cmaes"}, "must be 'cma', 'tpe', 'random'"),
    "budget": ({"budget": {"items": 5, "candidates": 5}}, "give either 'items' or 'candidates'"),
    "no budget": ({"budget": 0}, "'items' must be greater than or equal to 1"),
    "stages": (
        {"optimiser": "line", "evaluate": {"callable": "a:b", "stages": [4]}},
        "'stages' are for cma, tpe, random",
    ),
    "staged": (
        {"budget": {"candidates": 9}, "evaluate": {"callable": "a:b", "stages": [4]}},
        "with 'stages' not all candidates cost the same",
    ),
    "population": ({"optimiser": {"name": "tpe", "population": 5}}, "'population' is of cma and"),
    "key": ({"optimizer": "cma"}, "unknown key 'optimizer'; did you mean 'optimiser'?"),
    "gradient": ({"optimiser": "gradient"}, "gradient: needs tasks or a perplexity"),
    "gradient of a rule": (
        {"optimiser": "gradient", "method": "ties", "evaluate": {"perplexity": "text.txt"}},
        "gradient needs a method that is a",
    ),
    "crowd": ({"optimiser": {"name": "cma", "population": 10**9}}, "less than or equal to 10000"),
    "words": (
        {"optimiser": "cma", "method": {"choose": ["ties", "dare_ties"]}},
        "cma moves numbers alone, and merge_method is chosen",
    ),
    "constant": ({"weight": 0.5}, "no number of the recipe is a range"),
    "range": ({"weight": {"low": 1, "high": 0}}, "'low' must be less than"),
    "half": ({"weight": {"low": 1}}, "'high' is missing"),
    "start": ({"weight": {"low": 0, "high": 1, "start": 2}}, "'start' must be from 'low' to"),
    "word": ({"weight": {"low": 0, "high": 1, "layer": 2}}, "unknown key 'layer'; did you mean"),
    "one": ({"method": {"choose": ["ties"]}}, "'choose' takes two or more different values"),
    "bounds": ({"density": "0.5..1.5", "method": "ties"}, "'density' must be"),
    "misspelt": ({"densty": "0.5..1", "method": "ties"}, "unknown parameter 'densty' for ties"),
    "method": ({"method": "tees"}, "unknown method 'tees'; did you mean 'ties'?"),
    "layers": ({"weight": [{"low": 0, "high": 1, "layers": 2}, 1]}, "'layers' is not for one"),
    "per": (
        {"weight": [{"filter": "mlp", "value": {"low": 0, "high": 1, "per": ["q"]}}, {"value": 1}]},
        "'per' is for a parameter as a whole",
    ),
    "filter": ({"weight": [{"filter": "mlp", "value": "0..1"}]}, "no filter matches tensor"),
    "slices": ({"slices": [{"sources": []}]}, "a slice needs at least one source"),
    "three dots": ({"weight": "0...1"}, "'0...1' is no range; write two finite numbers as 0..1"),
    "endless": ({"weight": "0..inf"}, "'0..inf' is no range"),
    "narrow": ({"weight": "0.12345678..0.12345679"}, "lies no number of 6 digits"),
    "whole": (
        {"method": "consensus_ta", "agree": {"low": 1, "high": 3, "start": 2}},
        "'agree' takes whole numbers alone",
    ),
    "which base": ({"base_model": {"choose": ["a", "b"]}}, "'choose' are for what stands under"),
    "too far": ({"weight": "-1e308..1e308"}, "by a finite number"),
    "no such part": (
        {"weight": {"low": 0, "high": 1, "per": ["mlp", "self_atn"]}},
        "'per' self_atn is in no tensor's name",
    ),
    "twice": ({"weight": {"low": 0, "high": 1, "per": ["mlp", "mlp"]}}, "each of them once"),
}


@pytest.mark.parametrize("change, message", MISTAKES.values(), ids=MISTAKES)
def test_what_cannot_be_searched_is_one_line(
    models: list[Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    change = dict(change)
    file = file_of(models, change.pop("weight", "0..1"))
    space = file["space"]
    space["merge_method"] = change.pop("method", "task_arithmetic")
    for key in ("density", "densty", "agree"):
        if key in change:
            space["parameters"] = {key: change.pop(key)}
    space |= {key: change.pop(key) for key in ("slices", "base_model") if key in change}
    with pytest.raises(FastmergeError, match=re.escape(message)) as caught:
        search.open_study({**file, **change}, tmp_path / "out", threads=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "search.json").exists()


def test_a_smaller_budget_forgets_nothing_that_the_folder_holds(
    models: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def resumed(**budget: int) -> Any:
        file = file_of(models, budget=budget)
        return search.run(file, out, score=_of_the_head, threads=1, resume=True)

    search.run(file_of(models, budget={"candidates": 12}), out, score=_of_the_head, threads=1)
    names = ("search.json", "recipe.yml", "report.md", "model/model.safetensors", "journal.jsonl")
    before = {name: (out / name).read_bytes() for name in names}
    said = "budget.*: [57] (candidates|items) buy less than the folder holds already, .* with 12 c"
    for budget in ({"candidates": 5}, {"items": 7}):
        with pytest.raises(FastmergeError, match=said):
            resumed(**budget)
    assert before == {name: (out / name).read_bytes() for name in names}
    assert len(resumed(candidates=12).study.trials) == 12  # the same once more
    assert len(resumed(candidates=14).study.trials) == 14


def _of_the_head(model: Any) -> float:
    return float(model.lm_head.weight.double().norm())


def test_a_function_from_python_needs_no_section(models: list[Path], tmp_path: Path) -> None:
    file = file_of(models, budget={"candidates": 3})
    del file["evaluate"]
    found = search.run(file, tmp_path / "run", score=_of_the_head, threads=1)
    assert found.evaluator == f"score={__name__}._of_the_head"
    written = (tmp_path / "run" / "report.md").read_text().replace("\\", "")
    assert f"Scored by score={__name__}._of_the_head." in written
    study = search.open_study(file, tmp_path / "told", threads=1)
    while (candidate := study.ask()) is not None:
        study.tell(candidate, near(study))
    with pytest.raises(FastmergeError, match="'evaluate' is missing"):
        search.run(file, tmp_path / "none", threads=1)
    assert not (tmp_path / "none").exists()
    file["evaluate"] = {"stages": [1, 2]}
    with pytest.raises(FastmergeError, match="'stages' not all candidates cost the same"):
        search.run(file, tmp_path / "none", score=_of_the_head, threads=1)


def test_nothing_that_scores_names_the_argument(models: list[Path], tmp_path: Path) -> None:
    file = file_of(models, budget={"candidates": 3})
    for section in (None, {"limit": 4}):
        file["evaluate"] = section
        with pytest.raises(FastmergeError, match=r"pass score=, a function"):
            search.run(file, tmp_path / "none", threads=1)
        with command_line(), pytest.raises(FastmergeError) as caught:
            search.run(file, tmp_path / "none", threads=1)
        assert "score=" not in str(caught.value)


def test_a_second_run_in_one_folder_is_refused(models: list[Path], tmp_path: Path) -> None:
    """Another process, which is killed then."""
    out = tmp_path / "out"
    told(models, out, budget={"candidates": 3})
    gc.collect()  # nobody has its study any more
    assert not (out / LOCK_FILE).exists()
    with _other_process_in(out):
        for resume in (True, False):
            with pytest.raises(FastmergeError, match=f"^{out}: another run is at work in it now"):
                search.open_study(file_of(models), out, threads=1, resume=resume)
    assert (out / LOCK_FILE).exists()  # a kill takes the lock, not the file
    study = search.open_study(file_of(models), out, threads=1, resume=True)
    study.close()
    assert not (out / LOCK_FILE).exists()


@pytest.mark.parametrize("kind", ["walk", "sweep"])
def test_walks_and_sweeps_have_their_folder_to_themselves(
    models: list[Path], tmp_path: Path, kind: str
) -> None:
    out, (base, other, _) = tmp_path / "out", map(str, models)
    step = {"degrade": {"partner": Path(other).name, "method": "slerp", "t": 0.3}}
    schedule = {"baseline": base, "pool": [other], "schedule": {"steps": [step]}, "seed": 1}
    recipe = f"merge_method: slerp\nbase_model: {base}\nmodels: [{{model: {other}}}]\n"
    recipe += "parameters: {t: 0.5}\n"

    def run(resume: bool) -> None:
        if kind == "walk":
            retrograde.run(schedule, out, score=_of_the_head, threads=1, resume=resume)
        else:
            sweep(recipe, out, [0.2, 0.4], score=_of_the_head, threads=1, resume=resume)

    run(False)
    with _other_process_in(out), pytest.raises(FastmergeError, match="another run is at work"):
        run(True)
    run(True)
    assert not (out / LOCK_FILE).exists()


@contextmanager
def _other_process_in(out: Path) -> Iterator[None]:
    text = (
        "import sys, time, pathlib; from fastmerge.search.folder import Hold\n"
        "hold = Hold(pathlib.Path(sys.argv[1])); print('holds', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", text, str(out)], stdout=subprocess.PIPE, cwd=REPOSITORY
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"holds\n"
        try:
            yield
        finally:
            other.kill()
            other.wait()
