"""Retrograde schedules (DKE-RS): walks back and forth between strong and weak models, measured.

``run(schedule, out)`` does everything: walk, evaluate, compare, report. Its parts, for programs
that search: ``load`` reads a schedule, ``open_space`` finds the models' geometry in one pass,
`Space` gives a state's coefficients and plan, `Lab` scores states, ``walk`` takes the steps, and
``drive`` scores what a `Search` of your own asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastmerge.lazily import loading

if TYPE_CHECKING:
    from fastmerge.evaluation.scores import Scores, TaskScore
    from fastmerge.retrograde.opening import open_space
    from fastmerge.retrograde.result import Result
    from fastmerge.retrograde.runner import run
    from fastmerge.retrograde.schedule import Schedule, load
    from fastmerge.retrograde.walking import Trajectory, walk
    from fastmerge.search.expressions import Blend, Model, average, blend
    from fastmerge.search.lab import Lab
    from fastmerge.search.search import Search, drive
    from fastmerge.search.space import Space

__all__ = [
    "Blend",
    "Lab",
    "Model",
    "Result",
    "Schedule",
    "Scores",
    "Search",
    "Space",
    "TaskScore",
    "Trajectory",
    "average",
    "blend",
    "drive",
    "load",
    "open_space",
    "run",
    "walk",
]

_HOMES = {
    "Lab": "fastmerge.search.lab",
    "open_space": "fastmerge.retrograde.opening",
    "Result": "fastmerge.retrograde.result",
    "run": "fastmerge.retrograde.runner",
    **dict.fromkeys(("Schedule", "load"), "fastmerge.retrograde.schedule"),
    **dict.fromkeys(("Scores", "TaskScore"), "fastmerge.evaluation.scores"),
    **dict.fromkeys(("Blend", "Model", "average", "blend"), "fastmerge.search.expressions"),
    **dict.fromkeys(("Search", "drive"), "fastmerge.search.search"),
    "Space": "fastmerge.search.space",
    **dict.fromkeys(("Trajectory", "walk"), "fastmerge.retrograde.walking"),
}

if not TYPE_CHECKING:  # which would make every misspelt name one that is there
    __getattr__ = loading(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
