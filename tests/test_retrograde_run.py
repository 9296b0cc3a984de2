"""Whole runs with a cheap scorer: files, resume, comparison, sweep, command line."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fastmerge.errors import FastmergeError
from fastmerge.evaluation.journal import Journal
from fastmerge.retrograde import open_space, run
from fastmerge.retrograde.schedule import load
from fastmerge.search.expressions import Model
from fastmerge.search.families import BASELINES, Pool, candidates
from fastmerge.search.sweep import parse_range

IDS = np.random.default_rng(0).integers(1, 39, (40, 8))


def score(model: Any, split: str = "steer", limit: int | None = None) -> Mapping[str, Any]:
    """Per-item likelihood of random token rows: cheap, and it moves with every weight."""
    import torch

    rows = torch.tensor(IDS[:20] if split == "steer" else IDS[20:])[:limit]
    with torch.no_grad():
        logits = model(input_ids=rows, use_cache=False).logits.log_softmax(-1)
    chosen = logits[:, :-1].gather(-1, rows[:, 1:, None])[..., 0].mean(1)
    return {"likelihood": (1000 * chosen.exp()).tolist()}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def schedule(zoo: Any) -> dict[str, Any]:
    base = zoo.base("m0")
    pool = [zoo.tune(base, f"m{i}", seed=i, size=0.05) for i in (1, 2)]
    return {
        "baseline": {"model": str(base), "accuracy": 50.0},
        "pool": [str(path) for path in pool],
        "seed": 11,
        "schedule": {
            "cycles": 2,
            "degrade": {"partner": "next", "method": "slerp", "t": 0.3},
            "retrace": {"toward": "baseline", "method": "dare_ties", "t": 0.4, "density": 0.7},
        },
        "evaluate": {"callable": "stand:in"},
    }


def test_a_run_writes_everything_and_the_model_is_the_state_it_scored(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    schedule["compare"] = {"methods": list(BASELINES), "seeds": 2}
    out = tmp_path / "out"
    result = run(schedule, out, score=score, threads=1)
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "model", "trajectory.json", "trajectory.png", "comparison.png", "report.md", "report.html",
    }  # fmt: skip
    written = json.loads((out / "trajectory.json").read_text())
    assert [step["kind"] for step in written["steps"]] == ["degrade", "retrace"] * 2
    assert written["steps"][0]["coefficients"].keys() == set(result.space.names)
    assert written["steps"][1]["coefficients"] is None  # DARE-TIES is no combination
    assert all(step["norm"] > 0 and step["angle_degrees"] > 0 for step in written["steps"])
    rows = {row["name"]: row for row in written["comparison"]}
    assert set(rows) == {"schedule", "one_shot", "baseline", *BASELINES}
    assert rows["linear"]["candidates"] == 4  # as many as the walk measured
    assert len(rows["dare_ties"]["repeats"]) == len(rows["schedule"]["repeats"]) == 2
    low, high = rows["schedule"]["interval"]
    assert low <= rows["schedule"]["holdout"]["value"] <= high
    for name, row in rows.items():
        assert name == "schedule" or 0 < row["p_holm"] <= 1
    # The folder, read back by transformers, scores what the report says: to the bit, as float32.
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    again = np.mean(score(model)["likelihood"])
    assert written["steps"][-1]["score"] == pytest.approx(again, rel=1e-12)
    report = (out / "report.md").read_text()
    assert "one_shot" in report and "hold-out" in report and "degrade" in report
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 == len(list(out.glob("*.png")))
    assert "<table>" in page
    assert "src='http" not in page and "href" not in page
    card = (out / "model" / "README.md").read_text()
    assert "## Lineage" in card and "dare_ties(t=0.4, density=0.7)" in card


def test_a_killed_run_resumes_where_it_was_and_ends_the_same(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    class Calls:  # no plain value, of which a change would be another scorer
        count, killed_after = 0, -1

    calls = Calls()

    def counted(model: Any, split: str = "steer") -> Mapping[str, Any]:
        if calls.count == calls.killed_after:
            raise KeyboardInterrupt
        calls.count += 1
        return score(model, split)

    schedule["compare"] = ["best_single", "line_search"]
    run(schedule, tmp_path / "whole", score=counted, threads=1)
    total, calls.count = calls.count, 0
    calls.killed_after = 5  # the baseline, the pool, and two steps
    with pytest.raises(KeyboardInterrupt):
        run(schedule, tmp_path / "killed", score=counted, threads=1)
    journal = tmp_path / "killed" / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"key": "score:half-writ')  # what a crash leaves
    with pytest.raises(FastmergeError, match="holds a run already; use resume=True"):
        run(schedule, tmp_path / "killed", score=counted, threads=1)
    calls.count, calls.killed_after = 0, -1
    run(schedule, tmp_path / "killed", score=counted, threads=1, resume=True)
    assert calls.count == total - 5
    for name in ("trajectory.json", "report.md", "model/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resuming_another_run_is_refused(schedule: dict[str, Any], tmp_path: Path) -> None:
    run(schedule, tmp_path / "out", evaluate=False, threads=1)
    with pytest.raises(FastmergeError, match="was begun with seed 11, not 12"):
        run(schedule, tmp_path / "out", evaluate=False, resume=True, seed=12)
    schedule["schedule"]["cycles"] = 3
    with pytest.raises(FastmergeError, match="was begun with other 'schedule'"):
        run(schedule, tmp_path / "out", evaluate=False, resume=True)


def test_a_bad_schedule_writes_nothing(schedule: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    schedule["pool"].append("./nowhere")
    with pytest.raises(FastmergeError, match=r"schedule\.pool\[2\].*nowhere"):
        run(schedule, out, score=score)
    schedule["pool"].pop()
    with pytest.raises(FastmergeError, match="'stand:in'"):
        run(schedule, out)
    assert not out.exists()


def test_models_that_cannot_merge_are_refused_before_anything(
    zoo: Any, schedule: dict[str, Any], tmp_path: Path
) -> None:
    schedule["pool"].append(str(zoo.base("wide", hidden=64)))
    with pytest.raises(FastmergeError, match="only models of one shape can be merged"):
        run(schedule, tmp_path / "out", score=score)
    assert not (tmp_path / "out").exists()


def test_a_model_of_nan_scores_nan_and_is_never_kept(
    zoo: Any, schedule: dict[str, Any], tmp_path: Path
) -> None:
    broken = {n: x * np.nan for n, x in zoo.read(Path(schedule["pool"][0])).items()}
    config = json.loads((Path(schedule["pool"][0]) / "config.json").read_text())
    schedule["pool"][0] = str(zoo.write("broken", broken, config))
    schedule["schedule"]["retrace"] = {"toward": "baseline", "method": "linear", "t": 0.4}
    result = run(schedule, tmp_path / "out", score=score, threads=1)
    records = result.trajectory.state.records
    assert [record.accepted for record in records] == [False, True, True, True]
    written = json.loads((tmp_path / "out" / "trajectory.json").read_text())
    assert written["steps"][0]["score"] is None


def test_a_callable_that_returns_nonsense_is_one_line(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    for answer, message in (
        ([1], "must return a dict"), ({"a": "high"}, "is no number"),
        ({"a": None}, "it is None"), ({"b": [1.0, None]}, "is no number: it is None"),
    ):  # fmt: skip
        with pytest.raises(FastmergeError, match=message) as caught:
            run(schedule, tmp_path / str(len(message)), score=lambda model, a=answer: a)
        assert "\n" not in str(caught.value)


CALLABLES = {
    "raises": ("def f(model):\n    return 1 / 0\n", "own:f: own.py:2: ZeroDivisionError: division"),
    "import": ("1 / 0\n", "'own:f': own.py:1: ZeroDivisionError"),
    "syntax": ("def f(:\n", "'own:f': own.py:1: SyntaxError"),
    "number": ("f = 3\n", "'own:f': is no function"),
    "no model": ("def f():\n    return {}\n", "own:f: is called with the model alone"),
    "no items": ("def f(model):\n    return {'a': []}\n", "own:f: 'a' has no items to score"),
}


@pytest.mark.parametrize("text, message", CALLABLES.values(), ids=CALLABLES)
def test_what_a_callable_gets_wrong_is_one_line(
    files: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (files / "own.py").write_text(text)
    path = files / "walk.yml"
    path.write_text(path.read_text() + "evaluate: {callable: 'own:f'}\n")
    done = invoke("retrograde", str(path), str(files / "out"))
    assert done.exit_code == 2 and message in done.output.splitlines()[-1]
    assert not (files / "out" / "model").exists()


@pytest.mark.parametrize("device, message", [
    ("cuda:7", "has no device 'cuda:7'; use cpu"), ("gpu", "unknown device 'gpu'; use cpu or cuda"),
])  # fmt: skip
def test_a_device_that_is_not_there_is_refused_before_anything(
    schedule: dict[str, Any], tmp_path: Path, device: str, message: str
) -> None:
    schedule["evaluate"] = {"callable": "x:y", "device": device}
    with pytest.raises(FastmergeError, match=message):
        run(schedule, tmp_path / "out", score=score)
    assert not (tmp_path / "out").exists()


def test_a_callable_may_lie_beside_the_schedule(files: Path) -> None:
    (files / "measure_here.py").write_text("def score(model):\n    return {'size': 7.0}\n")
    path = files / "walk.yml"
    path.write_text(path.read_text() + "evaluate: {callable: 'measure_here:score'}\n")
    result = run(path, files / "out", threads=1)
    assert result.trajectory.state.baseline_score == 7.0
    assert "not tested: there are no scores by item" in (files / "out" / "report.md").read_text()


@pytest.mark.parametrize("name", BASELINES)
def test_families_draw_what_they_say(name: str) -> None:
    pool = Pool(models=(0, 1, 2), base=0, partners=(1, 2))
    found = list(candidates(name, pool, [50.0, 60.0, 40.0], budget=5, seed=3))
    again = list(candidates(name, pool, [50.0, 60.0, 40.0], budget=5, seed=3))
    assert [how for _, how in found] == [how for _, how in again]
    expected = {"best_single": 1, "model_stock": 1, "greedy_soup": 0}.get(name, 5)
    assert len(found) == expected
    if name == "best_single":
        assert found[0][0] == Model(1)


def test_staged_halving_measures_few_on_all_items(schedule: dict[str, Any], tmp_path: Path) -> None:
    seen: list[int | None] = []

    def staged(model: Any, split: str = "steer", limit: int | None = None) -> Mapping[str, Any]:
        seen.append(limit)
        return score(model, split, limit)

    schedule["evaluate"]["stages"] = [4, 8]
    schedule["compare"] = {"methods": ["linear"], "budget": 24}
    run(schedule, tmp_path / "out", score=staged, threads=1)
    assert seen.count(4) == 24 and seen.count(8) == 6
    # On all items: the models (3), the walk (4), its one-shot, and the last 5 candidates; the
    # hold-out by the 4 that are reported and by 2 more masks of the DARE walk.
    assert seen.count(None) == 3 + 4 + 1 + 5 + 4 + 2


def test_the_journal_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.put("a", {"x": 1})
    journal.put("b", 2)
    path.write_bytes(path.read_bytes()[:-3])
    again = Journal(path)
    assert again.get("a") == {"x": 1} and again.get("b") is None
    again.put("c", 3)
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "c"]


# --- the command line ---


class Done(NamedTuple):
    exit_code: int
    output: str  # stdout and stderr


def invoke(*arguments: str) -> Done:
    from fastmerge.cli import main

    raises = pytest.raises(SystemExit)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out), raises as ended:
        main(arguments)
    return Done(int(ended.value.code or 0), out.getvalue())


@pytest.fixture
def files(zoo: Any, tmp_path: Path) -> Path:
    base = zoo.base("m0")
    zoo.tune(base, "m1", seed=1, size=0.05)
    (tmp_path / "walk.yml").write_text(
        "baseline: ./m0\npool: [./m1]\nschedule:\n  cycles: 2\n"
        "  degrade: {partner: next, method: slerp, t: 0.35}\n"
        "  retrace: {toward: baseline, method: slerp, t: 0.6}\n"
    )
    (tmp_path / "slerp.yml").write_text(
        f"merge_method: slerp\nbase_model: {base}\nparameters: {{t: 0.5}}\n"
        f"models: [{{model: {base}}}, {{model: {tmp_path / 'm1'}}}]\n"
    )
    return tmp_path


def test_cli_walks_without_evaluation(files: Path) -> None:
    out = files / "out"
    done = invoke("retrograde", str(files / "walk.yml"), str(out), "--no-evaluate", "--seed", "4")
    assert done.exit_code == 0, done.output
    assert "seed 4; the model is state 4" in done.output
    assert (out / "model" / "model.safetensors").is_file()
    assert "Nothing was measured" in (out / "report.md").read_text()
    again = invoke("retrograde", str(files / "walk.yml"), str(out), "--no-evaluate", "--resume")
    assert again.exit_code == 0, again.output


def test_cli_dry_run_writes_nothing(files: Path) -> None:
    done = invoke("retrograde", str(files / "walk.yml"), str(files / "out"), "--dry-run")
    assert done.exit_code == 0, done.output
    assert re.search(r"1\s+degrade\s+next\s+slerp\(t=0.35\)\s+no", done.output)
    assert not (files / "out").exists()


def test_cli_names_the_line_of_a_mistake(files: Path) -> None:
    path = files / "walk.yml"
    path.write_text(path.read_text().replace("slerp", "slurp", 1))
    done = invoke("retrograde", str(path), str(files / "out"))
    assert done.exit_code == 2
    assert "walk.yml:5: unknown method 'slurp'; did you mean 'slerp'?" in done.output
    assert not (files / "out").exists()


def test_a_sweep_writes_what_single_merges_write(files: Path, zoo: Any) -> None:
    from fastmerge import api
    from fastmerge.engine import in_memory

    out = files / "sweep"
    done = invoke("sweep", str(files / "slerp.yml"), str(out), "--t", "0:1:0.5", "--quiet")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in out.iterdir()) == ["sweep.json", "t=0", "t=0.5", "t=1"]
    single = {
        item.name: (array.astype(np.uint32) << 16).view(np.float32)
        for item, array in in_memory.materialise_plan(api.plan(files / "slerp.yml"), threads=1)
    }
    swept = zoo.read(out / "t=0.5")
    for name, array in single.items():
        np.testing.assert_allclose(swept[name], array, rtol=2**-7)  # 1 ulp of bf16
    for t, model in (("0", "m0"), ("1", "m1")):
        ends = zoo.read(files / model)
        assert all((zoo.read(out / f"t={t}")[n] == x).all() for n, x in ends.items())


def test_a_sweep_is_scored_and_resumes(files: Path) -> None:
    (files / "evaluate.yml").write_text("callable: sweeping:score\n")
    (files / "sweeping.py").write_text(
        "from pathlib import Path\n"
        "def score(model):\n"
        "    log = Path(__file__).with_name('log')\n"
        "    log.write_text((log.read_text() if log.exists() else '') + 'x')\n"
        "    return {'norm': float(model.lm_head.weight.float().norm())}\n"
    )
    arguments = ["sweep", str(files / "slerp.yml"), str(files / "out")]
    arguments += ["--evaluate", str(files / "evaluate.yml"), "--t"]
    done = invoke(*arguments, "0:1:0.5")
    assert done.exit_code == 0, done.output
    assert "best: t = " in done.output and (files / "out" / "sweep.png").stat().st_size > 1000
    assert invoke(*arguments, "0,1").exit_code == 2  # not empty
    done = invoke(*arguments, "0,0.25,0.5", "--resume")
    assert done.exit_code == 0, done.output
    assert (files / "log").read_text() == "xxxx"  # only t = 0.25 was new
    points = json.loads((files / "out" / "sweep.json").read_text())["points"]
    assert [point["t"] for point in points] == [0.0, 0.25, 0.5, 1.0]  # none is lost
    (files / "evaluate.yml").write_text("callable: sweeping:score\nlimit: 3\n")
    assert "evaluate.yml:2: sweeping:score takes no 'limit'" in invoke(*arguments, "0,1").output
    (files / "slerp.yml").write_text((files / "slerp.yml").read_text() + "out_dtype: float32\n")
    (files / "evaluate.yml").write_text("callable: sweeping:score\n")
    assert "was begun with another recipe" in invoke(*arguments, "0,1", "--resume").output


def test_without_matplotlib_a_measured_run_stops_before_it_starts(
    schedule: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmerge import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(FastmergeError, match=r"pip install .*\[plot\]"):
        run(schedule, tmp_path / "out", score=score)
    assert not (tmp_path / "out").exists()


def test_a_sweep_without_a_t_is_refused(files: Path) -> None:
    path = files / "slerp.yml"
    path.write_text(
        path.read_text().replace("slerp", "karcher").replace("parameters: {t: 0.5}\n", "")
    )
    done = invoke("sweep", str(path), str(files / "sweep"))
    assert done.exit_code == 2 and "nothing in this recipe has a t" in done.output
    assert not (files / "sweep").exists()


def test_ranges() -> None:
    assert parse_range("0:1:0.25") == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert parse_range("0:1:0.05")[-1] == 1.0 and len(parse_range("0:1:0.05")) == 21
    assert parse_range("0.2,0.4") == [0.2, 0.4]
    for bad in ("a", "1:0:0.1", "0:1:0", "0:1", "0:inf:1", "nan", "0.1,inf"):
        with pytest.raises(FastmergeError, match=r"^t: "):
            parse_range(bad)


def test_a_schedule_given_twice_reads_the_same(schedule: dict[str, Any]) -> None:
    assert load(schedule).text == load(schedule).text


def test_what_an_unmeasured_walk_finds_is_what_a_reading_finds(
    zoo: Any, schedule: dict[str, Any], tmp_path: Path
) -> None:
    """Model Stock reads inner products of deltas to base_model, and of rows with filter_wise: not
    those that the run keeps. They must not be taken for them."""
    schedule["base_model"] = str(zoo.tune(Path(schedule["baseline"]["model"]), "m3", seed=7))
    for name, step in (
        ("whole", {"toward": "baseline", "method": "model_stock"}),
        ("rows", {"toward": "baseline", "method": "model_stock", "filter_wise": True}),
    ):
        degrade = {"partner": "next", "method": "slerp", "t": 0.3}
        schedule["schedule"] = {"steps": [{"degrade": degrade}, {"retrace": step}]}
        out = tmp_path / name
        found = run(schedule, out, evaluate=False, threads=1).space
        np.testing.assert_allclose(found.grams, open_space(load(schedule), threads=1).grams)
        first = zoo.read(out / "model")
        run(schedule, out, evaluate=False, threads=1, resume=True)
        assert all((zoo.read(out / "model")[n] == x).all() for n, x in first.items())


def test_a_walk_that_is_back_at_the_baseline_goes_on(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    back = {"retrace": {"toward": "baseline", "method": "slerp", "t": 0.3}}
    ties = {"degrade": {"partner": "m1", "method": "ties", "t": 0.3, "density": 0.5}}
    schedule["schedule"] = {"steps": [back, back, ties]}
    result = run(schedule, tmp_path / "out", score=score, threads=1)
    assert len(result.trajectory.state.records) == 3
    del schedule["pool"]
    schedule["schedule"] = {"steps": [back, back]}
    run(schedule, tmp_path / "alone", evaluate=False, threads=1)


def test_the_model_that_deltas_are_taken_to_is_neither_near_nor_far(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    schedule["base_model"] = schedule["pool"][0]
    schedule["schedule"]["degrade"]["partner"] = "nearest"
    result = run(schedule, tmp_path / "out", score=score, threads=1)
    assert result.trajectory.used == [2]


def test_a_filter_that_leaves_tensors_without_a_value_is_refused_at_once(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    schedule["schedule"]["degrade"]["t"] = [{"filter": "mlp", "value": 0.3}]
    with pytest.raises(FastmergeError, match="needs the parameter 't'"):
        run(schedule, tmp_path / "out", score=score)
    assert not (tmp_path / "out").exists()


def test_scores_are_kept_under_what_made_them(tmp_path: Path) -> None:
    from functools import partial

    from fastmerge.evaluation.scorers import make_scorer
    from fastmerge.evaluation.settings import load_evaluate

    def fixed(_: Any, value: float = 1.0) -> dict[str, float]:
        return {"a": value}

    def closing(value: float) -> Any:
        return lambda _: {"a": value}

    def key(function: Any, **settings: Any) -> str:
        evaluate = load_evaluate({"callable": "a:b", **settings})
        return make_scorer(evaluate, tmp_path, tmp_path, function).key

    assert key(fixed) == key(fixed)

    class Scorer:
        def __init__(self, value: float) -> None:
            self.value = value

        def __call__(self, _: Any) -> dict[str, float]:
            return {"a": self.value}

    def default(value: float) -> Any:
        return lambda _, value=value: {"a": value}

    different = [
        key(fixed), key(partial(fixed, value=2.0)), key(partial(fixed, value=[3.0])),
        key(partial(fixed, value=[4.0])), key(closing(1.0)), key(closing(2.0)),
        key(closing(np.float32(2.0))), key(closing((1.0, 2.0))), key(default(1.0)),
        key(default(2.0)), key(Scorer(1.0)), key(Scorer(2.0)), key(Scorer(2.0).__call__),
        key(fixed, dtype="bfloat16"), key(closing({1})), key(closing({2})),
        key(closing(np.arange(3))), key(closing(np.arange(1, 4))), key(closing([1, [2]])),
        key(closing([[1], 2])),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


@pytest.mark.parametrize("decorator", ["", "import torch\n@torch.no_grad()\n"])
def test_an_edited_scorer_is_another_one_even_in_one_process(
    tmp_path: Path, decorator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmerge.evaluation.scorers import make_scorer
    from fastmerge.evaluation.settings import load_evaluate

    monkeypatch.delitem(sys.modules, "keyed", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    settings = load_evaluate({"callable": "keyed:score"})
    text = decorator + "def score(model): return {'a': BIAS}\n"
    keys = []
    for bias in (1.0, 2.0):
        (tmp_path / "keyed.py").write_text(f"BIAS = {bias}\n{text}")
        scorer = make_scorer(settings, tmp_path, tmp_path)
        keys.append(scorer.key)
        assert scorer.score(None, "steer").value == bias
    assert keys[0] != keys[1]
    (tmp_path / "keyed.py").write_text("def another(model): return {}\n")
    with pytest.raises(FastmergeError, match="the module has no 'score'"):
        make_scorer(settings, tmp_path, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "keyed.py").write_text("def score(model): return {'a': 3.0}\n")
    with pytest.raises(FastmergeError, match="beside the schedule lies a 'keyed', and another"):
        make_scorer(settings, other, other)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"holdout": ["tasks/held.yaml"]}, "'holdout' tasks go with 'tasks'"),
        ({"stages": [4, 8]}, "takes no 'limit'"),
    ],
)
def test_what_a_callable_cannot_follow_is_refused(
    schedule: dict[str, Any], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    schedule["evaluate"].update(settings)
    with pytest.raises(FastmergeError, match=message):
        run(schedule, tmp_path / "out", score=lambda model, **options: score(model))
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_nan_somewhere_has_no_part_in_the_one_shot(
    zoo: Any, schedule: dict[str, Any], tmp_path: Path
) -> None:
    tensors = zoo.read(Path(schedule["pool"][1]))
    tensors["model.norm.weight"][:] = np.nan
    config = json.loads((Path(schedule["pool"][1]) / "config.json").read_text())
    schedule["pool"][1] = str(zoo.write("broken", tensors, config))
    back = {"retrace": {"toward": "baseline", "method": "slerp", "t": 0.3}}
    away = {"degrade": {"partner": "m1", "method": "slerp", "t": 0.4}}
    schedule["schedule"] = {"steps": [away, back]}
    result = run(schedule, tmp_path / "out", score=score, threads=1)
    place = result.trajectory.geometry[2]
    assert place is not None and place.one_shot[2] == 0.0 and place.one_shot[1] > 0.1
    (one,) = [row for row in result.rows if row.name == "one_shot"]
    assert np.isfinite(one.steer.value)


def test_a_pool_without_a_distance_is_refused_at_once(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    schedule["pool"] = schedule["base_model"] = schedule["pool"][:1]
    (schedule["base_model"],) = schedule["base_model"]
    schedule["schedule"]["degrade"]["partner"] = "farthest"
    with pytest.raises(FastmergeError, match="base_model alone"):
        run(schedule, tmp_path / "out", score=score)
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_named(schedule: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(schedule, out, score=score, threads=1)
    lines = (out / "journal.jsonl").read_text().splitlines()
    (out / "journal.jsonl").write_text("\n".join([lines[0], "{", *lines[2:]]) + "\n")
    with pytest.raises(FastmergeError, match=r"journal\.jsonl: line 2 is damaged; delete"):
        run(schedule, out, score=score, resume=True)
    (out / "journal.jsonl").write_text("\n".join(lines) + "\n")
    grams = (out / "grams.npz").read_bytes()
    (out / "grams.npz").write_bytes(grams[: len(grams) // 2])
    with pytest.raises(FastmergeError, match=r"grams\.npz: is damaged; delete"):
        run(schedule, out, score=score, resume=True)


def test_any_name_can_be_drawn(schedule: dict[str, Any], tmp_path: Path) -> None:
    schedule["pool"][0] = {"model": schedule["pool"][0], "name": "m$^$"}
    run(schedule, tmp_path / "out", score=score, threads=1)
    assert (tmp_path / "out" / "trajectory.png").is_file()
