"""Retrograde schedules (DKE-RS): walks back and forth between strong and weak models, measured.

``run(schedule, out)`` does everything: walk, evaluate, compare, report. Its parts, for programs
that search: ``load`` reads a schedule, ``open_space`` finds the models' geometry in one pass,
`Space` gives a state's coefficients and plan, `Lab` scores states, ``walk`` takes the steps.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmerge.retrograde.evaluate import Lab
    from fastmerge.retrograde.opening import open_space
    from fastmerge.retrograde.runner import Result, run
    from fastmerge.retrograde.schedule import Schedule, load
    from fastmerge.retrograde.scores import Scores, TaskScore
    from fastmerge.retrograde.states import Blend, Model, Space, average, blend
    from fastmerge.retrograde.walking import Trajectory, walk

__all__ = [
    "Blend",
    "Lab",
    "Model",
    "Result",
    "Schedule",
    "Scores",
    "Space",
    "TaskScore",
    "Trajectory",
    "average",
    "blend",
    "load",
    "open_space",
    "run",
    "walk",
]

_HOMES = {
    **dict.fromkeys(("Lab",), "evaluate"),
    **dict.fromkeys(("open_space",), "opening"),
    **dict.fromkeys(("Result", "run"), "runner"),
    **dict.fromkeys(("Schedule", "load"), "schedule"),
    **dict.fromkeys(("Scores", "TaskScore"), "scores"),
    **dict.fromkeys(("Blend", "Model", "Space", "average", "blend"), "states"),
    **dict.fromkeys(("Trajectory", "walk"), "walking"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"fastmerge.retrograde.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fastmerge.retrograde' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
