"""Schedule files: what they mean, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmerge.errors import FastmergeError
from fastmerge.recipe.settings import affine
from fastmerge.retrograde.schedule import Schedule, load

TEXT = """\
baseline: {model: ./blur, accuracy: 72.1}
pool:
  - {model: ./dolphin, accuracy: 46.0}
  - ./owl
schedule:
  cycles: 3
  degrade: {partner: weakest, method: slerp, t: 0.35}
  retrace: {toward: baseline, method: ties, t: [0.1, 0.6], density: 0.5}
accept: always
evaluate: {every: step,
  tasks: [add, {name: rev, items: "0:10"}], holdout: [{name: rev, items: "10:"}]}
compare: [best_single, linear, slerp]
"""


def test_the_example_of_the_design_reads_as_written(tmp_path: Path) -> None:
    path = tmp_path / "walk.yml"
    path.write_text(TEXT)
    schedule = load(path)
    assert [step.kind for step in schedule.steps] == ["degrade", "retrace"] * 3
    assert schedule.labels == ["blur", "dolphin", "owl"]
    assert schedule.references == ["./blur", "./dolphin", "./owl"]
    assert schedule.baseline.accuracy == 72.1
    assert schedule.folder == tmp_path
    assert schedule.text == TEXT
    assert schedule.evaluate is not None and schedule.evaluate.tasks[1].span == (0, 10)
    assert schedule.evaluate.holdout[0].key == "rev[10:]"
    step = schedule.steps[1]
    assert step.t is not None and step.t.rules[0].values == (0.1, 0.6)
    assert schedule.base_of(step) == "state"
    assert schedule.base_of(schedule.steps[0]) is None


def test_explicit_steps_filters_and_step_targets() -> None:
    schedule = load(
        {
            "baseline": "a",
            "pool": ["b"],
            "base_model": "c",
            "schedule": {
                "steps": [
                    {"degrade": {"partner": "b", "method": "dare_ties", "t": 0.3, "density": 0.7}},
                    {
                        "retrace": {
                            "toward": {"step": 0},
                            "method": "linear",
                            "t": [{"filter": "mlp", "value": [0.1, 0.2]}, {"value": 0.5}],
                        }
                    },
                ]
            },
        }
    )
    first, second = schedule.steps
    assert schedule.base_of(first) == "base_model" and schedule.model_index("base_model") == 2
    assert second.target_step == 0
    assert second.t is not None
    away = affine(second.t, -1.0, 1.0)
    assert [rule.values for rule in away.rules] == [(0.9, 0.8), (0.5,)]
    assert [rule.filter for rule in away.rules] == ["mlp", None]


def test_the_base_may_be_one_of_the_models() -> None:
    moves = {"steps": [{"degrade": {"partner": "b", "method": "ties", "t": 0.3}}]}
    for base, number in (("a", 0), ("b", 1), ("c", 2)):
        schedule = load({"baseline": "a", "pool": ["b"], "base_model": base, "schedule": moves})
        assert schedule.model_index("base_model") == number
        assert len(schedule.references) == len(schedule.labels) == max(2, number + 1)


MISTAKES = {
    "partner": ("weakest", "weakesst", "7: unknown partner 'weakesst'; did you mean 'weakest'?"),
    "key": ("cycles: 3", "cycels: 3", "6: unknown key 'cycels'; did you mean 'cycles'?"),
    "no-cycle": ("cycles: 3", "cycles: 0", "6: 'cycles' must be greater than or equal to 1"),
    "t-text": ("t: 0.35", "t: high", "7: 't' must be a number, not 'high'"),
    "no-t": (", t: 0.35", "", "7: slerp needs 't', the fraction of the way"),
    "parameter": ("density", "densty", "8: unknown key 'densty' for a ties step; did you mean"),
    "bounds": ("density: 0.5", "density: 1.5", "8: 'density' must be in [0, 1], not 1.5"),
    "weight": ("density: 0.5", "weight: 0.5", "8: 'weight' of a step follows from 't'"),
    "lambda": ("density: 0.5", "lambda: 0.5", "8: with base 'state', t is the factor"),
    "method": ("method: ties", "method: tiess", "8: unknown method 'tiess'; did you mean 'ties'?"),
    "one-model": ("method: slerp", "method: passthrough", "7: 'passthrough' takes one model"),
    "own-ratio": ("method: slerp", "method: karcher", "7: karcher computes its own ratio"),
    "moving-stock": (
        "method: slerp, t: 0.35",
        "method: model_stock",
        "7: model_stock needs a base other than the state: give 'base_model'",
    ),
    "base": ("density: 0.5", "base: ./blurr", "8: unknown base './blurr'; did you mean"),
    "no-base": ("t: 0.35", "t: 0.35, base: state", "7: slerp takes no base: remove it"),
    "accept": ("always", "alway", "9: 'rule' must be 'always', 'improve' or 'anneal'"),
    "future": ("toward: baseline", "toward: {step: 9}", "8: step 2 cannot go back to step 9"),
    "toward": ("toward: baseline", "toward: bset", "8: unknown ancestor 'bset'; did you mean"),
    "overlap": ('items: "10:"', 'items: "9:"', "11: 'rev[9:]' is both a steering task and"),
    "items": ('items: "0:10"', 'items: "5:5"', "11: 'items' 5:5 holds no document"),
    "two-ways": ("every: step", "perplexity: a.txt", "10: steer by exactly one of"),
    "compare": ("best_single", "best_singel", "12: unknown comparison 'best_singel'; did you mean"),
    "self": ("./dolphin", "./blur", "2: './blur' is the baseline itself"),
    "double": ("./owl", "./deep/dolphin", "2: two models are called 'dolphin': give them a 'name'"),
    "table": ("./owl", "./o|wl", "2: 'o|wl' would break tables: give the model a 'name'"),
    "reserved": ("./owl", "./best", "2: 'best' is a reserved word"),
    "accuracy": ("46.0", "high", "3: 'accuracy' must be a valid number"),
    "to-baseline": ("weakest", "blur", "7: 'blur' is the baseline: retrace goes back to it"),
    "dtype": ("accept: always", "out_dtype: int8", "9: cannot merge in 'int8'"),
}  # fmt: skip


@pytest.mark.parametrize("old, new, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_with_its_place(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert TEXT.count(old) >= 1
    path = tmp_path / "walk.yml"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(FastmergeError) as caught:
        load(path)
    assert str(caught.value).startswith(f"walk.yml:{message}")
    assert "\n" not in str(caught.value)


UNMEASURED = {
    "weakest": ("", "needs every pool model's 'accuracy', or an 'evaluate' section"),
    "improve": ("accept: improve\n", "'accept: improve' needs scores"),
    "best": ("keep: best\n", "'keep: best' needs scores"),
    "patience": ("stop: {patience: 2}\n", "'stop' needs scores"),
    "compare": ("compare: [linear]\n", "'compare' needs scores"),
}


@pytest.mark.parametrize("extra, message", UNMEASURED.values(), ids=UNMEASURED)
def test_what_needs_scores_is_refused_without_them(
    tmp_path: Path, extra: str, message: str
) -> None:
    path = tmp_path / "walk.yml"
    lines = TEXT.splitlines()[:8]  # up to the schedule
    path.write_text("\n".join(lines) + "\n" + extra)
    with pytest.raises(FastmergeError, match=message):
        load(path)


def test_an_empty_pool_is_refused_where_a_step_needs_it() -> None:
    with pytest.raises(FastmergeError, match="the pool is empty"):
        load(
            {
                "baseline": "a",
                "schedule": {
                    "cycles": 1,
                    "degrade": {"partner": "next", "method": "linear", "t": 0.5},
                    "retrace": {"toward": "baseline", "method": "linear", "t": 0.5},
                },
            }
        )


def test_a_schedule_file_holds_one_document(tmp_path: Path) -> None:
    path = tmp_path / "walk.yml"
    path.write_text(TEXT + "---\n" + TEXT)
    with pytest.raises(FastmergeError, match="one document"):
        load(path)


def test_a_schedule_from_a_dict_equals_the_one_from_its_file(tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "walk.yml"
    path.write_text(TEXT)
    from_dict: Schedule = load(yaml.safe_load(TEXT))
    shapes = [
        [(s.kind, s.method, s.t and [r.values for r in s.t.rules]) for s in schedule.steps]
        for schedule in (load(path), from_dict)
    ]
    assert shapes[0] == shapes[1]


def test_the_documented_schedule_is_a_schedule() -> None:
    text = (Path(__file__).parents[1] / "docs" / "schedules.md").read_text()
    schedule = load(text.split('```yaml title="schedule.yml"\n')[1].split("```")[0])
    assert schedule.labels == ["blur", "dolphin", "night-owl", "base_model"]
    assert schedule.keep == "best" and schedule.accept.rule == "improve"


@pytest.mark.parametrize("name", ["base_model", "weakest", "a|b"])
def test_a_baseline_may_not_take_a_word_of_the_schedule(name: str) -> None:
    moves = {"steps": [{"degrade": {"partner": "b", "method": "linear", "t": 0.5}}]}
    with pytest.raises(FastmergeError, match="give the model a 'name'"):
        load({"baseline": {"model": "x", "name": name}, "pool": ["b"], "schedule": moves})
