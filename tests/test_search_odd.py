"""Searches, sweeps and walks over odd models, by odd scorers: what is counted, kept and claimed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastmerge import search
from fastmerge.cli import main
from fastmerge.errors import FastmergeError
from fastmerge.evaluation.callables import _staying
from fastmerge.search.report import lines_for, verdict
from fastmerge.search.sweep import Outlook, sweep
from tests.test_search_study import file_of as study_file


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(shared_zoo: Any) -> list[Path]:
    """A base and a fine-tune of it."""
    base = shared_zoo.base("odd0", layers=1, dtype="F32")
    return [base, shared_zoo.tune(base, "odd1", seed=1, dtype="F32", size=0.05)]


def file_of(models: list[Any], **keys: Any) -> dict[str, Any]:
    return study_file(models, **{"budget": {"candidates": 3}, **keys})


def mean_of(model: Any) -> float:
    return 50 + float(model.model.norm.weight.double().mean())


def test_adapted_models_are_searched_and_each_has_its_fingerprint(
    models: list[Path], zoo: Any, tmp_path: Path
) -> None:
    adapted = f"{models[0]}+{zoo.adapter('lora', models[0])}"
    file = file_of([models[0], adapted])
    found = search.run(file, tmp_path / "out", score=mean_of, threads=1)
    written = json.loads((tmp_path / "out" / "search.json").read_text())
    prints = [model["fingerprint"] for model in written["models"]]
    assert len({*prints}) == 2 == len(found.study.labels)
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(f"`{digest[:16]}`" in text for digest in prints)


@pytest.mark.parametrize("sign", [1, -1])
def test_cma_goes_to_the_end_of_one_range(models: list[Path], tmp_path: Path, sign: int) -> None:
    pytest.importorskip("cma")
    file = file_of(models, optimiser="cma", budget={"candidates": 60})
    study = search.open_study(file, tmp_path / "out", threads=1)
    while (candidate := study.ask()) is not None:
        study.tell(candidate, sign * float(study.point[0]))
    assert study.best.point[0] == pytest.approx(max(sign, 0), abs=0.05)


def items_of(count: int, seen: list[int | None]) -> Any:
    def score(model: Any, limit: int | None = None) -> Mapping[str, Any]:
        seen.append(limit)
        first = mean_of(model)
        return {"a": [first + i for i in range(count)][:limit]}

    return score


def test_the_first_of_a_stage_is_within_the_budget_too(models: list[Path], tmp_path: Path) -> None:
    file = file_of(models, budget={"items": 24}, evaluate={"callable": "a:b", "stages": [8]})
    found = search.run(file, tmp_path / "out", score=items_of(20, []), threads=1)
    assert found.study.spent == 20  # the start; a candidate's first 8 items make 28


def test_a_stage_that_leaves_no_item_out_is_not_measured_again(
    models: list[Path], tmp_path: Path
) -> None:
    file = file_of(models, budget={"items": 60}, evaluate={"callable": "a:b", "stages": [2, 5]})
    seen: list[int | None] = []
    found = search.run(file, tmp_path / "out", score=items_of(5, seen), threads=1)
    study = found.study
    limits = [trial.limit for trial in study.trials]
    assert 5 not in limits and 2 in limits and study.spent == sum(2 if n else 5 for n in limits)


def test_a_start_without_rivals_has_beaten_none(models: list[Path], tmp_path: Path) -> None:
    file = file_of(models, budget={"candidates": 1})
    found = search.run(file, tmp_path / "out", score=mean_of, threads=1)
    said = verdict(found.study, lines_for(found))
    assert said.startswith("No other candidate was scored on all items")


def plain(model: Any, split: str = "steer") -> float:
    return mean_of(model) + (split == "holdout")


def halving(model: Any, split: str = "steer") -> float:
    value = plain(model, split)
    model.half()
    return value


def shortening(model: Any, split: str = "steer") -> float:
    value = plain(model, split)
    model.model.layers = model.model.layers[:0]
    return value


def zeroing(model: Any, split: str = "steer") -> float:
    value = plain(model, split)
    for parameter in model.parameters():
        parameter.data.zero_()
    return value


@pytest.mark.parametrize("score", [halving, shortening, zeroing])
def test_what_a_scorer_does_to_the_model_is_not_the_next_one_s(
    models: list[Path], tmp_path: Path, score: Any
) -> None:
    values = []
    for number, function in enumerate((plain, score)):
        found = search.run(file_of(models), tmp_path / str(number), score=function, threads=1)
        values.append([trial.scores.value for trial in found.study.trials])
        lab, last = found.study.lab, found.study.expression((0.123,))
        values[-1] += [lab.score(last).value, lab.score(last, "holdout").value]
    assert values[0] == values[1]


@pytest.mark.parametrize(
    "answer, said", [(3 + 4j, "complex"), ({"a": [[1.0, None], [2.0, 3.0]]}, "it is None")]
)
def test_no_part_of_an_answer_is_left_out(
    models: list[Path], tmp_path: Path, answer: Any, said: str
) -> None:
    with pytest.raises(FastmergeError, match=f"is no number: .*{said}"):
        search.run(file_of(models), tmp_path / "out", score=lambda _model: answer, threads=1)


def elsewhere(model: Any) -> float:
    os.chdir("/")
    return mean_of(model)


def test_a_folder_that_may_not_be_listed_is_returned_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o311)
    monkeypatch.chdir(tmp_path)
    user = os.geteuid()
    try:
        if user == 0:  # who may list any
            os.seteuid(65534)
        with _staying():
            os.chdir("/")
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)
    assert Path.cwd() == tmp_path


def test_a_scorer_that_goes_elsewhere_leaves_the_run_where_it_is(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    search.run(file_of(models), "out", score=elsewhere, threads=1)
    assert Path.cwd() == tmp_path and (tmp_path / "out" / "model").is_dir()
    assert len((tmp_path / "out" / "journal.jsonl").read_text().splitlines()) > 3


def test_what_a_scorer_prints_is_no_part_of_the_answer(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talks.py").write_text(
        "def score(model):\n    print('measuring')\n    return float(model.model.norm.weight[0])\n"
    )
    file = file_of(models, evaluate={"callable": "talks:score"})
    (tmp_path / "space.yml").write_text(json.dumps(file))
    step = {"degrade": {"partner": "odd1", "method": "linear", "t": 0.5}}
    schedule = {
        "baseline": str(models[0]),
        "pool": [str(models[1])],
        "schedule": {"steps": [step]},
        "evaluate": {"callable": "talks:score"},
    }
    (tmp_path / "walk.yml").write_text(json.dumps(schedule))
    for words in (["search", tmp_path / "space.yml"], ["retrograde", tmp_path / "walk.yml"]):
        with pytest.raises(SystemExit):
            main([*map(str, words), str(tmp_path / str(words[0])), "--json", "--threads", "1"])
        out, err = capsys.readouterr()
        assert json.loads(out)["seed"] is not None and "measuring" in err


# --- sweeps ---


def recipe_of(models: list[Path]) -> dict[str, Any]:
    base, tuned = map(str, models)
    return {
        "merge_method": "slerp",
        "base_model": base,
        "models": [{"model": base}, {"model": tuned}],
        "parameters": {"t": 0.5},
    }


def test_a_sweep_does_not_compare_models_scored_on_other_tasks(
    models: list[Path], tmp_path: Path
) -> None:
    answers = iter([{"easy": 90.0}, {"hard": 10.0}, {"easy": 91.0}])

    def score(_model: Any) -> Any:
        return next(answers)

    said = r"scored one model on .*easy.* and another on .*hard"
    with pytest.raises(FastmergeError, match=said):
        sweep(recipe_of(models), tmp_path / "out", [0.0, 0.5, 1.0], score=score, threads=1)
    assert not (tmp_path / "out" / "best").exists()


def test_a_sweep_without_a_number_says_that_nothing_is_best(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none.py").write_text("def score(model):\n    return float('nan')\n")
    (tmp_path / "evaluate.yml").write_text("callable: none:score\n")
    (tmp_path / "slerp.yml").write_text(json.dumps(recipe_of(models)))
    with pytest.raises(SystemExit):
        main([
            "sweep", str(tmp_path / "slerp.yml"), str(tmp_path / "out"), "--t", "0,0.5",
            "--evaluate", str(tmp_path / "evaluate.yml"), "--threads", "1",
        ])  # fmt: skip
    assert "no score is a number: there is no best model" in capsys.readouterr().out


def test_a_sweep_says_what_it_makes_nothing_of(models: list[Path], tmp_path: Path) -> None:
    told: list[Outlook] = []

    sweep(
        recipe_of(models), tmp_path / "out", [0.0], evaluate={"stages": [4]},
        score=items_of(5, []), threads=1, on_start=told.append,
    )  # fmt: skip
    assert [note.partition(": ")[2] for note in told[0].notes] == [
        "a sweep scores every t on all items"
    ]
