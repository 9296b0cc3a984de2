"""A run from schedule to report: opens the models, walks, measures, compares, writes.

The folder of a run holds a journal of every score. The driver is pure, so a killed run resumes by
walking again over the journal: no step it had measured is measured twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastmerge import api
from fastmerge.arguments import a_flag, a_function, a_path, a_text
from fastmerge.compute.cpu import thread_count
from fastmerge.compute.tensor import Outcome
from fastmerge.engine.merge import merge_plan
from fastmerge.engine.report import MergeReport, Observer
from fastmerge.errors import RecipeError, UnsupportedError, enough_memory
from fastmerge.evaluation.journal import Journal, digest
from fastmerge.evaluation.settings import load_evaluate
from fastmerge.methods.types import Float64
from fastmerge.models.model import folder_of
from fastmerge.models.side_files import RECIPE_FILE, SCHEDULE_FILE
from fastmerge.planning.inputs import TensorPlan
from fastmerge.planning.plan import Plan
from fastmerge.planning.planner import whole_seed
from fastmerge.progress import Progress, Shown, shown
from fastmerge.retrograde import driver
from fastmerge.retrograde.opening import check_steps, open_template, origin
from fastmerge.retrograde.result import Result
from fastmerge.retrograde.schedule import Schedule, load
from fastmerge.retrograde.walking import OnStep, Trajectory, geometry_of, walk
from fastmerge.retrograde.words import lineage_section, lineage_text, step_text
from fastmerge.search.folder import GRAM_FILE, JOURNAL_FILE, MODEL_FOLDER, prepare
from fastmerge.search.grams import cached_grams, keep_grams
from fastmerge.search.opening import positions, space_of
from fastmerge.search.space import Space
from fastmerge.tree.collapse import collapse
from fastmerge.tree.nodes import Merge

if TYPE_CHECKING:
    from fastmerge.evaluation.callables import ScoreFunction
    from fastmerge.evaluation.outlook import Unread
    from fastmerge.evaluation.scorers import Scorer, Scoring
    from fastmerge.search.lab import Lab, Measurement


@enough_memory("retrograde")
def run(
    source: Any,
    out: str | Path,
    *,
    evaluate: bool = True,
    resume: bool = False,
    seed: int | None = None,
    threads: int | None = None,
    score: ScoreFunction | None = None,
    data: str | Path | None = None,
    cluster: str | None = None,
    progress: Shown = None,
    on_step: OnStep | None = None,
    on_row: Callable[[str], None] | None = None,
    on_score: Callable[[Measurement], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Result:
    """Runs a schedule into the folder ``out``: walks, measures, compares, reports.

    ``source``: a path, YAML text, a mapping or a `Schedule`. ``out``: a path. ``evaluate``: False
    walks without measuring. ``resume``: continue a run that was interrupted. ``seed``: a whole
    number in [0, 2^64), in place of the schedule's. ``threads``: of the CPU's pool, default
    FASTMERGE_NUM_THREADS or every CPU. ``score``: a function that stands in for what ``evaluate``
    scores by (a section that may be missing then). ``data``: a folder that stands in for
    ``evaluate.data``. ``cluster``: a Ray cluster ("auto", "local" or an address) whose nodes
    measure, side by side where one score does not wait for another; every file is that of a run
    without, with as many ``threads``. ``progress``: True for a bar on stderr, or a function of
    bytes done, bytes in all and a tensor's name. ``on_step``, ``on_row``, ``on_score``: functions
    that are called with each step, each family compared and each measurement; ``on_note``: with
    each remark, for which else the logger "fastmerge" stands.

    Returns a `Result`. Raises, before anything is written, RecipeError for what the schedule gets
    wrong, ModelError for its models, UnsupportedError for what is not done, OutputError for what
    stands at ``out``, ResourceError for a package that is missing, FastmergeError for another
    argument.
    """
    cluster = None if cluster is None else a_text(cluster, "cluster")
    schedule = _given(source, a_flag(evaluate, "evaluate"), data, is_scored=score is not None)
    out = a_path(out, "out")
    resume = a_flag(resume, "resume")
    for where, called in (("score", score), ("on_step", on_step)):
        a_function(called, where)
    a_function(on_row, "on_row")
    a_function(on_score, "on_score")
    a_function(on_note, "on_note")
    thread_count(threads)
    bar = shown(progress, f"running to {out.name or out}")
    seed = None if seed is None else whole_seed(seed)
    template = open_template(schedule)
    check_steps(schedule, template)
    scoring = _scoring(schedule, template, cluster, score)
    scorer = None if scoring is None else scoring.scorer(scores=cluster is None)
    if scoring is None and cluster is not None:
        raise UnsupportedError("cluster: measures, and this run measures nothing; leave it out")
    if resume and scorer is not None:
        from fastmerge.evaluation.scorers import check_kept

        check_kept(scorer)
    header = {
        "schedule": digest(
            [yaml.safe_load(schedule.text), schedule.evaluate is not None, *schedule.foreign]
        ),
        "inputs": [model.fingerprint for model in template.models],
    }
    own = driver.draw_seed() if schedule.seed is None else schedule.seed
    seed, hold = prepare(out, header, seed, own, resume=resume)
    with hold, bar as told:
        # Resumed, too: matrices that are read make other sums, and an output of other bits.
        if scorer is None and not _needs_distances(schedule):
            return _run_unmeasured(schedule, template, out, seed, threads, told, on_step)
        from fastmerge.retrograde.comparison import begin_beside, compare
        from fastmerge.retrograde.report import write

        cache = out / GRAM_FILE
        known = cached_grams(cache, template)
        say = on_note or logging.getLogger("fastmerge").warning
        for note in _notes(schedule, scorer, cluster):
            say(note)
        space = space_of(
            template,
            known,
            origin=origin(schedule),
            cache=cache,
            threads=threads,
            progress=told,
        )
        with ExitStack() as kept:
            lab = _lab(schedule, space, scoring, scorer, out, cluster, threads, on_score, kept)
            beside = None if lab.evaluators is None else partial(begin_beside, schedule, lab, seed)
            trajectory = walk(schedule, space, lab, seed, on_step=on_step, on_models=beside)
            rows = compare(trajectory, space, lab, on_row=on_row) if scorer is not None else ()
        written = _write_model(space, out / MODEL_FOLDER, trajectory, threads, told)
        result = Result(out, trajectory, rows, space, written)
        write(result)
        return result


def _notes(
    schedule: Schedule, scorer: Scorer | Unread | None, cluster: str | None
) -> tuple[str, ...]:
    """What a run's measurements come to on this machine."""
    if scorer is None or schedule.evaluate is None or cluster is not None:
        return ()
    from fastmerge.evaluation.outlook import slow_products

    return slow_products(schedule.evaluate)


