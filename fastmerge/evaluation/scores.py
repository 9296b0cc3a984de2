"""What an evaluation says: scores in percent, by task and item."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmerge.errors import in_a_line


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
        """NaN when any task's score is."""
        values = [task.value for task in self.tasks.values()]
        return float(np.mean(values)) if values else math.nan

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
        """The inverse of as_json."""
        return cls(
            {
                name: TaskScore(
                    math.nan if task["value"] is None else task["value"],
                    task["metric"],
                    task["count"],
                    None
                    if task["items"] is None
                    else {k: tuple(v) for k, v in task["items"].items()},
                    task["detail"],
                )
                for name, task in values.items()
            }
        )


def none(value: float | None) -> float | None:
    """The value as JSON can hold it: None for NaN and infinities."""
    return None if value is None or not math.isfinite(value) else value
