"""What the comparison says: rows with intervals, and the answer in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.evaluation.statistics import untested
from fastmerge.search.rows import Line, figure, in_points, lines_of

if TYPE_CHECKING:
    from fastmerge.retrograde.result import Result


def compare_lines(result: Result) -> list[Line]:
    """The rows with intervals; the schedule comes first."""
    settings = result.trajectory.schedule.evaluate
    resamples = settings.bootstrap if settings else 2000
    return lines_of(result.rows, resamples=resamples, seed=result.trajectory.seed)


_RIVALS = {
    "one_shot": "its one-shot equivalent",
    "line_search": "the line search over t",
    "best_single": "the best single model",
    "baseline": "the baseline",
}


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
        sentences.append(f"- against {title}: {in_points(line.lead, ' points')}, {line.outcome}")
    return sentences


def verdict_on_path(lines: Sequence[Line]) -> str:
    """Whether the walk did what neither of its one-dimensional rivals could; "" if untested."""
    outcomes = [
        line.outcome
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
