"""What a run leaves to read: report.md, report.html and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.evaluation.journal import write_own
from fastmerge.output.card import escaped, fenced
from fastmerge.retrograde.findings import compare_lines, copy_text, finding, verdict_on_path
from fastmerge.retrograde.plots import coefficients_png, trajectory_png
from fastmerge.retrograde.record import as_json
from fastmerge.retrograde.words import measured, score_title, step_table
from fastmerge.search.figures import budget_png, comparison_png
from fastmerge.search.page import write_report
from fastmerge.search.rows import (
    SIGNIFICANT,
    Line,
    figure,
    of_perplexity,
    split_name,
    with_interval,
)
from fastmerge.search.tables import by_task, comparison, leaderboard

if TYPE_CHECKING:
    from fastmerge.retrograde.result import Result
    from fastmerge.retrograde.walking import Trajectory


def write(result: Result) -> None:
    """Writes every file of the run's folder but the model and the journal."""
    out = result.out
    if out is None:
        return
    lines = compare_lines(result)
    write_own(out / "trajectory.json", json.dumps(as_json(result, lines), indent=1) + "\n")
    pictures: dict[str, bytes] = {}
    if result.trajectory.models:
        pictures["trajectory.png"] = trajectory_png(result.trajectory)
        if len(lines) > 1:
            pictures["comparison.png"] = comparison_png(lines, split_name(lines))
            pictures["budget.png"] = budget_png(lines, result.trajectory.models[0].value)
        heat = coefficients_png(result)
        if heat is not None:
            pictures["coefficients.png"] = heat
    write_report(out, "Retrograde run", markdown(result, lines, list(pictures)), pictures)


# --- in words ---


def _effective_table(trajectory: Trajectory, numbers: Sequence[int]) -> list[str]:
    known = [(n, trajectory.geometry[n]) for n in numbers]
    places = [(n, place) for n, place in known if place is not None]
    if not places:
        return []
    labels = [escaped(label) for label in trajectory.schedule.labels]
    lines = [
        f"| state | {' | '.join(labels)} | residual |",
        f"|---:|{'---:|' * (len(labels) + 1)}",
    ]
    for number, place in places:
        weights = " | ".join(figure(weight, 4) for weight in place.one_shot)
        lines.append(f"| {number} | {weights} | {figure(100 * place.residual)} % |")
    return lines


def markdown(result: Result, lines: Sequence[Line], pictures: Sequence[str]) -> str:
    """The report. A reader needs nothing else to understand it."""
    trajectory = result.trajectory
    schedule = trajectory.schedule
    records = trajectory.state.records
    refused = sum(not record.accepted for record in records)
    parts = [
        "# Retrograde run",
        (
            f"A walk of {_count(len(records), 'step')} from **{escaped(schedule.labels[0])}** "
            f"through {_count(len(trajectory.used), 'other model')}. A *degrade* step merges the "
            "current state with a weaker model; a *retrace* step merges it back with an earlier, "
            f"stronger one. {refused} of the candidates {'was' if refused == 1 else 'were'} "
            f"refused (accept: {schedule.accept.rule}). "
            f"The final model is state {trajectory.final}, in `model/`. Seed {trajectory.seed}."
        ),
    ]
    if copy_text(trajectory, lines):
        parts.append(f"**{escaped(copy_text(trajectory, lines))}**")
    if lines:
        parts.append(
            f"## What it found\n\nOn the {split_name(lines)} items, the final model scores "
            f"**{with_interval(lines[0])} %**"
            f"{' (95 % interval over items)' if lines[0].interval else ''}"
            f"{of_perplexity(lines[0].scores)}. "
            + " ".join(filter(None, [verdict_on_path(lines), _how_tested(lines)]))
        )
        parts.append("\n".join(finding(lines)))
        if split_name(lines) == "steering":
            parts.append(
                "**No hold-out was given: these items steered the walk and the search, so every "
                "score here is optimistic.** Name `holdout` tasks in the schedule, or a `split`."
            )
    else:
        parts.append("Nothing was measured: this run says nothing about how good the model is.")
    parts.append("## The walk\n")
    if "trajectory.png" in pictures:
        parts.append("![accuracy against step](trajectory.png)")
    parts.append("\n".join(step_table(trajectory)))
    parts.append(
        "*From*: the state a step starts at. *Angle* and *distance* (in percent of the baseline's "
        "norm) say how far the candidate lies from the baseline's weights."
    )
    effective = _effective_table(trajectory, range(len(trajectory.states)))
    if effective:
        parts.append(
            "## What the states are equivalent to\n\nOne linear merge of whole models comes this "
            "close to each state; *residual* is the distance that remains, as a share of the "
            "state's own distance from the baseline. A residual near 0 means that the path "
            "added nothing that one merge with these weights does not have."
        )
        parts.append("\n".join(effective))
    if "coefficients.png" in pictures:
        parts.append(
            "What the final model takes of each model, by layer (the mean over a layer's tensors):"
        )
        parts.append("![effective coefficients by layer and model](coefficients.png)")
    if lines:
        parts += _comparison(result, lines, pictures)
    parts += _setup(result, lines)
    return "\n\n".join(parts) + "\n"


