"""trajectory.json: everything a run knows, in plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.evaluation.scores import Scores, none
from fastmerge.retrograde.words import other_label
from fastmerge.search.rows import Line

if TYPE_CHECKING:
    from fastmerge.retrograde.result import Result


# --- for programs ---


def as_json(result: Result, lines: Sequence[Line]) -> dict[str, Any]:
    """Everything the run knows, in plain values; scores in percent, angles in degrees."""
    from fastmerge.version import __version__

    trajectory = result.trajectory
    schedule = trajectory.schedule
    return {
        "fastmerge": __version__,
        "seed": trajectory.seed,
        "evaluator": trajectory.evaluator or None,
        "models": [
            {
                "label": label,
                "reference": reference,
                "fingerprint": result.space.input_fingerprint(number),
                "score": _score_json(trajectory.models.get(number)),
            }
            for number, (label, reference) in enumerate(
                zip(schedule.labels, schedule.references, strict=True)
            )
        ],
        "steps": [_step_json(result, number) for number in range(1, len(trajectory.states))],
        "final": trajectory.final,
        "comparison": [_line_json(line) for line in lines],
        "schedule": schedule.text,
    }


def _step_json(result: Result, number: int) -> dict[str, Any]:
    trajectory = result.trajectory
    record = trajectory.state.records[number - 1]
    move = record.move
    place = trajectory.geometry[number]
    return {
        "step": number,
        "kind": move.step.kind,
        "method": move.step.method,
        "parameters": {
            name: [[rule.filter, list(rule.values)] for rule in setting.rules]
            for name, setting in move.step.parameters.items()
        },
        "base": trajectory.schedule.base_of(move.step),
        "from": move.origin,
        "with": other_label(trajectory, record),
        "chosen": move.why,
        "seed": move.seed,
        "score": none(record.score),
        "scores": _score_json(trajectory.scores[number]),
        "judged": record.judged,
        "accepted": record.accepted,
        "state": record.state,
        "fingerprint": result.space.fingerprint(trajectory.states[number]),
        "norm": None if place is None else none(place.norm),
        "relative_norm": None if place is None else none(place.relative_norm),
        "angle_degrees": None if place is None else none(place.angle),
        "one_shot": None if place is None else list(place.one_shot),
        "residual": None if place is None else none(place.residual),
        "coefficients": _coefficients_json(result, number),
    }


def _coefficients_json(result: Result, number: int) -> dict[str, list[float]] | None:
    """Each tensor's effective coefficients over the models; None where there are none."""
    factors = result.space.coefficients(result.trajectory.states[number])
    if factors is None:
        return None
    if (factors == factors[:1]).all():
        return {"*": factors[0].tolist()}
    return {name: row.tolist() for name, row in zip(result.space.names, factors, strict=True)}


def _score_json(scores: Scores | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    return {
        "value": none(scores.value),
        "tasks": {
            name: {"value": none(t.value), "metric": t.metric, "items": t.count, "detail": t.detail}
            for name, t in scores.tasks.items()
        },
    }


def _line_json(line: Line) -> dict[str, Any]:
    return {
        "name": line.row.name,
        "how": line.row.how,
        "candidates": line.row.evaluations,
        "steering": _score_json(line.row.steer),
        "holdout": _score_json(line.row.holdout),
        **line.statistics("schedule"),
        "repeats": list(line.row.repeats),
        "history": [none(value) for value in line.row.history],
    }
