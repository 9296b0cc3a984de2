"""Pictures of a run: accuracy against step, the comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.models.architecture import layer_of
from fastmerge.search.figures import BASELINE, DEGRADE, OTHER, RETRACE, new_figure, png

if TYPE_CHECKING:
    from fastmerge.methods.types import Float64
    from fastmerge.retrograde.findings import Line
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
        # Between two dollar signs matplotlib reads formulas.
        label = trajectory.schedule.labels[number].replace("$", r"\$")
        axes.axhline(
            scores.value,
            color=BASELINE if number == 0 else OTHER,
            linestyle="--" if number == 0 else (0, (1, 1 + number)),
            linewidth=1,
            label=f"{label} ({scores.value:.1f})",
        )
    for marker, color, text in (("v", DEGRADE, "degrade"), ("^", RETRACE, "retrace")):
        axes.plot([], [], marker=marker, color=color, label=text)
    if any(not record.accepted for record in records):
        axes.plot([], [], marker="o", color=OTHER, markerfacecolor="white", label="refused")
    axes.set_xlabel("step")
    axes.set_ylabel("steering score, %")
    axes.set_xticks(range(len(records) + 1))
    axes.set_title("The walk")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return png(figure)


def comparison_png(lines: list[Line], split: str) -> bytes:
    """Every row's score with its 95 % interval; the schedule's as a vertical line."""
    figure, axes = new_figure(8.0, 0.6 + 0.42 * len(lines))
    for place, line in enumerate(reversed(lines)):
        color = RETRACE if line.row.name == "schedule" else BASELINE
        low = high = 0.0
        if line.interval is not None:
            low, high = line.value - line.interval.low, line.interval.high - line.value
        axes.errorbar(
            line.value, place, xerr=[[max(low, 0)], [max(high, 0)]], fmt="o", color=color, capsize=3
        )
        for other in line.row.repeats:
            axes.plot(other, place, "|", color=OTHER, markersize=8)
    axes.axvline(lines[0].value, color=RETRACE, linewidth=1, alpha=0.5)
    axes.set_yticks(range(len(lines)), [line.row.name for line in reversed(lines)])
    axes.set_xlabel(f"{split} score, % (95 % bootstrap interval over items)")
    return png(figure)


def budget_png(lines: Sequence[Line], baseline: float) -> bytes:
    """The best steering score so far against the candidates measured, for each way of searching."""
    figure, axes = new_figure(8.0, 4.5)
    for line in lines:
        best, so_far = baseline, [baseline]
        for score in line.row.history:
            best = best if math.isnan(score) or score < best else score
            so_far.append(best)
        if len(so_far) == 1:
            continue
        is_walk = line.row.name == "schedule"
        axes.step(
            range(len(so_far)),
            so_far,
            where="post",
            color=RETRACE if is_walk else None,
            linewidth=2.5 if is_walk else 1.2,
            zorder=3 if is_walk else 2,
            label=line.row.name,
        )
    axes.axhline(baseline, color=BASELINE, linestyle="--", linewidth=1, label="baseline")
    axes.set_xlabel("candidates measured on all items")
    axes.set_ylabel("best steering score so far, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return png(figure)


def by_layer(names: Sequence[str], factors: Float64) -> tuple[list[str], Float64]:
    """Mean coefficients (tensors, models) of each layer, with titles: what stands before the
    layers, the layers by number, what stands behind them.
    """
    rows: dict[tuple[int, int], list[Float64]] = {}
    for name, row in zip(names, factors, strict=True):
        layer = layer_of(name)
        group = (1, layer.number) if layer else (0, 0) if "embed" in name else (2, 0)
        rows.setdefault(group, []).append(row)
    titles = {0: "embed", 2: "head"}
    ordered = sorted(rows)
    labels = [titles.get(kind, str(number)) for kind, number in ordered]
    return labels, np.stack([np.mean(rows[group], axis=0) for group in ordered])


def coefficients_png(result: Result) -> bytes | None:
    """The final state's effective coefficients by layer and model; None where there are none."""
    factors = result.space.coefficients(result.trajectory.states[result.trajectory.final])
    if factors is None:
        return None
    titles, means = by_layer(result.space.names, factors)
    models = [label.replace("$", r"\$") for label in result.trajectory.schedule.labels]
    figure, axes = new_figure(max(4.0, 1.5 + 0.3 * len(titles)), 1.2 + 0.4 * len(models))
    most = max(1.0, float(np.abs(means[np.isfinite(means)]).max(initial=0.0)))
    shown = axes.imshow(means.T, aspect="auto", cmap="RdBu", vmin=-most, vmax=most)
    axes.set_xticks(range(len(titles)), titles, fontsize=7, rotation=90 if len(titles) > 12 else 0)
    axes.set_yticks(range(len(models)), models)
    axes.set_xlabel("layer")
    figure.colorbar(shown, ax=axes, label="coefficient")
    return png(figure)


def _value(trajectory: Trajectory, state: int) -> float | None:
    score = trajectory.state.score(state)
    return None if score is None or math.isnan(score) else score