def _lab(
    schedule: Schedule,
    space: Space,
    scoring: Scoring | None,
    scorer: Scorer | None,
    out: Path,
    cluster: str | None,
    threads: int | None,
    on_score: Callable[[Measurement], None] | None,
    kept: ExitStack,
) -> Lab:
    """What measures the run: this process, or until ``kept`` ends the nodes of ``cluster``."""
    from fastmerge.search.lab import Lab, LabMaker

    evaluators = None
    if scoring is not None and scorer is not None and cluster is not None:
        from fastmerge.evaluation.on_ray import evaluators_on

        make = LabMaker(space, scoring, scorer.key, out.absolute())
        device = scoring.settings.device
        evaluators = kept.enter_context(
            evaluators_on(cluster, make, out, device=device, threads=threads)
        )
    outlook = None if on_score is None else _outlook(schedule, scorer, space.template)
    most, seconds = (outlook["at most"], outlook["seconds"]) if outlook else (None, None)
    return Lab(
        space,
        schedule.evaluate,
        scorer,
        Journal(out / JOURNAL_FILE),
        threads=threads,
        folder=out,
        observe=on_score,
        most=most,
        expected=seconds / most if seconds else None,
        evaluators=evaluators,
    )


def _run_unmeasured(
    schedule: Schedule,
    template: Plan,
    out: Path,
    seed: int,
    threads: int | None,
    progress: Progress | None,
    on_step: OnStep | None,
) -> Result:
    """A walk that nothing steers needs no Gram matrix before the merge, which finds it on its way.

    So each weight is brought into memory once, and the walk costs what a one-shot merge does.
    """
    bare = Space(template, None, positions(template), origin(schedule))
    trajectory = walk(schedule, bare, None, seed, on_step=on_step)
    known: dict[str, Float64] = {}
    names = frozenset(bare.names)

    def observe(item: TensorPlan, outcome: Outcome) -> None:
        if outcome.gram is None or item.name not in names:
            return
        assert isinstance(item.root, Merge)
        tree = collapse(item.root)
        # A rule with a base, or of rows, reads another matrix than `engine.products.grams` finds.
        if tree.is_complete and tree.axis is None and tree.reference == 0:
            known[item.name] = outcome.gram

    written = _write_model(bare, out / MODEL_FOLDER, trajectory, threads, progress, observe)
    start = origin(schedule)
    space = space_of(template, known, origin=start, threads=threads, progress=progress)
    keep_grams(out / GRAM_FILE, template, dict(zip(space.names, space.grams, strict=True)))
    geometry = tuple(geometry_of(space, None, state) for state in trajectory.states)
    result = Result(out, replace(trajectory, geometry=geometry), (), space, written)
    from fastmerge.retrograde.report import write  # after the merge, whose memory it would add to

    write(result)
    return result


