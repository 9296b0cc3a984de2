"""Merges beside one another: rows with their scores, and the statistics that compare them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastmerge.evaluation.scores import Scores, none
from fastmerge.evaluation.statistics import Interval, difference, holm, interval, untested
from fastmerge.search.expressions import Expr

SIGNIFICANT = 0.05  # of the Holm-adjusted p


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a state, how it was found, and its scores."""

    name: str
    how: str
    state: Expr
    steer: Scores
    holdout: Scores | None
    evaluations: int
    repeats: tuple[float, ...] = ()  # reported scores with other masks, where masks are drawn
    history: tuple[float, ...] = ()  # steering scores of its candidates, as they were measured


@dataclass(frozen=True)
class Line:
    """One row of the comparison with its statistics on the reported split."""

    row: Row
    value: float
    interval: Interval | None
    lead: Interval | None  # the first row's score less this row's, the same items
    p: float | None  # of the lead, Holm-adjusted over the rows

    @property
    def scores(self) -> Scores:
        """On the hold-out where there is one."""
        return self.row.steer if self.row.holdout is None else self.row.holdout

    @property
    def outcome(self) -> str:
        """What the first row is beside this one: better, worse, or no difference shown."""
        if self.lead is None or self.p is None or self.p >= SIGNIFICANT:
            return "no difference shown"
        return "better" if self.lead.value > 0 else "worse"

    def statistics(self, first: str) -> dict[str, Any]:
        """In plain values, for JSON; ``first``: what the first row is called."""
        found = self.interval
        return {
            "interval": None if found is None else [found.low, found.high],
            f"{first}_less_this": None if self.lead is None else list(self.lead[:3]),
            "p_holm": self.p,
        }

    def against(self, first: Line, title: str) -> str:
        """The first row beside this one, which is called ``title``, as an item of a list."""
        if self.lead is None:
            gap = figure(first.value - self.value, sign="+")
            why = untested(first.scores, self.scores)
            return f"- against {title}: {gap} points (not tested: {why})"
        return f"- against {title}: {in_points(self.lead, ' points')}, {self.outcome}"


def lines_of(rows: Sequence[Row], *, resamples: int, seed: int) -> list[Line]:
    """The rows with intervals over items; each is compared with the first."""
    if not rows:
        return []
    reported = [row.steer if row.holdout is None else row.holdout for row in rows]
    first = reported[0]
    leads = [
        None if i == 0 else difference(first, scores, resamples=resamples, seed=seed)
        for i, scores in enumerate(reported)
    ]
    adjusted = holm([float("nan") if lead is None else lead.p for lead in leads])
    return [
        Line(row, scores.value, interval(scores, resamples=resamples, seed=seed), lead, none(p))
        for row, scores, lead, p in zip(rows, reported, leads, adjusted, strict=True)
    ]


def split_name(lines: Sequence[Line]) -> str:
    """Which split the comparison reports."""
    return "hold-out" if lines and lines[0].row.holdout is not None else "steering"


def figure(value: float | None, digits: int = 2, sign: str = "") -> str:
    """A number for a table, with its sign for ``sign`` "+"; "-" for None and NaN. No zero has a
    minus.
    """
    if value is None or value != value:
        return "-"
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def or_least(value: float) -> float:
    """The value; for NaN what is below all others."""
    return value if value == value else float("-inf")


def measured(scores: Scores) -> str:
    """A score as people read it: its percent, or the perplexity where that is what was measured."""
    perplexity = scores.perplexity
    if perplexity is None:
        return f"{figure(scores.value)} %"
    return f"perplexity {figure(perplexity)}"


def of_perplexity(scores: Scores) -> str:
    """ ", a perplexity of 12.30" behind a score in percent; "" where none was measured."""
    found = scores.perplexity
    return "" if found is None else f", a perplexity of {figure(found)}"


def in_points(lead: Interval, unit: str = "") -> str:
    """A difference with its interval: '+1.20 [+0.30, +2.10]'."""
    value, low, high = (figure(x, sign="+") for x in lead[:3])
    return f"{value}{unit} [{low}, {high}]"


def with_interval(line: Line) -> str:
    """A score with its interval: '71.20 [69.00, 73.40]'."""
    if line.interval is None:
        return figure(line.value)
    return f"{figure(line.value)} [{figure(line.interval.low)}, {figure(line.interval.high)}]"
