"""What a search leaves to read: search.json, recipe.yml, report.md, report.html and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.evaluation.journal import write_own
from fastmerge.evaluation.scores import Scores, none
from fastmerge.output.card import escaped, fenced
from fastmerge.search.figures import comparison_png, heat_png, spent_png
from fastmerge.search.page import write_report
from fastmerge.search.rows import (
    SIGNIFICANT,
    Line,
    figure,
    lines_of,
    of_perplexity,
    split_name,
    with_interval,
)
from fastmerge.search.study import GRADIENT_COST, Study, Trial
from fastmerge.search.tables import by_task, comparison, leaderboard

if TYPE_CHECKING:
    from fastmerge.search.found import Found

RESULT_FILE, BEST_FILE = "search.json", "recipe.yml"
_SHOWN = 10  # candidates of the report's table
_TITLES = {
    "start": "the start point",
    "uniform": "the uniform average",
    "best_single": "the best single model",
}


def lines_for(found: Found) -> list[Line]:
    """The best and what needs no search, with intervals; the best comes first."""
    file, seed = found.study.file, found.study.seed
    return lines_of(found.rows, resamples=file.evaluate.bootstrap, seed=seed)


def write(found: Found) -> None:
    """Writes every file of a search's folder but the model and the journal."""
    out, study = found.out, found.study
    lines = lines_for(found)
    text = json.dumps(as_json(found, lines), indent=1) + "\n"
    write_own(out / RESULT_FILE, text)
    write_own(out / BEST_FILE, found.recipe)
    levels = {line.row.name: line.row.steer for line in lines[1:]}
    known = {name: scores for name, scores in levels.items() if math.isfinite(scores.value)}
    name = study.file.optimiser.name
    points = [(trial.spent, trial.scores) for trial in study.full]
    pictures = {
        "budget.png": spent_png({name: points}, known, study.file.budget.unit),
        "comparison.png": comparison_png(lines, split_name(lines)),
    }
    factors = study.lab.space.coefficients(found.best.state)
    if factors is not None:
        pictures["coefficients.png"] = heat_png(study.lab.space.names, factors, study.labels)
    write_report(out, "Search", markdown(found, lines, pictures), pictures)


# --- for programs ---


def as_json(found: Found, lines: Sequence[Line]) -> dict[str, Any]:
    """Everything the search knows, in plain values; scores in percent."""
    from fastmerge.version import __version__

    study = found.study
    budget, space = study.file.budget, study.lab.space
    return {
        "fastmerge": __version__,
        "seed": study.seed,
        "optimiser": study.file.optimiser.name,
        "evaluator": found.evaluator,
        "models": [
            {"label": label, "reference": reference, "fingerprint": space.input_fingerprint(number)}
            for number, (label, reference) in enumerate(
                zip(study.labels, study.references, strict=True)
            )
        ],
        "dimensions": [own.name for own in study.ranges.dimensions],
        "budget": {budget.unit: budget.most},
        "spent": study.spent,
        "candidates": [_trial_json(trial) for trial in study.trials],
        "best": found.best.number,
        "recipe": dict(study.recipe(found.best.point)),
        "front": [
            {**_trial_json(trial), "recipe": dict(study.recipe(trial.point))}
            for trial in study.front
        ],
        "comparison": [_line_json(line) for line in lines],
        "search": study.file.text,
    }


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "point": list(trial.point),
        "items a task": trial.limit,
        "score": none(trial.scores.value),
        "tasks": {name: none(task.value) for name, task in trial.scores.tasks.items()},
        **_perplexity(trial.scores),
        "spent": trial.spent,
    }


def _perplexity(scores: Scores) -> dict[str, Any]:
    found = scores.perplexity
    return {} if found is None else {"perplexity": none(found)}


def _line_json(line: Line) -> dict[str, Any]:
    def plain(scores: Scores | None) -> dict[str, Any] | None:
        if scores is None:
            return None
        tasks = {name: none(task.value) for name, task in scores.tasks.items()}
        return {"value": none(scores.value), "tasks": tasks, **_perplexity(scores)}

    return {
        "name": line.row.name,
        "how": line.row.how,
        "steering": plain(line.row.steer),
        "holdout": plain(line.row.holdout),
        **line.statistics("search"),
    }


# --- in words ---


def verdict(study: Study, lines: Sequence[Line]) -> str:
    """What the search came to, in a sentence."""
    best = study.best
    if best is not None and best.value == -math.inf:
        return "No candidate's score is a number: the model written is the start point."
    if best is not None and best is study.start and len(study.full) == 1:
        return "No other candidate was scored on all items: the model written is the start point."
    if best is not None and best is study.start:
        return "Nothing beat the start: the model written is the start point."
    if split_name(lines) == "steering":
        return "Without a hold-out nothing is claimed: the best of many looks better than it is."
    start = next(line for line in lines if line.row.name == "start")
    if start.lead is None:
        return "Whether the best is better than the start was not tested."
    return {
        "better": "On items that it never saw, the best is better than the start.",
        "worse": "On items that it never saw, the best is worse than the start.",
    }.get(start.outcome, "On items that it never saw, no gain over the start is shown.")