def _needs_distances(schedule: Schedule) -> bool:
    return any(step.partner in ("nearest", "farthest") for step in schedule.steps)


def _given(
    source: Any, evaluate: bool, data: str | Path | None, *, is_scored: bool = False
) -> Schedule:
    """``is_scored``: by a function given from Python, for which an `evaluate` section may miss."""
    schedule = source if isinstance(source, Schedule) else load(source, is_scored=is_scored)
    if is_scored and schedule.evaluate is None:
        schedule = schedule.replace(evaluate=load_evaluate(None, is_scored=True))
    if not evaluate:
        return schedule.without_evaluation()
    if data is None:
        return schedule
    if schedule.evaluate is None:
        raise RecipeError(f"{schedule.where}: 'data' is for an 'evaluate' section: add one")
    return schedule.replace(evaluate=schedule.evaluate.with_data(data))


def describe(
    source: Any,
    *,
    evaluate: bool = True,
    data: str | Path | None = None,
    cluster: str | None = None,
) -> dict[str, Any]:
    """What a run would do, in plain values: models, steps and costs. Reads headers, writes nothing,
    and runs nothing that comes with the schedule: a callable's module, task files.

    Raises FastmergeError for whatever `run` would refuse, missing tasks and data included, as far
    as that shows without.
    """
    schedule = _given(source, evaluate, data)
    template = open_template(schedule)
    check_steps(schedule, template)
    scoring = _scoring(schedule, template, cluster)
    scorer = None if scoring is None else scoring.foreseen(scores=cluster is None)
    walked = driver.walked(schedule)
    families = schedule.compare.methods if schedule.compare else ()
    entries = (schedule.baseline, *schedule.pool)
    given = [*(entry.accuracy for entry in entries), None]
    return {
        "models": [
            {"label": label, "reference": reference, "accuracy": given[number]}
            for number, (label, reference) in enumerate(
                zip(schedule.labels, schedule.references, strict=True)
            )
        ],
        "steps": [
            {
                "step": number,
                "kind": step.kind,
                "with": step.partner or step.toward,
                "method": step_text(step),
                "measured": driver.measured(schedule, number),
            }
            for number, step in enumerate(schedule.steps, start=1)
        ],
        "costs": {
            "bytes of weights": template.bytes_in,
            "evaluations of the walk": walked,
            "evaluations of the models": len(entries) if schedule.evaluate else 0,
            "families compared": len(families),
            "evaluations of each": schedule.budget(walked) if families else 0,
        },
        "measurements": _outlook(schedule, scorer, template),
        "notes": [*template.notes, *_notes(schedule, scorer, cluster)],
    }


