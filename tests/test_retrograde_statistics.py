"""Intervals, tests, and what the report says of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastmerge.evaluation.scores import Scores, TaskScore
from fastmerge.evaluation.statistics import difference, holm, interval
from fastmerge.retrograde import findings
from fastmerge.retrograde.comparison import Row
from fastmerge.search.expressions import Model


def scores_of(*parts: Any) -> Scores:
    """One task with these parts' items."""
    items = {str(i): tuple(float(x) for x in part) for i, part in enumerate(parts)}
    value = float(np.mean([np.mean(part) for part in items.values()]))
    return Scores({"t": TaskScore(value, "acc", sum(map(len, items.values())), items)})


def test_statistics_against_closed_forms() -> None:
    rng = np.random.default_rng(0)
    a = 100.0 * (rng.random(400) < 0.6)
    found = interval(scores_of(a), resamples=4000, seed=1)
    assert found is not None
    half = 1.96 * a.std() / np.sqrt(400)  # the normal approximation, good at n = 400
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    better = a.copy()
    better[:40] = 100.0  # never worse, better on some: paired, that is certain
    lead = difference(scores_of(better), scores_of(a), resamples=2000, seed=1)
    assert lead is not None and lead.low > 0 and lead.p < 0.01
    same = difference(scores_of(a), scores_of(a), resamples=500, seed=1)
    assert same is not None and (same.low, same.high, same.p) == (0.0, 0.0, 1.0)
    assert difference(scores_of(a), scores_of(a[:10]), resamples=100, seed=1) is None
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, float("nan")])[0] == 0.5


def test_a_few_items_show_nothing() -> None:
    """At 5 items a true null came out as p < 0.05 in 16 % of cases; at 20 in 8 %."""
    rng = np.random.default_rng(1)
    for few in ([71.2], rng.normal(size=5), rng.normal(size=19)):
        assert interval(scores_of(few), resamples=100, seed=1) is None
        assert difference(scores_of(few), scores_of(few), resamples=100, seed=1) is None
    parts = rng.normal(size=(10, 4))  # 40 items, but four of a kind say little of their spread
    assert interval(scores_of(*parts), resamples=100, seed=1) is None
    rejected = 0
    for seed in range(200):
        a, b = rng.normal(size=(2, 20))
        found = difference(scores_of(a), scores_of(b), resamples=500, seed=seed)
        assert found is not None
        rejected += found.p < 0.05
    assert rejected <= 28  # 14 % of 200; P(more) < 0.001 at a true rate of 8 %


def test_nan_is_no_difference() -> None:
    good, bad = np.full(40, 50.0), np.array([np.nan, *np.full(39, 50.0)])
    assert difference(scores_of(good), scores_of(bad), resamples=100, seed=1) is None
    assert interval(scores_of(bad), resamples=100, seed=1) is None
    found = {"schedule": good, "one_shot": bad, "line_search": good}
    rows = [Row(name, "", Model(0), scores_of(x), None, 1) for name, x in found.items()]
    trajectory = SimpleNamespace(schedule=SimpleNamespace(evaluate=None), seed=0)
    result: Any = SimpleNamespace(rows=rows, trajectory=trajectory)
    lines = findings.compare_lines(result)
    assert findings.verdict_on_path(lines).startswith("No evidence")
    assert "not tested" in findings.finding(lines)[0]


VERDICTS = {
    "wins": ((60.0, 50.0, 50.0), "Here the path added something"),
    "ties": ((50.0, 50.0, 50.0), "No evidence that the path itself added anything"),
    "one win": ((60.0, 60.0, 50.0), "No evidence that the path itself added anything"),
    "loses": ((50.0, 60.0, 50.0), "Here the path cost something"),
}


@pytest.mark.parametrize("percents, expected", VERDICTS.values(), ids=VERDICTS)
def test_the_report_says_plainly_what_was_found(
    percents: tuple[float, float, float], expected: str
) -> None:
    rows = []
    for name, percent in zip(("schedule", "one_shot", "line_search"), percents, strict=True):
        items = tuple([100.0] * int(10 * percent) + [0.0] * int(1000 - 10 * percent))
        scores = Scores({"t": TaskScore(percent, "acc", 1000, {"t": items})})
        rows.append(Row(name, "", Model(0), scores, scores, 1))
    schedule = SimpleNamespace(evaluate=None)
    result = SimpleNamespace(rows=rows, trajectory=SimpleNamespace(schedule=schedule, seed=0))
    lines = findings.compare_lines(result)  # type: ignore[arg-type]
    assert findings.verdict_on_path(lines).startswith(expected)
    found = findings.finding(lines)
    assert len(found) == 2 and all("points" in sentence for sentence in found)