def _how_tested(lines: Sequence[Line]) -> str:
    text = "The schedule less each rival, in percent points, the same items for both"
    if any(line.lead is not None for line in lines):
        text += (
            f"; *better* and *worse* mean p < {SIGNIFICANT} after Holm's correction over all rows"
        )
    return f"{text}:"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _comparison(result: Result, lines: Sequence[Line], pictures: Sequence[str]) -> list[str]:
    split = split_name(lines)
    parts = ["## Comparison\n"]
    if "comparison.png" in pictures:
        parts.append("![comparison](comparison.png)")
    if "budget.png" in pictures:
        parts.append("![best so far against candidates measured](budget.png)")
    parts.append(comparison(lines, "schedule", counted=True))
    parts.append(
        "Every family drew as many candidates as it says, and the best on the steering score was "
        f"chosen{'' if split == 'steering' else f'; only that one met the {split} items'}. "
        "Intervals resample items (paired for differences); they say nothing about other training "
        "seeds."
        + (
            " `one_shot` is the one merge that lies nearest to the walk: the null hypothesis of "
            "the whole idea."
            if any(line.row.name == "one_shot" for line in lines)
            else ""
        )
    )
    schedule = result.trajectory.schedule
    if schedule.evaluate is not None and schedule.evaluate.preset is not None:
        parts.append(leaderboard(lines, schedule.evaluate))
    return parts + by_task(lines)


def _setup(result: Result, lines: Sequence[Line]) -> list[str]:
    from fastmerge.version import __version__

    trajectory = result.trajectory
    schedule = trajectory.schedule
    title = score_title(trajectory).replace("score", "measured")
    rows = [f"| model | given, % | {title} | fingerprint |", "|---|---:|---:|---|"]
    given = [schedule.baseline.accuracy, *(entry.accuracy for entry in schedule.pool), None]
    for number, label in enumerate(schedule.labels):
        own = trajectory.models.get(number)
        digest = result.space.input_fingerprint(number)[:16]
        found = measured(own, None if own is None else own.value)
        rows.append(f"| {escaped(label)} | {figure(given[number])} | {found} | `{digest}` |")
    parts = ["## Setup", "\n".join(rows)]
    if lines:
        steer = escaped(", ".join(lines[0].row.steer.tasks))
        held = lines[0].row.holdout
        parts.append(
            f"Scored by {escaped(trajectory.evaluator)}. Steering: {steer}. "
            f"Hold-out: {escaped(', '.join(held.tasks)) if held is not None else 'none'}."
        )
    parts.append(f"fastmerge {__version__}. The schedule:\n\n{fenced(schedule.text, 'yaml')}")
    return parts