def _outlook(
    schedule: Schedule, scorer: Scorer | Unread | None, template: Plan
) -> dict[str, Any] | None:
    """What a run measures at most, and for how long: seconds None where that shows only then."""
    if scorer is None or schedule.evaluate is None:
        return None
    from fastmerge.evaluation.outlook import seconds_for

    most = _most_measurements(schedule, scorer)
    found: dict[str, Any] = {
        "at most": sum(sum(parts.values()) for parts in most.values()),
        "of": {what: n for parts in most.values() for what, n in parts.items() if n},
        "one after another": _longest_chain(schedule, scorer),
        "tasks": [],
        "seconds": None,
    }
    readings = getattr(scorer, "readings", None)  # a callable's are its own affair
    if readings is None:
        return found
    tokens = 0
    for split, parts in most.items():
        count = sum(parts.values())
        for one in readings(split) if scorer.has(split) else ():
            row = {"task": one.task, "split": split, "items": one.items, "tokens": one.tokens}
            found["tasks"].append({**row, "times": count})
            tokens += count * one.tokens
    parameters = sum(tensor.count for tensor in template.tensors)
    found["seconds"] = seconds_for(tokens, parameters, schedule.evaluate)
    return found


def _longest_chain(schedule: Schedule, scorer: Scorer | Unread) -> int:
    """How many measurements wait for one another, however many evaluators a cluster has: the
    models, side by side; the walk, as far as it is judged, and its one-shot equivalent, beside what
    it is compared with; the report's.
    """
    settings = schedule.compare
    stages = 1 + len(schedule.evaluate.stages if schedule.evaluate else ())
    own = {"best_single": 0, "greedy_soup": len(schedule.pool)}
    families = [own.get(name, stages) for name in settings.methods] if settings else []
    walked = driver.rounds(schedule) + 1
    beside = max(families, default=0)
    if schedule.stop is not None:
        walked += max(0, beside - 1)
    again = settings is not None and settings.seeds > 1
    return 1 + max(walked, beside) + int(scorer.has("holdout") or again)


def _most_measurements(schedule: Schedule, scorer: Scorer | Unread) -> dict[str, dict[str, int]]:
    """How many scores a run measures at most, by split and what they are of: the models, the walk,
    what it is compared with, and of the rows of the report the hold-out and other masks.
    """
    walked = driver.walked(schedule)
    settings = schedule.compare
    families = [name for name in settings.methods if name != "best_single"] if settings else []
    budget = schedule.budget(walked)
    stages = 1 + len(schedule.evaluate.stages if schedule.evaluate else ())
    rows = 3 + (len(settings.methods) if settings else 0)
    again = (settings.seeds if settings else 1) - 1
    steer = {
        "the models": 1 + len(schedule.pool),
        "the walk": walked,
        "its one-shot equivalent": 1,
        "the families": len(families) * budget * stages,
    }
    if not scorer.has("holdout"):
        return {"steer": {**steer, "rows with other masks": rows * again}, "holdout": {}}
    held = {"rows on the hold-out": rows, "rows with other masks": rows * again}
    return {"steer": steer, "holdout": held}


def _scoring(
    schedule: Schedule, template: Plan, cluster: str | None, function: ScoreFunction | None = None
) -> Scoring | None:
    if schedule.evaluate is None:
        return None
    from fastmerge.evaluation.scorers import Scoring
    from fastmerge.search.figures import require

    require(*schedule.evaluate.libraries, cluster=cluster)
    return Scoring.of(schedule.evaluate, schedule.folder, folder_of(template.models[0]), function)


def _write_model(
    space: Space,
    folder: Path,
    trajectory: Trajectory,
    threads: int | None,
    progress: Progress | None,
    observe: Observer | None = None,
) -> MergeReport:
    """The final state as a model folder, its card with the steps that led to it."""
    text = lineage_text(trajectory)
    plan = space.plan(trajectory.states[trajectory.final], text)
    files = api.model_files(plan, folder.parent.name or folder.name)
    card = files["README.md"]
    assert isinstance(card, bytes)
    files["README.md"] = card + lineage_section(trajectory).encode()
    files[SCHEDULE_FILE] = files.pop(RECIPE_FILE)  # what it records is no recipe
    # Cheap beside an evaluation, and a folder half as old as the run would be a trap.
    return merge_plan(
        plan,
        folder,
        threads=threads,
        overwrite=True,
        progress=progress,
        side_files=files,
        observe=observe,
    )
