"""Pictures: accuracy against step, the comparison, a sweep."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastmerge.errors import FastmergeError

if TYPE_CHECKING:
    from fastmerge.retrograde.report import Line
    from fastmerge.retrograde.walking import Trajectory

_DEGRADE, _RETRACE, _BASELINE, _OTHER = "#c0392b", "#1f6fb4", "#222222", "#8a8a8a"


def trajectory_png(trajectory: Trajectory) -> bytes:
    """Score against step: degrade and retrace told apart, the baseline and the pool as lines."""
    figure, axes = _figure(8.0, 4.5)
    records = trajectory.state.records
    current = _value(trajectory, 0)
    if current is not None:
        axes.plot(0, current, "o", color=_BASELINE)
    for record in records:
        score = record.score
        kind = record.move.step.kind
        before = _value(trajectory, record.move.origin)
        if score is None or math.isnan(score):
            continue
        color = _DEGRADE if kind == "degrade" else _RETRACE
        if before is not None:
            axes.plot(
                [record.move.number - 1, record.move.number],
                [before, score],
                color=color,
                linestyle="-" if record.accepted else ":",
                zorder=1,
            )
        axes.plot(
            record.move.number,
            score,
            marker="v" if kind == "degrade" else "^",
            markerfacecolor=color if record.accepted else "white",
            markeredgecolor=color,
            color=color,
            zorder=2,
        )
    for number, scores in sorted(trajectory.models.items()):
        # Between two dollar signs matplotlib reads formulas.
        label = trajectory.schedule.labels[number].replace("$", r"\$")
        axes.axhline(
            scores.value,
            color=_BASELINE if number == 0 else _OTHER,
            linestyle="--" if number == 0 else (0, (1, 1 + number)),
            linewidth=1,
            label=f"{label} ({scores.value:.1f})",
        )
    for marker, color, text in (("v", _DEGRADE, "degrade"), ("^", _RETRACE, "retrace")):
        axes.plot([], [], marker=marker, color=color, label=text)
    if any(not record.accepted for record in records):
        axes.plot([], [], marker="o", color=_OTHER, markerfacecolor="white", label="refused")
    axes.set_xlabel("step")
    axes.set_ylabel("steering score, %")
    axes.set_xticks(range(len(records) + 1))
    axes.set_title("The walk")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return _png(figure)


def comparison_png(lines: list[Line], split: str) -> bytes:
    """Every row's score with its 95 % interval; the schedule's as a vertical line."""
    figure, axes = _figure(8.0, 0.6 + 0.42 * len(lines))
    for place, line in enumerate(reversed(lines)):
        color = _RETRACE if line.row.name == "schedule" else _BASELINE
        low = high = 0.0
        if line.interval is not None:
            low, high = line.value - line.interval.low, line.interval.high - line.value
        axes.errorbar(
            line.value, place, xerr=[[max(low, 0)], [max(high, 0)]], fmt="o", color=color, capsize=3
        )
        for other in line.row.repeats:
            axes.plot(other, place, "|", color=_OTHER, markersize=8)
    axes.axvline(lines[0].value, color=_RETRACE, linewidth=1, alpha=0.5)
    axes.set_yticks(range(len(lines)), [line.row.name for line in reversed(lines)])
    axes.set_xlabel(f"{split} score, % (95 % bootstrap interval over items)")
    return _png(figure)


def sweep_png(points: Sequence[tuple[float, float]]) -> bytes:
    """Score against t."""
    figure, axes = _figure(6.0, 3.5)
    axes.plot(*zip(*points, strict=True), "o-", color=_RETRACE)
    axes.set_xlabel("t")
    axes.set_ylabel("score, %")
    return _png(figure)


def _value(trajectory: Trajectory, state: int) -> float | None:
    score = trajectory.state.score(state)
    return None if score is None or math.isnan(score) else score


def require() -> None:
    """Raises FastmergeError where plots cannot be drawn: before hours of evaluation, not after."""
    if find_spec("matplotlib") is None:
        raise FastmergeError(
            "plots need matplotlib; install it with: pip install 'fastmerge[plot]'"
        )


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # No date and no version inside: the same run draws the same bytes.
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()
