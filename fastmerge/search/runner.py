"""A search from its file to its report: opens the models, scores candidates, writes the best.

The folder of a run holds a journal of every score. What an optimiser draws follows from the seed
and the scores, so a killed search resumes by asking again over the journal: no candidate that it
had measured is measured twice, and the end is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from fastmerge import api
from fastmerge.arguments import a_flag, a_function, a_path
from fastmerge.compute.cpu import thread_count
from fastmerge.engine.merge import merge_plan
from fastmerge.errors import FastmergeError, RecipeError, enough_memory
from fastmerge.evaluation.callables import ScoreFunction
from fastmerge.evaluation.journal import Journal, digest
from fastmerge.evaluation.outlook import Reading, slow_products
from fastmerge.evaluation.scorers import Scoring, check_kept
from fastmerge.models.model import folder_of
from fastmerge.planning.plan import Plan
from fastmerge.planning.planner import make_plan, whole_seed
from fastmerge.progress import Progress, Shown, shown
from fastmerge.recipe.document import Recipe
from fastmerge.search.document import SearchFile, load
from fastmerge.search.expressions import Expr, Model, uniform
from fastmerge.search.figures import require as require_plots
from fastmerge.search.folder import GRAM_FILE, JOURNAL_FILE, MODEL_FOLDER, prepare
from fastmerge.search.found import Found, recipe_text
from fastmerge.search.grams import cached_grams
from fastmerge.search.lab import Lab, Measurement
from fastmerge.search.opening import space_of
from fastmerge.search.optimisers import libraries, require
from fastmerge.search.ranges import Ranges
from fastmerge.search.recipes import check_form, expression, references_of, template_of
from fastmerge.search.report import write
from fastmerge.search.rows import Row, or_least
from fastmerge.search.search import drive
from fastmerge.search.study import Study, Trial
from fastmerge.search.workers import give_evaluators, notes_on, with_workers

SEED = 0  # of a search that names none
_TESTED = 4  # rows that meet the hold-out
_FREE = ("budget", "workers")  # keys of a file that do not decide what is asked for next


@enough_memory("search")
def run(
    source: Any,
    out: str | Path,
    *,
    resume: bool = False,
    seed: int | None = None,
    threads: int | None = None,
    score: ScoreFunction | None = None,
    data: str | Path | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    progress: Shown = None,
    on_trial: Callable[[Study], None] | None = None,
    on_score: Callable[[Measurement], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Found:
    """Searches into the folder ``out``: candidates, hold-out, report, the best as a model.

    ``source``: a path, YAML text, a mapping or a `SearchFile`. ``out``: a path. ``resume``:
    continue a search that was interrupted, or one that is over with a larger budget. ``seed``: a
    whole number in [0, 2^63), in place of the file's. ``threads``: of the CPU's pool, default
    FASTMERGE_NUM_THREADS or every CPU. ``score``: a function that stands in for what ``evaluate``
    scores by (a section that may be missing then). ``data``: a folder that stands in for
    ``evaluate.data``. ``workers``: instead of the file's, how many processes measure side by side,
    each with a model of its own and its share of the ``threads``. ``cluster``: a Ray cluster
    ("auto", "local" or an address) whose nodes measure. Every file is that of one process with a
    worker's threads. ``progress``: True for a bar on stderr, or a function of bytes done, bytes in
    all and a tensor's name. ``on_trial``, ``on_score``, ``on_note``: functions that are called with
    the study after each candidate, with each measurement, and with each remark.

    Returns a `Found`. Raises, before anything is written, RecipeError for what the file gets wrong,
    ModelError for its models, OutputError for what stands at ``out``, ResourceError for a package
    that is missing, FastmergeError for another argument.
    """
    functions = {"score": score, "on_trial": on_trial, "on_score": on_score, "on_note": on_note}
    for name, function in functions.items():
        a_function(function, name)
    file = with_workers(_given(source, data, score), workers, cluster)
    needed = libraries(file.optimiser.name)
    require_plots(*file.evaluate.libraries, optimiser=needed, cluster=cluster)
    say = on_note or logging.getLogger("fastmerge").warning
    folder = a_path(out, "out")
    with ExitStack() as kept:
        told = kept.enter_context(shown(progress, f"searching to {folder.name or folder}"))
        study, scoring = _opened(
            file, out, resume=resume, seed=seed, threads=threads, score=score, progress=told,
            on_score=on_score, scores_here=cluster is None,
        )  # fmt: skip
        kept.callback(study.close)
        for note in slow_products(file.evaluate) if cluster is None else ():
            say(note)
        give_evaluators(study, scoring, folder, cluster, threads, say, kept)
        _drive(study, on_trial)
        return finish(study, out, threads=threads, progress=told)


def _drive(study: Study, on_trial: Callable[[Study], None] | None) -> None:
    lab, told = study.lab, 0
    with lab.spare():  # for who has nothing else to measure
        lab.ahead((state, "steer", None) for _, _, state in _rivals(study))

    def measure(state: Expr) -> Any:
        nonlocal told
        if on_trial is not None and len(study.trials) != told:
            told = len(study.trials)
            on_trial(study)
        limit = study.limit
        lab.stage = f"candidate {len(study.trials)}" + (f", {limit} items" if limit else "")
        lab.ahead((coming, "steer", limit) for coming in (state, *study.ahead()))
        return lab.score(state, limit=limit)

    drive(study, measure)
    if on_trial is not None:
        on_trial(study)


def open_study(
    source: Any,
    out: str | Path,
    *,
    resume: bool = False,
    seed: int | None = None,
    threads: int | None = None,
    score: ScoreFunction | None = None,
    progress: Progress | None = None,
    on_score: Callable[[Measurement], None] | None = None,
    scored: bool = False,
) -> Study:
    """The study of a search in the folder ``out``, for callers that score what it asks for.

    ``source``: a path, YAML text, a mapping or a `SearchFile`. ``out``: a path. ``resume``:
    continue one that was interrupted. ``seed``: a whole number in [0, 2^63), in place of the
    file's. ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU. ``score``: a
    function that scores, for `Lab.score`. ``progress``: a function of bytes done, bytes in all and
    a tensor's name. ``on_score``: a function that is called with each measurement. ``scored``: by
    the file's own scorer, which needs its libraries.

    Returns a `Study`, which holds the folder until `finish` or its ``close``. Raises RecipeError
    for what the file gets wrong, ModelError for its models, OutputError for what stands at ``out``,
    FastmergeError for another argument.
    """
    study, _ = _opened(
        source, out, resume=resume, seed=seed, threads=threads, score=score, progress=progress,
        on_score=on_score, scored=scored,
    )  # fmt: skip
    return study


def _opened(
    source: Any,
    out: str | Path,
    *,
    resume: bool,
    seed: int | None,
    threads: int | None,
    score: ScoreFunction | None,
    progress: Progress | None,
    on_score: Callable[[Measurement], None] | None,
    scored: bool = True,
    scores_here: bool = True,
) -> tuple[Study, Scoring]:
    file = load(source, is_scored=score is not None or not scored)
    out, resume = a_path(out, "out"), a_flag(resume, "resume")
    a_function(progress, "progress")
    thread_count(threads)
    seed = None if seed is None else whole_seed(seed)
    ranges, template = opened(file)
    scoring = Scoring.of(file.evaluate, file.folder, folder_of(template.models[0]), score)
    scorer = scoring.scorer(scores=scores_here) if scored else None
    if resume and scorer is not None:
        check_kept(scorer)
    header = {"search": _identity(file, ranges), "inputs": [m.fingerprint for m in template.models]}
    own = SEED if file.seed is None else file.seed
    seed, hold = prepare(out, header, seed, own, resume=resume)
    cache = out / GRAM_FILE
    known = cached_grams(cache, template)
    space = space_of(template, known, cache=cache, threads=threads, progress=progress)
    lab = Lab(
        space,
        file.evaluate if scored else None,
        scorer,
        Journal(out / JOURNAL_FILE),
        threads=threads,
        folder=out,
        observe=on_score,
    )
    study = Study(file, ranges, lab, seed, hold)
    study.check_gradient()
    return study, scoring


def opened(file: SearchFile) -> tuple[Ranges, Plan]:
    """The ranges of a search, checked at their ends, and the plan of all its models. Raises
    FastmergeError, with the place in the file.
    """
    ranges = file.ranges()
    require(file.optimiser.name, ranges, file.optimiser.where)
    template: Plan | None = None
    for point in ranges.ends():
        ranges.document(point)
    ranges.check_between()
    for point in ranges.words():
        document = ranges.document(point)
        check_form(document)
        if template is None:
            template = template_of(document, file.folder, file.text)
            numbers = {name: number for number, name in enumerate(references_of(document))}
        expression(document, numbers, 0)
        # What only a recipe's own plan finds: numbers of models, parameters without a value.
        recipe = Recipe.of([ranges.recipe(point)], file.text, ranges.where)
        make_plan(recipe, base_folder=file.folder)
    assert template is not None
    names = {name for model in template.models for name in model.tensors}
    for word, where in ranges.per:
        if not any(word in name for name in names):
            raise RecipeError(f"{where}: 'per' {word} is in no tensor's name; nothing is searched")
    return ranges, template


def finish(
    study: Study,
    out: str | Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Found:
    """Scores the best and what needs no search on the hold-out, once, and writes everything: the
    model, its recipe, the report.

    ``study``: of `open_study`. ``out``: its folder. ``threads``: of the CPU's pool, default
    FASTMERGE_NUM_THREADS or every CPU. ``progress``: a function of bytes done, bytes in all and a
    tensor's name.

    Returns a `Found`. Raises FastmergeError where no candidate was scored on all items, OutputError
    where the model cannot be written.
    """
    out = a_path(out, "out")
    best = study.best
    if best is None:
        raise FastmergeError("search: no candidate was scored on all items; give a larger budget")
    lab = study.lab
    rows = _rows(study, best)
    text = recipe_text(study, best)
    plan = lab.space.plan(best.state, text)
    files = api.model_files(plan, out.name)
    written = merge_plan(
        plan,
        out / MODEL_FOLDER,
        threads=threads,
        overwrite=True,
        progress=progress,
        side_files=files,
    )
    evaluator = "the caller" if lab.scorer is None else lab.scorer.version
    found = Found(out, study, evaluator, rows, written)
    write(found)
    study.close()
    return found


def _rows(study: Study, best: Trial) -> tuple[Row, ...]:
    """The best, the start, the uniform average and the best single model; without a scorer the
    first two.
    """
    lab, start = study.lab, study.start
    assert start is not None
    history = tuple(trial.scores.value for trial in study.full)
    how = study.ranges.shown(best.point)
    many = len(study.trials)
    found = [Row("search", how, best.state, best.scores, None, many, (), history)]
    found.append(Row("start", "where the ranges start", start.state, start.scores, None, 1))
    if lab.scorer is not None:
        rivals = _rivals(study)
        lab.ahead((state, "steer", None) for _, _, state in rivals)
        scores = []
        for stage, _, state in rivals:
            lab.stage = stage
            scores.append(lab.score(state))
        (_, said, uniform), *singles = rivals
        found.append(Row("uniform", said, uniform, scores.pop(0), None, 0))
        first = max(range(len(singles)), key=lambda i: (or_least(scores[i].value), -i))
        _, said, single = singles[first]
        found.append(Row("best_single", said, single, scores[first], None, 0))
        if lab.scorer.has("holdout"):
            lab.ahead((row.state, "holdout", None) for row in found)
            found = [_held(row, lab) for row in found]
    return tuple(found)


def _rivals(study: Study) -> list[tuple[str, str, Expr]]:
    """The uniform average and every model by itself, each with what is said as it is measured and
    how it is made.
    """
    document = study.ranges.document(study.ranges.start)
    listed = [study.references.index(entry.model) for entry in document.models or ()]
    names = study.labels
    said = "the mean of " + ", ".join(names[i] for i in listed)
    models = range(study.lab.space.count)
    singles: list[tuple[str, str, Expr]] = [
        (names[i], f"{names[i]} as it is", Model(i)) for i in models
    ]
    return [("the uniform average", said, uniform(listed)), *singles]


def _held(row: Row, lab: Lab) -> Row:
    lab.stage = row.name
    return replace(row, holdout=lab.score(row.state, "holdout"))


def _identity(file: SearchFile, ranges: Ranges) -> str:
    """All that decides a search but its budget: one that is over goes on with a larger."""
    said = yaml.safe_load(file.text)
    said = {key: value for key, value in said.items() if key not in _FREE}
    foreign = [ranges.document(point).method.identity for point in ranges.words()]
    return digest([said, ranges.source, sorted(set(foreign))])


def _given(source: Any, data: str | Path | None, score: ScoreFunction | None = None) -> SearchFile:
    file = load(source, is_scored=score is not None)
    if data is None:
        return file
    return file.replace(evaluate=file.evaluate.with_data(data))


def _seconds(
    file: SearchFile,
    rows: Sequence[Reading],
    held: Sequence[Reading],
    template: Plan,
    models: int,
) -> float:
    """About how long all takes at most: what the budget buys, and the rivals and the hold-out."""
    from fastmerge.evaluation.outlook import seconds_for

    items, tokens = sum(row.items for row in rows), sum(row.tokens for row in rows)
    most = file.budget.most
    candidates = most / items if file.budget.unit == "items" else most
    rivals = 1 + models
    read = (candidates + rivals) * tokens + _TESTED * sum(row.tokens for row in held)
    parameters = sum(tensor.count for tensor in template.tensors)
    return seconds_for(round(read), parameters, file.evaluate)


def describe(
    source: Any,
    *,
    data: str | Path | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """What a search would do, in plain values. Reads headers, writes nothing, runs nothing that
    comes with the file.

    ``source``: a path, YAML text, a mapping or a `SearchFile`. ``data``: a folder that stands in
    for ``evaluate.data``. ``workers``: instead of the file's. ``cluster``: a Ray cluster ("auto",
    "local" or an address) that would measure. ``threads``: of the CPU's pool, default
    FASTMERGE_NUM_THREADS or every CPU.

    Returns models, ranges, budget, items and estimates by name, as JSON can hold them. Raises
    RecipeError, ModelError, ResourceError, FastmergeError for whatever `run` would refuse, as far
    as that shows without.
    """
    file = with_workers(_given(source, data), workers, cluster)
    needed = libraries(file.optimiser.name)
    require_plots(*file.evaluate.libraries, optimiser=needed, cluster=cluster)
    ranges, template = opened(file)
    references = references_of(ranges.document(ranges.start))
    scoring = Scoring.of(file.evaluate, file.folder, folder_of(template.models[0]))
    scorer = scoring.foreseen(scores=cluster is None)
    readings = getattr(scorer, "readings", None)
    rows = [] if readings is None else readings("steer")
    held = readings("holdout") if readings is not None and scorer.has("holdout") else []
    each = sum(row.items for row in rows)
    most = file.budget.most
    if file.budget.unit == "items" and each > most:
        raise RecipeError(
            f"{file.budget.at('items')}: one candidate takes {each} items, more than the budget"
        )
    notes = list(slow_products(file.evaluate) if cluster is None else ())
    if cluster is None and file.workers > 1:
        from fastmerge.evaluation.processes import share

        notes += notes_on(file, file.workers, share(file.workers, threads))
    return {
        "models": references,
        "optimiser": file.optimiser.name,
        "dimensions": [
            {
                "name": own.name,
                "from": own.low if own.is_number else None,
                "to": own.high if own.is_number else None,
                "choices": list(own.choices),
                "start": own.start,
            }
            for own in ranges.dimensions
        ],
        "budget": {file.budget.unit: most},
        "items of a candidate": each or None,
        "candidates on all items, about": most // each
        if each and file.budget.unit == "items"
        else None,
        "items held out": sum(row.items for row in held) or None,
        "seconds": _seconds(file, rows, held, template, len(references))
        if rows and cluster is None
        else None,
        "tasks": [{"task": r.task, "items": r.items, "tokens": r.tokens} for r in rows],
        "notes": [*template.notes, *notes],
    }
