"""What an evaluation says: scores in percent, by task and item."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmerge.errors import FastmergeError, brief, in_a_line, is_whole


@dataclass(frozen=True)
class TaskScore:
    """One task's score in percent. ``items``: each item's, by part (a group's tasks), if known."""

    value: float
    metric: str
    count: int
    items: Mapping[str, tuple[float, ...]] | None = None
    detail: Mapping[str, float] | None = None  # the harness's own numbers, perplexity, ...

    def __repr__(self) -> str:
        return in_a_line(self, "value", "metric", "count")


@dataclass(frozen=True)
class Scores:
    """The scores of one state on one split; ``value`` is the plain mean over its tasks, percent."""

    tasks: Mapping[str, TaskScore]

    def __repr__(self) -> str:
        return in_a_line(self, "value", "tasks")

    @property
    def value(self) -> float:
        """NaN when any task's score is, or is infinite, which the journal does not tell apart."""
        values = [task.value for task in self.tasks.values()]
        return float(np.mean(values)) if values and np.isfinite(values).all() else math.nan

    @property
    def perplexity(self) -> float | None:
        """The perplexity behind the one task's score (lower is better); None where there is none,
        or more than one task.
        """
        if len(self.tasks) != 1:
            return None
        (task,) = self.tasks.values()
        found = (v for k, v in (task.detail or {}).items() if "perplexity" in k.partition(",")[0])
        return next(found, None)

    def as_json(self) -> dict[str, Any]:
        """Plain values; NaN as null."""
        return {
            name: {
                "value": none(task.value),
                "metric": task.metric,
                "count": task.count,
                "items": None
                if task.items is None
                else {k: [float(f"{x:.9g}") for x in v] for k, v in task.items.items()},
                "detail": None if task.detail is None else dict(task.detail),
            }
            for name, task in self.tasks.items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Scores:
        """The inverse of as_json. Raises what Python does, or ValueError, where it is not."""
        return cls({name: _task(task) for name, task in values.items()})


class SameTasks:
    """What all scores of a run must be of: the means of different tasks would choose."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}  # by split

    def check(self, scores: Scores, split: str, who: str) -> None:
        """Raises FastmergeError, which begins with ``who``, for other tasks than the first score of
        ``split`` had. One that is no number may have any.
        """
        if math.isnan(scores.value):
            return
        names = sorted(scores.tasks)
        known = self._names.setdefault(split, names)
        if names != known:
            raise FastmergeError(
                f"{who}: scored one model on {brief(known)} and another on {brief(names)}; give "
                "all tasks of every model, NaN for a score that there is none of"
            )


def _task(task: Mapping[str, Any]) -> TaskScore:
    value, metric, count, items, detail = (
        task[key] for key in ("value", "metric", "count", "items", "detail")
    )
    if items is not None:
        items = {part: tuple(map(a_number, of)) for part, of in items.items()}
    if detail is not None:
        detail = {key: a_number(number) for key, number in detail.items()}
    if not isinstance(metric, str) or not is_whole(count) or not 0 <= count < 1 << 63:
        raise ValueError
    return TaskScore(math.nan if value is None else a_number(value), metric, count, items, detail)


def a_number(value: Any) -> float:
    """``value``, as JSON had it, which a float can be. Raises ValueError, OverflowError."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError
    float(value)
    number: float = value
    return number


def none(value: float | None) -> float | None:
    """The value as JSON can hold it: None for NaN and infinities."""
    return None if value is None or not math.isfinite(value) else value
