"""What a run came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastmerge.engine.report import MergeReport
from fastmerge.errors import in_a_line
from fastmerge.retrograde.walking import Trajectory
from fastmerge.search.space import Space

if TYPE_CHECKING:
    from fastmerge.search.rows import Row


@dataclass(frozen=True)
class Result:
    """A finished run.

    ``out``: the folder of the model that was written, None where none was. ``trajectory``: the
    steps and where they led. ``rows``: the result beside its rivals, with scores and intervals.
    ``space``: the models' geometry. ``report``: of the merge that wrote the model, or None.
    """

    out: Path | None
    trajectory: Trajectory
    rows: tuple[Row, ...]
    space: Space
    report: MergeReport | None

    def __repr__(self) -> str:
        return in_a_line(self, "out", "rows", "report")
