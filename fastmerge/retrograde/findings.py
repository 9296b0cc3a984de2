"""What the comparison says: rows with intervals, and the answer in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastmerge.evaluation.scores import Scores, none
from fastmerge.evaluation.statistics import Interval, difference, holm, interval, untested
from fastmerge.retrograde.words import figure

if TYPE_CHECKING:
    from fastmerge.retrograde.comparison import Row
    from fastmerge.retrograde.result import Result


@dataclass(frozen=True)
class Line:
    """One row of the comparison with its statistics on the reported split."""

    row: Row
    value: float
    interval: Interval | None
    lead: Interval | None  # the schedule's score less this row's, the same items
    p: float | None  # of the lead, Holm-adjusted over the rows

    @property
    def scores(self) -> Scores:
        """On the hold-out where there is one."""
        return self.row.steer if self.row.holdout is None else self.row.holdout


def compare_lines(result: Result) -> list[Line]:
    """The rows with intervals; the schedule comes first."""
    rows = result.rows
    if not rows:
        return []
    settings = result.trajectory.schedule.evaluate
    resamples = settings.bootstrap if settings else 2000
    seed = result.trajectory.seed
    reported = [row.steer if row.holdout is None else row.holdout for row in rows]
    first = reported[0]
    leads = [
        None if i == 0 else difference(first, scores, resamples=resamples, seed=seed)
        for i, scores in enumerate(reported)
    ]
    adjusted = holm([float("nan") if lead is None else lead.p for lead in leads])
    return [
        Line(
            row,
            scores.value,
            interval(scores, resamples=resamples, seed=seed),
            lead,
            none(p),
        )
        for row, scores, lead, p in zip(rows, reported, leads, adjusted, strict=True)
    ]


def split_name(lines: Sequence[Line]) -> str:
    """Which split the comparison reports."""
    return "hold-out" if lines and lines[0].row.holdout is not None else "steering"


_RIVALS = {
    "one_shot": "its one-shot equivalent",
    "line_search": "the line search over t",
    "best_single": "the best single model",
    "baseline": "the baseline",
}
SIGNIFICANT = 0.05  # of the Holm-adjusted p


def finding(lines: Sequence[Line]) -> list[str]:
    """The plain answer, one line for each rival: does the schedule beat what costs less?"""
    rivals = {line.row.name: line for line in lines[1:]}
    sentences = []
    for name, title in _RIVALS.items():
        if name not in rivals:
            continue
        line = rivals[name]
        if line.lead is None:
            gap = lines[0].value - line.value
            sentences.append(
                f"- against {title}: {figure(gap, sign='+')} points "
                f"(not tested: {untested(lines[0].scores, line.scores)})"
            )
            continue
        sentences.append(f"- against {title}: {in_points(line.lead, ' points')}, {_outcome(line)}")
    return sentences


def in_points(lead: Interval, unit: str = "") -> str:
    """A difference with its interval: '+1.20 [+0.30, +2.10]'."""
    value, low, high = (figure(x, sign="+") for x in lead[:3])
    return f"{value}{unit} [{low}, {high}]"


def _outcome(line: Line) -> str:
    if line.lead is None or line.p is None or line.p >= SIGNIFICANT:
        return "no difference shown"
    return "better" if line.lead.value > 0 else "worse"


def verdict_on_path(lines: Sequence[Line]) -> str:
    """Whether the walk did what neither of its one-dimensional rivals could; "" if untested."""
    outcomes = [
        _outcome(line)
        for line in lines[1:]
        if line.row.name in ("one_shot", "line_search") and line.lead is not None
    ]
    if not outcomes:
        return ""
    if all(outcome == "better" for outcome in outcomes):
        return "Here the path added something that one merge near it lacks."
    if "worse" in outcomes:
        return "Here the path cost something: a simpler merge of the same models scores higher."
    return "No evidence that the path itself added anything over a simpler merge."
