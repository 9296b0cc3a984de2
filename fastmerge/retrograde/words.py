"""The steps of a walk in words: for the model's card, the report and the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastmerge.output.card import escaped
from fastmerge.recipe.settings import Setting
from fastmerge.retrograde import driver
from fastmerge.retrograde.schedule import Step

if TYPE_CHECKING:
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


def figure(value: float | None, digits: int = 2) -> str:
    """A number for a table; "-" for None and NaN."""
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def step_table(trajectory: Trajectory, *, geometry: bool = True) -> list[str]:
    """Every step as a row of a Markdown table; with how far its candidate lies, if ``geometry``."""
    titles = ["step", "kind", "from", "with", "method", "score, %", "verdict"]
    label, score = trajectory.schedule.labels[0], trajectory.state.baseline_score
    rows = [["0", "baseline", "", label, "", figure(score), ""]]
    for record in trajectory.state.records:
        move = record.move
        rows.append(
            [
                str(move.number),
                move.step.kind,
                str(move.origin),
                f"{other_label(trajectory, record)} ({move.why})",
                step_text(move.step),
                figure(record.score),
                verdict(record),
            ]
        )
    if geometry:
        titles += ["angle", "distance"]
        for row, place in zip(rows, trajectory.geometry, strict=True):
            row.append("-" if place is None else f"{place.angle:.3f}°")
            row.append("-" if place is None else f"{100 * place.relative_norm:.2f} %")
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return lines + [f"| {' | '.join(map(escaped, row))} |" for row in rows]
