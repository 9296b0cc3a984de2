"""What a search came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastmerge.engine.report import MergeReport
from fastmerge.errors import in_a_line
from fastmerge.recipe import yaml_text
from fastmerge.search.rows import Row
from fastmerge.search.study import Study, Trial


@dataclass(frozen=True)
class Found:
    """A finished search.

    ``out``: its folder. ``study``: with every candidate. ``evaluator``: what scored, in words.
    ``rows``: the best beside what needs no search, with scores and intervals. ``report``: of the
    merge that wrote the best.
    """

    out: Path
    study: Study
    evaluator: str
    rows: tuple[Row, ...]
    report: MergeReport

    def __repr__(self) -> str:
        return in_a_line(self, "out", "evaluator", "rows", "report")

    @property
    def best(self) -> Trial:
        """The candidate that is written."""
        best = self.study.best
        assert best is not None
        return best

    @property
    def recipe(self) -> str:
        """The best's recipe as YAML."""
        return recipe_text(self.study, self.best)


def recipe_text(study: Study, trial: Trial) -> str:
    """A candidate's recipe as YAML, for `fastmerge merge`."""
    return yaml_text.write([study.recipe(trial.point)])
