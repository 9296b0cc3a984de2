"""What runs and sweeps say: while they measure, of what they found, of what stands in the way."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmerge.cli.retrograde import Measured
from fastmerge.errors import FastmergeError
from fastmerge.evaluation.callables import scores_of
from fastmerge.evaluation.scores import Scores, TaskScore
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.retrograde import run
from fastmerge.retrograde.runner import describe
from fastmerge.retrograde.words import figure
from fastmerge.search.figures import by_layer
from fastmerge.search.lab import Measurement
from fastmerge.search.sweep import Outlook, sweep
from tests.test_retrograde_run import invoke

DOCS = Path(__file__).parent.parent / "docs" / "schedules.md"


@pytest.fixture
def schedule(zoo: Any, tmp_path: Path) -> dict[str, Any]:
    zoo.tune(zoo.base("m0"), "m1", seed=1, size=0.05)
    return {
        "baseline": str(tmp_path / "m0"),
        "pool": [{"model": str(tmp_path / "m1"), "name": "dolphin"}],
        "seed": 1,
        "schedule": {
            "cycles": 1,
            "degrade": {"partner": "next", "method": "slerp", "t": 0.4},
            "retrace": {"toward": "baseline", "method": "linear", "t": 0.3},
        },
        "evaluate": {"callable": "own:score"},
    }


def falling() -> Callable[[Any], float]:
    """Scores that fall from call to call."""
    scores = iter(range(90, 0, -1))
    return lambda model: float(next(scores))


def report_of(folder: Path) -> str:
    return (folder / "report.md").read_text()


def test_a_callable_returns_a_number_as_the_documentation_s_does(
    schedule: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fence = r'```python title="measure.py"\n(def score.*?)```'
    (example,) = re.findall(fence, DOCS.read_text(), re.DOTALL)
    (tmp_path / "measure.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    schedule["evaluate"] = {"callable": "measure:score"}
    result = run(schedule, tmp_path / "out", threads=1)
    (name,) = result.trajectory.models[0].tasks
    assert name == "score" and 0 < result.trajectory.models[0].value < 100


@pytest.mark.parametrize("answer", [7, 7.0, np.float32(7), np.array(7.0), Fraction(7)], ids=repr)
def test_any_number_is_a_score(schedule: dict[str, Any], tmp_path: Path, answer: Any) -> None:
    result = run(schedule, tmp_path / "out", threads=1, score=lambda model: answer)
    assert result.trajectory.state.baseline_score == 7.0


def test_tensors_of_any_type_are_numbers() -> None:
    import torch

    half = torch.tensor(7, dtype=torch.bfloat16)
    for one in (half, torch.tensor(7.0, requires_grad=True)):
        assert scores_of(one, "own").value == 7.0
        for items in ([one, 9.0], torch.stack([one, one + 2])):
            assert scores_of({"a": items}, "own").tasks["a"].items == {"a": (7.0, 9.0)}


def test_an_infinite_score_is_none() -> None:
    for answer in (math.inf, {"a": -math.inf}, {"a": [1.0, math.inf]}, {"a": [math.nan, 1]}):
        assert math.isnan(scores_of(answer, "own").value)
    assert math.isnan(Scores({"a": TaskScore(math.inf, "score", 1)}).value)
    for answer in (1e16, {"a": [1.0, -1e17]}, 10**400):
        with pytest.raises(
            FastmergeError, match=r"^own: the score of 'a|^own: the score of 'score"
        ):
            scores_of(answer, "own")


def test_a_walk_whose_scores_are_none_says_so(schedule: dict[str, Any], tmp_path: Path) -> None:
    schedule |= {"accept": "improve", "keep": "best"}
    run(schedule, tmp_path / "out", threads=1, score=lambda model: math.nan)
    said = "No state's score is a number: the model written is a copy of m0."
    assert f"**{said}**" in report_of(tmp_path / "out")


@pytest.mark.parametrize("answer", [None, "7", [7.0], {}], ids=repr)
def test_what_is_no_number_is_not(schedule: dict[str, Any], tmp_path: Path, answer: Any) -> None:
    with pytest.raises(FastmergeError, match=r"must return a dict of .* or one number, not"):
        run(schedule, tmp_path / "out", threads=1, score=lambda model: answer)


def test_every_measurement_is_told_before_and_after(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    told: list[Any] = []
    schedule["compare"] = ["linear"]
    run(schedule, tmp_path / "out", threads=1, score=falling(), on_score=told.append)
    before, after = told[::2], told[1::2]
    assert [m.what for m in before[:4]] == ["m0", "dolphin", "step 1", "step 2"]
    assert {m.what for m in before[4:]} == {"the walk's one-shot equivalent", "linear"}
    assert [m.number for m in before] == list(range(1, len(before) + 1))
    assert all(m.seconds is None for m in before) and all(m.seconds >= 0 for m in after)
    bare = schedule | {"evaluate": None, "compare": None}
    assert describe(bare)["measurements"] is None
    assert {m.most for m in before} == {2 + 2 + 1 + 2 + 0 + 4 * 2}
    assert len(before) == 2 + 2 + 1 + 2


def test_the_terminal_says_what_is_measured(schedule: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def score(model):\n    return 5.0\n")
    (tmp_path / "walk.json").write_text(json.dumps(schedule))
    walk = str(tmp_path / "walk.json")
    done = invoke("retrograde", walk, str(tmp_path / "out"), "--dry-run")
    assert re.search(r"measurements in all, at most +\d+\n", done.output), done.output
    assert re.search(r"time for them +shows after the first\n", done.output)
    done = invoke("retrograde", walk, str(tmp_path / "out"))
    assert "measuring m0: 1 of at most " in done.output
    quiet = invoke("retrograde", walk, str(tmp_path / "quiet"), "--quiet")
    assert quiet.output == ""


def test_a_run_without_a_result_does_not_block_its_repetition(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    def broken(_: Any) -> float:
        raise ValueError("not yet")

    del schedule["seed"]
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(FastmergeError, match="not yet"):
            run(schedule, out, threads=1, score=broken)
    seed = json.loads((out / "run.json").read_text())["seed"]
    schedule["schedule"]["cycles"] = 2  # mended: another schedule
    with pytest.raises(FastmergeError, match="not yet"):
        run(schedule, out, threads=1, score=broken)
    assert json.loads((out / "run.json").read_text())["seed"] != seed
    assert len(run(schedule, out, threads=1, score=falling()).trajectory.states) == 5
    with pytest.raises(FastmergeError, match="holds a run already"):  # which has results
        run(schedule, out, threads=1, score=falling())


def test_a_stranger_s_file_beside_the_beginning_of_a_run_stays(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(FastmergeError):
        run(schedule, out, threads=1, score=lambda model: None)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FastmergeError, match="holds a run already"):
        run(schedule, out, threads=1, score=falling())


def test_the_report_says_that_nothing_beat_the_baseline(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    schedule |= {"accept": "improve", "keep": "best"}
    run(schedule, tmp_path / "none", threads=1, score=falling())
    said = "Nothing beat the baseline: the model written is a copy of m0."
    assert f"**{said}**" in report_of(tmp_path / "none")
    rising = iter(range(1, 90))
    run(schedule, tmp_path / "some", threads=1, score=lambda model: float(next(rising)))
    assert "Nothing beat" not in report_of(tmp_path / "some")


def test_rows_name_models(schedule: dict[str, Any], tmp_path: Path) -> None:
    families = ["best_single", "linear", "slerp", "ties", "greedy_soup", "line_search"]
    schedule |= {"compare": {"methods": families, "seeds": 1}}
    run(schedule, tmp_path / "out", threads=1, score=falling())
    table = report_of(tmp_path / "out").partition("## Comparison")[2].partition("## Setup")[0]
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ")[1] for row in table.splitlines()
            if row.startswith("| ")}  # fmt: skip
    for name in set(families) - {"line_search"}:
        found = rows[name.replace("_", r"\_")] if name not in rows else rows[name]
        assert "m0" in found or "dolphin" in found, found
        assert not re.search(r"models? \d|weights", found), found
    assert "toward dolphin" in next(how for name, how in rows.items() if "search" in name)


def test_no_zero_has_a_minus() -> None:
    assert [figure(-0.0), figure(-1e-9, 4), figure(-0.004, sign="+")] == ["0.00", "0.0000", "+0.00"]
    assert [figure(-0.006), figure(0.5, 1, "+"), figure(None), figure(float("nan"))] == [
        "-0.01", "+0.5", "-", "-"
    ]  # fmt: skip


def test_axes_show_numbers_as_they_are() -> None:
    from fastmerge.search.figures import new_figure

    figure_, axes = new_figure(4, 3)
    axes.plot([0, 1], [72.10001, 72.10002])
    figure_.canvas.draw()
    assert axes.yaxis.get_offset_text().get_text() == ""


def perplexed(value: float) -> Scores:
    detail = {"perplexity": value}
    return Scores({"text": TaskScore(100 / value, "100/perplexity", 1, None, detail)})


def test_the_best_so_far_is_drawn_from_what_was_measured(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    schedule |= {"compare": {"methods": ["best_single", "linear", "greedy_soup"], "budget": 3}}
    out = tmp_path / "out"
    result = run(schedule, out, threads=1, score=falling())
    rows = {row.name: row for row in result.rows}
    assert rows["schedule"].history == (88.0, 87.0)  # after the baseline's 90 and the pool's 89
    assert rows["linear"].history == (85.0, 84.0, 83.0)  # 86 is the one-shot
    assert rows["best_single"].history == (90.0,)  # known: not measured again
    written = json.loads((out / "trajectory.json").read_text())["comparison"]
    assert {line["name"]: line["history"] for line in written}["linear"] == [85.0, 84.0, 83.0]
    for name in ("budget.png", "coefficients.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in report_of(out)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and 'src="' + "budget" not in page
    assert "name='viewport'" in page and "@media print" in page


def test_coefficients_are_means_by_layer() -> None:
    names = ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight",
             "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight",
             "model.norm.weight"]  # fmt: skip
    factors = np.array([[0.2, 0.8], [1, 0], [0, 1], [0.5, 0.5], [0.4, 0.6], [1, 0]])
    titles, means = by_layer(names, factors)
    assert titles == ["embed", "0", "1", "head"]
    np.testing.assert_allclose(means, [[1, 0], [0.5, 0.5], [0.3, 0.7], [0.5, 0.5]])


class Perplexed:
    """A scorer by perplexity, which rises."""

    key = version = "perplexed"

    def __init__(self, *_: Any) -> None:
        self._values = iter(np.arange(8.5, 90))

    def has(self, split: str) -> bool:
        return split == "steer"

    def score(self, *_: Any) -> Scores:
        return perplexed(float(next(self._values)))


def test_perplexity_is_shown_as_perplexity(
    schedule: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmerge.evaluation import scorers

    monkeypatch.setitem(scorers._MAKERS, "perplexity", Perplexed)
    schedule["evaluate"] = {"perplexity": "text.txt"}
    result = run(schedule, tmp_path / "out", threads=1)
    text = report_of(tmp_path / "out")
    assert "| method | perplexity | verdict |" in text
    assert "| 0 | baseline |  | m0 |  | 8.50 |" in text and "| 10.50 | taken |" in text
    assert "a perplexity of 11.50" in text and "| model | given, % | perplexity |" in text
    assert result.trajectory.state.baseline_score == pytest.approx(100 / 8.5)  # steers as before


def test_pictures_say_when_a_perplexity_is_what_they_show() -> None:
    from fastmerge.search.figures import score_axis

    assert score_axis(perplexed(8.5)) == "steering 100 / perplexity"
    assert score_axis(Scores({"a": TaskScore(50.0, "acc", 2)}), "hold-out") == "hold-out score"


# --- sweeps ---


RECIPE = """\
merge_method: slerp
base_model: {0}/m0
models: [{{model: {0}/m0}}, {{model: {0}/m1}}]
parameters: {{t: 0.5}}
"""


@pytest.fixture
def recipe(zoo: Any, tmp_path: Path) -> Path:
    zoo.tune(zoo.base("m0"), "m1", seed=1, size=0.05)
    (tmp_path / "slerp.yml").write_text(RECIPE.format(tmp_path))
    (tmp_path / "evaluate.yml").write_text("callable: rising:score\n")
    (tmp_path / "rising.py").write_text("def score(model):\n    return 5.0\n")
    return tmp_path / "slerp.yml"


def swept(recipe: Path, out: Path, scores: list[float], **options: Any) -> Mapping[str, Any]:
    values = iter(scores)
    told: list[Outlook] = []
    sweep(
        recipe, out, [0.0, 0.25, 0.5], evaluate={"callable": "own:score"}, threads=1,
        score=lambda model: next(values), on_start=told.append, **options,
    )  # fmt: skip
    table = json.loads((out / "sweep.json").read_text())
    return {"table": table, "told": told[0], "models": {p.name for p in out.iterdir()}}


def test_a_scored_sweep_writes_the_best_and_says_so_first(recipe: Path, zoo: Any) -> None:
    from fastmerge import api

    out = recipe.parent / "out"
    one = api.plan(recipe).bytes_out
    found = swept(recipe, out, [1.0, 3.0, float("nan")])
    assert found["told"] == Outlook(scored=3, written=1, nbytes=one)
    assert found["models"] == {"sweep.json", "sweep.png", "best"}
    assert found["table"]["best"] == {"t": 0.25, "model": "best"}
    sweep(recipe, recipe.parent / "alone", [0.25], threads=1)
    best, alone = (zoo.read(recipe.parent / name) for name in ("out/best", "alone/t=0.25"))
    assert all((best[name] == alone[name]).all() for name in alone)
    every = swept(recipe, recipe.parent / "all", [1.0, 3.0, 2.0], write="all")
    assert every["told"] == Outlook(scored=3, written=3, nbytes=3 * one)
    assert {"t=0", "t=0.25", "t=0.5"} < every["models"] and "best" not in every["models"]
    assert [point["score"] for point in every["table"]["points"]] == [1.0, 3.0, 2.0]
    none = swept(recipe, recipe.parent / "none", [1.0, 3.0, 2.0], write="none")
    assert none["told"] == Outlook(3, 0, 0) and none["models"] == {"sweep.json", "sweep.png"}


def test_a_sweep_needs_room_for_all_its_models(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmerge import api
    from fastmerge.search import sweep as module

    room = 2 * api.plan(recipe).bytes_out

    def check(folder: Path, needed: int) -> None:
        assert folder.is_dir() and folder.is_relative_to(recipe.parent)
        if needed > room:
            raise FastmergeError(f"no space left: needs {needed}")

    monkeypatch.setattr(module, "check_space", check)
    with pytest.raises(FastmergeError, match="no space left"):
        sweep(recipe, recipe.parent / "out", [0.0, 0.5, 1.0], threads=1)
    assert not (recipe.parent / "out").exists()
    sweep(recipe, recipe.parent / "out", [0.0, 0.5], threads=1)
    sweep(recipe, recipe.parent / "out", [0.0, 0.5, 1.0], threads=1, resume=True)  # one more


def test_the_sweep_command_says_what_it_will_write(recipe: Path) -> None:
    arguments = ["sweep", str(recipe), str(recipe.parent / "out"), "--t", "0,0.5"]
    done = invoke(*arguments, "--evaluate", str(recipe.parent / "evaluate.yml"))
    assert done.exit_code == 0, done.output
    assert re.match(r"scores 2 values of t; writes 1 model, [\d.]+ [KM]B, in ", done.output)
    assert f"the model at t = 0: {recipe.parent / 'out' / 'best'}" in done.output
    refused = invoke(*arguments[:2], str(recipe.parent / "b"), "--write", "best")
    assert refused.exit_code == 2 and "'best' needs scores" in refused.output


def test_a_sweep_that_failed_before_a_score_does_not_block_itself(recipe: Path) -> None:
    out = recipe.parent / "out"
    with pytest.raises(FastmergeError, match="must return"):
        swept(recipe, out, [None])  # type: ignore[list-item]
    assert [path.name for path in out.iterdir()] == ["sweep.json"]
    assert swept(recipe, out, [1.0, 3.0, 2.0])["table"]["best"]["t"] == 0.25


def test_a_run_over_adapters_of_a_base_that_takes_no_part(zoo: Any, tmp_path: Path) -> None:
    """Three models of four folders: coefficients and fingerprints are the models'."""
    base = zoo.base("base", layers=1)
    first, *pool = [f"{base}+{zoo.adapter(name, base, seed=ord(name))}" for name in "abc"]
    schedule = {
        "baseline": {"model": first, "accuracy": 50.0},
        "pool": pool[:1],
        "seed": 11,
        "schedule": {
            "cycles": 1,
            "degrade": {"partner": "next", "method": "slerp", "t": 0.3},
            "retrace": {"toward": "baseline", "method": "slerp", "t": 0.4},
        },
        "evaluate": {"callable": "stand:in"},
    }
    result = run(schedule, tmp_path / "two", score=lambda model: 50.0, threads=1)
    written = json.loads((tmp_path / "two" / "trajectory.json").read_text())
    assert result.space.count == len(written["models"]) == 2
    assert len({model["fingerprint"] for model in written["models"]}) == 2
    for kept in written["steps"][0]["coefficients"].values():
        assert len(kept) == 2 and sum(kept) == pytest.approx(1.0, abs=0.2)
    schedule["pool"] = [str(base), *pool]
    result = run(schedule, tmp_path / "four", score=lambda model: 50.0, threads=1)
    models = json.loads((tmp_path / "four" / "trajectory.json").read_text())["models"]
    assert models[1]["fingerprint"] == Checkpoint.open(base).fingerprint
    assert len({model["fingerprint"] for model in models}) == 4


