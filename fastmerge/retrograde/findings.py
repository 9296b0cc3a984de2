"""What the comparison says: rows with intervals, and the answer in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.retrograde.words import is_copy
from fastmerge.search.rows import Line, lines_of, or_least, split_name
from fastmerge.search.rows import measured as score_text

if TYPE_CHECKING:
    from fastmerge.retrograde.result import Result
    from fastmerge.retrograde.walking import Trajectory


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
    """The plain answer, one line for each rival: does the schedule beat what costs less? First the
    one that scores highest, if that is higher than the schedule.
    """
    rivals = {line.row.name: line for line in lines[1:]}
    ranked = sorted(rivals, key=lambda name: or_least(rivals[name].value), reverse=True)
    ahead = [name for name in ranked[:1] if rivals[name].value > lines[0].value]
    order = dict.fromkeys([*ahead, *(name for name in _RIVALS if name in rivals), *ranked])
    titles = {name: _RIVALS.get(name, f"the best {name}") for name in order}
    return [rivals[name].against(lines[0], title) for name, title in titles.items()]


def copy_text(trajectory: Trajectory, lines: Sequence[Line]) -> str:
    """The plain words for a walk that came to nothing, and what came of the merges that it was
    compared with; "" for a walk that did not.
    """
    if not is_copy(trajectory):
        return ""
    level = next((line.value for line in lines if line.row.name == "baseline"), math.inf)
    merges = [line for line in lines[1:] if line.row.name not in ("one_shot", "baseline")]
    higher = [line for line in merges if line.value > level]
    why = "No state of the walk beat the baseline" if higher else "Nothing beat the baseline"
    if not any(or_least(line.value) > -math.inf for line in lines):
        why = "No state's score is a number"
    if not trajectory.models:
        why = "The walk ended where it began"
    text = f"{why}: the model written is a copy of {trajectory.schedule.labels[0]}."
    if not higher:
        return text
    best = max(higher, key=lambda line: line.value)
    return (
        f"{text} Of {len(merges)} one-shot merge{'' if len(merges) == 1 else 's'} {len(higher)} "
        f"scored higher on the {split_name(lines)} items, the best {best.row.name} "
        f"({score_text(best.scores)})."
    )


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