def sentences(lines: Sequence[Line]) -> list[str]:
    """The best beside each row that needs no search, one line each."""
    return [line.against(lines[0], _TITLES[line.row.name]) for line in lines[1:]]


def markdown(found: Found, lines: Sequence[Line], pictures: Mapping[str, bytes]) -> str:
    """The report. A reader needs nothing else to understand it."""
    study = found.study
    file, best = study.file, found.best
    count, budget = len(study.ranges.dimensions), file.budget
    split = split_name(lines)
    where = f"{count} number{'s' if count > 1 else ''} of a recipe"
    parts = [
        "# Search",
        (
            f"**{file.optimiser.name}** searched {where} of {len(study.labels)} models: "
            f"{len(study.trials)} candidates, {len(study.full)} of them on all items, "
            f"{study.spent} of {budget.most} {budget.unit}. The best, candidate {best.number}, is "
            f"in `model/`, its recipe in `{BEST_FILE}`. Seed {study.seed}."
        ),
        f"**{verdict(study, lines)}**",
        "## What it found",
        f"On the {split} items the best scores **{with_interval(lines[0])} %**"
        f"{' (95 % interval over items)' if lines[0].interval else ''}"
        f"{of_perplexity(lines[0].scores)}. Less each rival, in "
        "percent points, the same items for both"
        + (
            f"; *better* and *worse* mean p < {SIGNIFICANT} after Holm's correction:"
            if any(line.lead is not None for line in lines)
            else ":"
        ),
        "\n".join(sentences(lines)),
    ]
    if split == "steering":
        parts.append(
            "**No hold-out was given: these items chose the best, so its score here is "
            "optimistic.** Name `holdout` tasks, or a `split`."
        )
    parts += [
        "![best so far against what was spent](budget.png)",
        "## The best",
        fenced(found.recipe, "yaml"),
    ]
    if "coefficients.png" in pictures:
        parts += [
            "What it takes of each model, by layer (the mean over a layer's tensors):",
            "![effective coefficients by layer and model](coefficients.png)",
        ]
    parts += ["## Comparison", "![comparison](comparison.png)", comparison(lines, "search")]
    if file.evaluate.preset is not None:
        parts.append(leaderboard(lines, file.evaluate))
    parts += by_task(lines)
    parts += _front(study)
    parts += ["## Candidates", _best_table(study), _costs(study)]
    parts += _setup(found)
    return "\n\n".join(parts) + "\n"


def _front(study: Study) -> list[str]:
    front = study.front
    tasks = sorted(front[0].scores.tasks) if front else []
    if len(tasks) < 2:
        return []
    rows = [
        f"| candidate | {' | '.join(map(escaped, tasks))} | mean |",
        f"|---:|{'---:|' * (len(tasks) + 1)}",
    ]
    for trial in front:
        values = " | ".join(figure(trial.scores.tasks[task].value) for task in tasks)
        rows.append(f"| {trial.number} | {values} | {figure(trial.scores.value)} |")
    return [
        "## The front over the tasks",
        (
            "Candidates that no other beats on every task, steering, % (their recipes are in "
            f"`{RESULT_FILE}`):"
        ),
        "\n".join(rows),
    ]


def _best_table(study: Study) -> str:
    order = sorted(study.full, key=lambda t: (-t.value, t.number))[:_SHOWN]
    perplexity = any(trial.scores.perplexity is not None for trial in order)
    title = "perplexity" if perplexity else "steering, %"
    rows = [f"| candidate | {title} | where |", "|---:|---:|---|"]
    for trial in order:
        where = escaped(study.ranges.shown(trial.point))
        value = trial.scores.perplexity if perplexity else trial.scores.value
        rows.append(f"| {trial.number} | {figure(value)} | {where} |")
    return "\n".join(rows)


def _costs(study: Study) -> str:
    text = (
        "All candidates were scored on the same items. The rivals, and the hold-out, which the "
        "best and the rivals met once, are not part of the budget."
    )
    if study.file.optimiser.name == "gradient":
        text += (
            f" A gradient counts {GRADIENT_COST} times its items: one pass forward and one back, "
            "which is twice as long."
        )
    return text


def _setup(found: Found) -> list[str]:
    from fastmerge.version import __version__

    study = found.study
    rows = ["| model | fingerprint |", "|---|---|"]
    for number, label in enumerate(study.labels):
        digest = study.lab.space.input_fingerprint(number)[:16]
        rows.append(f"| {escaped(label)} | `{digest}` |")
    return [
        "## Setup",
        "\n".join(rows),
        f"Scored by {escaped(found.evaluator)}.",
        f"fastmerge {__version__}. The search:\n\n{fenced(study.file.text, 'yaml')}",
    ]
