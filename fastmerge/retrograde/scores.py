"""What an evaluation says, and the journal that keeps it: scores in percent, by task and item."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmerge.errors import FastmergeError


@dataclass(frozen=True)
class TaskScore:
    """One task's score in percent. ``items``: each item's, by part (a group's tasks), if known."""

    value: float
    metric: str
    count: int
    items: Mapping[str, tuple[float, ...]] | None = None
    detail: Mapping[str, float] | None = None  # the harness's own numbers, perplexity, ...


@dataclass(frozen=True)
class Scores:
    """The scores of one state on one split; ``value`` is the plain mean over its tasks, percent."""

    tasks: Mapping[str, TaskScore]

    @property
    def value(self) -> float:
        """NaN when any task's score is."""
        values = [task.value for task in self.tasks.values()]
        return float(np.mean(values)) if values else math.nan

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


def digest(value: Any) -> str:
    """A short sha256 of a plain value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Journal:
    """Keyed results in a file of JSON lines, each line on disk before the next result is computed.

    What a killed run was writing at the end is a line without its end, and dropped.
    """

    def __init__(self, path: Path | None) -> None:
        """``path`` None keeps the results in memory only."""
        self._path = path
        self._known: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                raise FastmergeError(
                    f"{path}: line {number} is damaged; delete that line, whose result is then "
                    "measured again"
                ) from None

    def get(self, key: str) -> Any:
        """The value recorded under ``key``, or None."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Records a JSON-able value."""
        self._known[key] = value
        if self._path is None:
            return
        with self._path.open("ab") as file:
            file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def write_atomically(path: Path, data: str | bytes) -> None:
    """The whole file or the old one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)