# --- a type that the machine has no products of ---


@pytest.fixture
def without_products(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


SLOW = "this CPU has no fast products of bfloat16 (torch finds AVX2): 'dtype: float32' takes"


@pytest.mark.usefixtures("without_products")
def test_a_run_says_that_its_type_is_slow_here(
    schedule: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule["evaluate"]["dtype"] = "bfloat16"
    told: list[str] = []
    run(schedule, tmp_path / "out", score=falling(), on_note=told.append)
    assert len(told) == 1 and SLOW in told[0] and "dtype" in told[0].split(":")[0]
    (tmp_path / "own.py").write_text("def score(model): return 1.0")
    monkeypatch.syspath_prepend(tmp_path)
    assert SLOW in "\n".join(describe(schedule)["notes"])
    schedule["evaluate"]["dtype"] = "float32"
    run(schedule, tmp_path / "again", score=falling(), on_note=told.append)
    assert len(told) == 1


@pytest.mark.usefixtures("without_products")
def test_a_sweep_says_that_its_type_is_slow_here(schedule: dict[str, Any], tmp_path: Path) -> None:
    base, tune = schedule["baseline"], schedule["pool"][0]["model"]
    recipe = {
        "merge_method": "slerp",
        "base_model": base,
        "parameters": {"t": 0.5},
        "models": [{"model": base}, {"model": tune}],
    }
    told: list[Outlook] = []
    sweep(
        recipe, tmp_path / "swept", [0.5], evaluate={"callable": "x:y", "dtype": "bfloat16"},
        score=lambda model: 1.0, on_start=told.append,
    )  # fmt: skip
    assert any(SLOW in note for note in told[0].notes)


def test_what_is_left_is_not_told_by_the_first_measurement_which_imports_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 100, 10))
    monkeypatch.setattr("fastmerge.cli.retrograde.time.monotonic", lambda: float(next(clock)))
    tell = Measured(quiet=False, begin=lambda: None)
    for number, seconds in ((1, 20.0), (2, 1.0), (3, 1.0)):
        begun = Measurement("owl", "steer", number, 10)
        tell(begun)
        tell(replace(begun, seconds=seconds))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "measuring owl: 1 of at most 10",
        "measuring owl: 2 of at most 10, at most about 3:00 left",
        "measuring owl: 3 of at most 10, at most 8.0 s left",
    ]
