"""Pictures of a walk: accuracy against step, what its final state takes of each model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastmerge.search.figures import (
    BASELINE,
    DEGRADE,
    OTHER,
    RETRACE,
    heat_png,
    label,
    new_figure,
    png,
    score_axis,
)

if TYPE_CHECKING:
    from fastmerge.retrograde.result import Result
    from fastmerge.retrograde.walking import Trajectory


def trajectory_png(trajectory: Trajectory) -> bytes:
    """Score against step: degrade and retrace told apart, the baseline and the pool as lines."""
    figure, axes = new_figure(8.0, 4.5)
    records = trajectory.state.records
    current = _value(trajectory, 0)
    if current is not None:
        axes.plot(0, current, "o", color=BASELINE)
    for record in records:
        score = record.score
        kind = record.move.step.kind
        before = _value(trajectory, record.move.origin)
        if score is None or math.isnan(score):
            continue
        color = DEGRADE if kind == "degrade" else RETRACE
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
        axes.axhline(
            scores.value,
            color=BASELINE if number == 0 else OTHER,
            linestyle="--" if number == 0 else (0, (1, 1 + number)),
            linewidth=1,
            label=f"{label(trajectory.schedule.labels[number])} ({scores.value:.1f})",
        )
    for marker, color, text in (("v", DEGRADE, "degrade"), ("^", RETRACE, "retrace")):
        axes.plot([], [], marker=marker, color=color, label=text)
    if any(not record.accepted for record in records):
        axes.plot([], [], marker="o", color=OTHER, markerfacecolor="white", label="refused")
    axes.set_xlabel("step")
    axes.set_ylabel(f"{score_axis(trajectory.models.get(0))}, %")
    axes.set_xticks(range(len(records) + 1))
    axes.set_title("The walk")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return png(figure)


def coefficients_png(result: Result) -> bytes | None:
    """The final state's effective coefficients by layer and model; None where there are none."""
    factors = result.space.coefficients(result.trajectory.states[result.trajectory.final])
    if factors is None:
        return None
    return heat_png(result.space.names, factors, result.trajectory.schedule.labels)


def _value(trajectory: Trajectory, state: int) -> float | None:
    score = trajectory.state.score(state)
    return None if score is None or math.isnan(score) else score
