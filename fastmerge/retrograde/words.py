"""The steps of a walk in words: for the model's card, the report and the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastmerge.output.card import escaped
from fastmerge.recipe.settings import Setting
from fastmerge.retrograde import driver
from fastmerge.retrograde.schedule import Step
from fastmerge.search.expressions import Model
from fastmerge.search.rows import figure

if TYPE_CHECKING:
    from fastmerge.evaluation.scores import Scores
    from fastmerge.retrograde.walking import Trajectory


def shown(setting: Setting) -> str:
    """A parameter as a person would write it."""
    parts = []
    for rule in setting.rules:
        values = [f"{v:g}" if isinstance(v, float) else str(v) for v in rule.values]
        text = values[0] if len(values) == 1 else f"[{', '.join(values)}]"
        parts.append(text if rule.filter is None else f"{rule.filter}: {text}")
    return "; ".join(parts)


def step_text(step: Step) -> str:
    """The method and its parameters: 'ties(t=0.3, density=0.5)'."""
    inner = ", ".join(f"{name}={shown(value)}" for name, value in step.parameters.items())
    return f"{step.method}({inner})"


def other_label(trajectory: Trajectory, record: driver.Record) -> str:
    """Whom a step merged with."""
    kind, number = record.move.other
    if kind == "model":
        return trajectory.schedule.labels[number]
    return trajectory.schedule.labels[0] if number == 0 else f"state {number}"


def verdict(record: driver.Record) -> str:
    """What became of a candidate."""
    if record.accepted:
        return "kept" if record.judged else "taken"
    return f"refused, back to state {record.state}"


def lineage_text(trajectory: Trajectory) -> str:
    """The schedule with the steps taken, as the recipe recorded in the model: valid YAML."""
    lines = [
        "# The final state of a retrograde schedule (fastmerge retrograde); steps taken:",
        f"#   seed {trajectory.seed}; state 0 is {trajectory.schedule.labels[0]}",
    ]
    for record in trajectory.state.records:
        move = record.move
        lines.append(
            f"#   {move.number}: from state {move.origin}, {move.step.kind} to "
            f"{other_label(trajectory, record)} by {step_text(move.step)}: "
            f"{verdict(record)}"
        )
    lines.append(f"#   the model is state {trajectory.final}")
    return "\n".join(lines) + "\n" + trajectory.schedule.text


def lineage_section(trajectory: Trajectory) -> str:
    """The model card's section on where the model comes from."""
    return "\n".join(["\n## Lineage\n", *step_table(trajectory, geometry=False)]) + "\n"


def measured(scores: Scores | None, value: float | None) -> str:
    """A score for a table: the perplexity where it steers, else percent."""
    return figure(value if scores is None or scores.perplexity is None else scores.perplexity)


def score_title(trajectory: Trajectory) -> str:
    """What `measured` gives, as the title of a column."""
    return "score, %" if perplexity_of_run(trajectory) is None else "perplexity"


def perplexity_of_run(trajectory: Trajectory) -> float | None:
    """The baseline's perplexity where one steers; None elsewhere."""
    first = trajectory.models.get(0)
    return None if first is None else first.perplexity


def is_copy(trajectory: Trajectory) -> bool:
    """Whether the final model is the baseline itself."""
    place = trajectory.geometry[trajectory.final]
    same = place is not None and place.norm == 0.0
    return same or trajectory.states[trajectory.final] == Model(0)


def step_table(trajectory: Trajectory, *, geometry: bool = True) -> list[str]:
    """Every step as a row of a Markdown table; with how far its candidate lies, if ``geometry``."""
    titles = ["step", "kind", "from", "with", "method", score_title(trajectory), "verdict"]
    label, score = trajectory.schedule.labels[0], trajectory.state.baseline_score
    rows = [["0", "baseline", "", label, "", measured(trajectory.scores[0], score), ""]]
    for record in trajectory.state.records:
        move = record.move
        rows.append(
            [
                str(move.number),
                move.step.kind,
                str(move.origin),
                f"{other_label(trajectory, record)} ({move.why})",
                step_text(move.step),
                measured(trajectory.scores[move.number], record.score),
                verdict(record),
            ]
        )
    if geometry:
        titles += ["angle", "distance"]
        for row, place in zip(rows, trajectory.geometry, strict=True):
            row.append("-" if place is None else f"{figure(place.angle, 3)}°")
            row.append("-" if place is None else f"{figure(100 * place.relative_norm)} %")
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return lines + [f"| {' | '.join(map(escaped, row))} |" for row in rows]
