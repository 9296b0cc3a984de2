"""What runs say to a newcomer: what beat what, which file goes where, what is missing."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from fastmerge import extras, retrograde, search
from fastmerge.cli import main
from fastmerge.errors import FastmergeError, ResourceError
from fastmerge.evaluation.settings import load_evaluate
from fastmerge.retrograde.findings import compare_lines, copy_text, finding
from fastmerge.retrograde.report import markdown
from fastmerge.retrograde.runner import describe
from fastmerge.search import figures
from fastmerge.search.sweep import sweep
from tests.test_search_study import file_of, likelihood, models

__all__ = ["models"]  # the fixture


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "path", [*sys.path])  # a callable's folder is added


@pytest.fixture(scope="module")
def schedule(shared_zoo: Any) -> dict[str, Any]:
    base = shared_zoo.base("found0", dtype="F32")
    pool = [shared_zoo.tune(base, f"found{i}", seed=i, dtype="F32", size=0.05) for i in (1, 2)]
    return {
        "baseline": str(base),
        "pool": [{"model": str(path), "accuracy": 40.0 + i} for i, path in enumerate(pool)],
        "base_model": str(base),
        "schedule": {"steps": [{"degrade": {"partner": "weakest", "method": "slerp", "t": 0.3}}]},
        "accept": {"rule": "improve", "judge": "step"},
        "seed": 1,
    }


def test_a_walk_that_lost_says_which_merges_did_not(schedule: Any, tmp_path: Path) -> None:
    """The first candidate scores less than the baseline; a one-shot merge more."""
    values = iter([50.0, 40.0, 41.0, 30.0])  # the models, the step; then what it is compared with

    def score(model: Any) -> float:  # noqa: ARG001
        return next(values, 60.0)

    own = {**schedule, "compare": ["best_single", "linear", "slerp"]}
    result = retrograde.run(own, tmp_path / "run", score=score, threads=1)
    lines = compare_lines(result)
    said = copy_text(result.trajectory, lines)
    assert said == (
        "No state of the walk beat the baseline: the model written is a copy of found0. Of 3 "
        "one-shot merges 2 scored higher on the steering items, the best linear (60.00 %)."
    )
    sentences = finding(lines)
    assert len(sentences) == len(lines) - 1 == 4
    assert sentences[0].startswith("- against the best linear: -10.00 points")
    text = markdown(result, lines, [])
    assert said.replace("_", "\\_") in text.replace("\\.", ".") and "Nothing beat" not in text
    assert "`one_shot`" not in text  # no such row: the walk did not move
    assert text.count("steering, %") == 1


def test_a_walk_that_moved_explains_its_one_shot_row(schedule: Any, tmp_path: Path) -> None:
    own = {**schedule, "compare": ["linear"], "accept": "always"}

    def score(model: Any, split: str) -> dict[str, list[float]]:  # noqa: ARG001
        return {"task": [float(model.lm_head.weight.double().norm())] * 20}

    result = retrograde.run(own, tmp_path / "run", score=score, threads=1)
    lines = compare_lines(result)
    text = markdown(result, lines, [])
    assert copy_text(result.trajectory, lines) == "" and "`one_shot` is the one merge" in text
    assert "| steering, % | hold-out, % [95 % interval] |" in text


def test_given_accuracies_do_not_stand_in_for_scores(schedule: Any, tmp_path: Path) -> None:
    said = (
        "step 1: every pool model scores NaN, so none is the weakest; given accuracies count only "
        "where nothing is measured"
    )
    with pytest.raises(FastmergeError, match=said):
        retrograde.run(schedule, tmp_path / "run", score=lambda model: math.nan, threads=1)


def test_a_walk_scored_from_python_needs_no_section(schedule: Any, tmp_path: Path) -> None:
    assert "evaluate" not in schedule
    result = retrograde.run(schedule, tmp_path / "run", score=_norm, threads=1)
    report = (tmp_path / "run" / "report.md").read_text().replace("\\", "")
    assert f"Scored by score={__name__}._norm. Steering: _norm." in report
    other = {**schedule, "evaluate": {"every": "end"}}
    again = retrograde.run(other, tmp_path / "other", score=_norm, threads=1)
    assert again.trajectory.evaluator == result.trajectory.evaluator
    with pytest.raises(FastmergeError, match="'accept: improve' needs scores"):
        retrograde.run(schedule, tmp_path / "none", threads=1)


def _norm(model: Any) -> float:
    return float(model.lm_head.weight.double().norm())


def test_a_module_that_is_not_there_is_named(
    schedule: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fm_measure.py").write_text("import fm_nowhere\ndef score(model): return 1.0\n")
    own = {**schedule, "evaluate": {"callable": "fm_meassure:score"}}
    said = r"no module 'fm_meassure' is installed, and no fm_meassure.py lies beside the file "
    said += r"that names it; did you mean 'fm_measure'\?$"
    with pytest.raises(FastmergeError, match=said):
        retrograde.run(own, tmp_path / "run", threads=1)
    own["evaluate"] = {"callable": "fm_measure:score"}
    with pytest.raises(FastmergeError, match=r"fm_measure\.py:1: ModuleNotFoundError: .*fm_nowh"):
        retrograde.run(own, tmp_path / "run", threads=1)


FILES = {
    "recipe": "base_model: a\nparameters: {t: 0.5}\nmerge_method: slerp\nmodels: [{model: b}]\n",
    "schedule": (
        "stop: {patience: 2}\nbaseline: a\npool: [b]\n"
        "schedule: {steps: [{degrade: {partner: b, method: slerp, t: 0.5}}]}\n"
    ),
    "search": (
        "seed: 1\nspace: {merge_method: linear}\noptimiser: random\nbudget: 5\n"
        "evaluate: {callable: 'a:b'}\n"
    ),
    "mixture": "base_model: a\nexperts: [{source_model: b, positive_prompts: [c]}]\n",
    "section": "limit: 3\ncallable: 'a:b'\n",
}
COMMANDS = {
    "recipe": ("merge", "plan", "sweep", "moe"),
    "schedule": ("retrograde",),
    "search": ("search",),
}
SAID = {
    "recipe": "this is a recipe; run `fastmerge merge`",
    "schedule": "this is a schedule; run `fastmerge retrograde`",
    "search": "this is a search; run `fastmerge search`",
    "mixture": "this is a mixture of experts; run `fastmerge moe`",
    "section": "put it under 'evaluate:'",
}
PAIRS = [
    (command, given)
    for own, commands in COMMANDS.items()
    for command in commands
    for given in FILES
    if given != own and not (own == "recipe" and given in ("mixture", "section"))
]


@pytest.mark.parametrize("command, given", PAIRS)
def test_a_file_of_another_kind_is_told_its_command(
    command: str, given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{given}.yml"
    path.write_text(FILES[given])
    words = [command, str(path)] + ([] if command == "plan" else [str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and SAID[given] in said and said.count("\n") == 1, said
    assert said.startswith(f"error: {given}.yml:")


def test_a_schedule_is_no_evaluate_section(zoo: Any, tmp_path: Path) -> None:
    base, other = zoo.base("a"), zoo.base("b", seed=2)
    recipe = f"merge_method: slerp\nbase_model: {base}\nmodels: [{{model: {other}}}]\n"
    recipe += "parameters: {t: 0.5}\n"
    path = tmp_path / "schedule.yml"
    path.write_text(FILES["schedule"])
    with pytest.raises(FastmergeError, match=r"^schedule.yml:2: 'baseline' .* give those keys al"):
        sweep(recipe, tmp_path / "out", [0.5], evaluate=path)


def test_all_that_a_run_misses_is_one_line(
    schedule: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for section, said in {
        "callable: a:b": r"matplotlib, scores need torch; install them with: .*\[llama,plot\]'$",
        "perplexity: a.txt": r"scores need torch and transformers; .*\[llama,plot\]'$",
        "tasks: [a]": r"need torch and transformers and lm_eval; .*\[eval,llama,plot\]'$",
    }.items():
        key, value = section.split(": ")
        own = {**schedule, "evaluate": {key: [value[1:-1]] if value[0] == "[" else value}}
        with pytest.raises(FastmergeError, match=said):
            retrograde.run(own, tmp_path / "run", threads=1)
    monkeypatch.setattr(extras, "find_spec", lambda n: n if n == "matplotlib" else None)
    libraries = load_evaluate({"callable": "a:b"}).libraries
    with pytest.raises(FastmergeError, match=r"^scores need torch; install it with: .*\[llama\]'"):
        figures.require(*libraries)
    assert not (tmp_path / "run").exists()


def test_what_a_run_measures_at_most_is_said_in_parts(schedule: Any, tmp_path: Path) -> None:
    (tmp_path / "fm_parts.py").write_text("def score(model):\n    return 1.0\n")
    own = {**schedule, "evaluate": {"callable": "fm_parts:score"}, "compare": ["linear", "ties"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        found = describe(own)["measurements"]
    assert found["of"] == {
        "the models": 3, "the walk": 1, "its one-shot equivalent": 1, "the families": 2,
        "rows with other masks": 10,
    }  # fmt: skip
    assert found["at most"] == sum(found["of"].values())


def _search(schedule: Any, **keys: Any) -> dict[str, Any]:
    models = [
        {"model": entry["model"], "parameters": {"weight": "0..1"}} for entry in schedule["pool"]
    ]
    space = {"merge_method": "linear", "models": models}
    return {"space": space, "optimiser": "random", "seed": 1, **keys}


def test_a_candidate_beyond_the_budget_is_refused(schedule: Any, tmp_path: Path) -> None:
    file = _search(schedule, budget={"items": 1})
    said = "budget.items: one candidate takes 2 items, more than the budget of 1"
    with pytest.raises(FastmergeError, match=said):
        search.run(file, tmp_path / "run", score=lambda model: {"task": [1.0, 2.0]}, threads=1)
    file["budget"] = {"items": 2}
    found = search.run(
        file, tmp_path / "run", score=lambda model: {"task": [1.0, 2.0]}, threads=1, resume=True
    )
    assert (found.study.spent, len(found.study.trials)) == (2, 1)


def test_the_folder_of_another_command_s_run_says_what_it_holds(
    models: list[Path], tmp_path: Path
) -> None:
    searched, walked = tmp_path / "searched", tmp_path / "walked"
    small = file_of(models, budget={"candidates": 1})
    search.run(small, searched, score=likelihood, threads=1)
    base, *tuned = map(str, models)
    step = {"partner": "next", "method": "slerp", "t": 0.3}
    back = {"toward": "baseline", "method": "slerp", "t": 0.3}
    schedule = {
        "baseline": {"model": base, "accuracy": 50.0}, "pool": tuned,
        "schedule": {"cycles": 1, "degrade": step, "retrace": back},
    }  # fmt: skip
    retrograde.run(schedule, walked, evaluate=False, threads=1)
    for resume in (False, True):
        said = (
            "holds a schedule's run, not a search; .* go on with it by `fastmerge retrograde` and"
        )
        with pytest.raises(FastmergeError, match=f"walked: {said}"):
            search.run(small, walked, resume=resume, score=likelihood, threads=1)
        said = (
            "holds a search, not a schedule's run; .* go on with it by `fastmerge search` and its"
        )
        with pytest.raises(FastmergeError, match=f"searched: {said}"):
            retrograde.run(schedule, searched, evaluate=False, resume=resume, threads=1)


def test_all_that_a_search_misses_is_one_line(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    file = file_of(models, optimiser="cma")
    said = (
        r"^plots need matplotlib, the optimiser needs cma, scores need torch, the cluster needs "
        r"ray; install them with: .*\[llama,plot,ray,search\]'$"
    )
    for call in (search.run, search.describe):
        where = () if call is search.describe else (tmp_path / "out",)
        with pytest.raises(ResourceError, match=said):
            call(file, *where, cluster="auto")
    assert not (tmp_path / "out").exists()
