"""A run from schedule to report: opens the models, walks, measures, compares, writes.

The folder of a run holds a journal of every score. The driver is pure, so a killed run resumes by
walking again over the journal: no step it had measured is measured twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastmerge import api, engine
from fastmerge.algebra import Float64, Merge, Source
from fastmerge.compute import Outcome
from fastmerge.errors import FastmergeError
from fastmerge.plan import Plan, TensorPlan, make_plan
from fastmerge.recipe import Document, Recipe
from fastmerge.recipe_yaml import LocatedDict, LocatedList
from fastmerge.retrograde import baselines, driver
from fastmerge.retrograde.driver import Move, State
from fastmerge.retrograde.evaluate import Lab, ScoreFunction, make_scorer
from fastmerge.retrograde.schedule import Schedule, load
from fastmerge.retrograde.scores import Journal, Scores, digest, write_atomically
from fastmerge.retrograde.states import (
    Blend,
    Expr,
    Geometry,
    Model,
    Space,
    average,
    merged,
    order,
    take,
)
from fastmerge.stage import View, position

JOURNAL_FILE, HEADER_FILE, GRAM_FILE, MODEL_FOLDER = (
    "journal.jsonl",
    "run.json",
    "grams.npz",
    "model",
)


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a state, how it was found, and its scores."""

    name: str
    how: str
    state: Expr
    steer: Scores
    holdout: Scores | None
    evaluations: int
    repeats: tuple[float, ...] = ()  # reported scores with other masks, where masks are drawn


@dataclass(frozen=True)
class Trajectory:
    """What a walk did; ``states`` and ``geometry`` are by step, 0 the baseline."""

    schedule: Schedule
    state: State
    states: tuple[Expr, ...]
    scores: tuple[Scores | None, ...]
    geometry: tuple[Geometry | None, ...]
    models: Mapping[int, Scores]  # steering scores of the baseline and the pool, by number
    seed: int
    evaluator: str  # what scored, or ""

    @property
    def final(self) -> int:
        """The step whose state is the final model."""
        return driver.final_state(self.schedule, self.state)

    @property
    def used(self) -> list[int]:
        """The pool models that the walk merged in, in order of first use."""
        return list(dict.fromkeys(
            r.move.other[1] for r in self.state.records if r.move.other[0] == "model"
        ))  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A finished run."""

    out: Path | None
    trajectory: Trajectory
    rows: tuple[Row, ...]
    space: Space
    report: engine.MergeReport | None


OnStep = Callable[[Trajectory], None]


def open_template(schedule: Schedule) -> Plan:
    """The plan of a linear merge of all models of the run: from headers, can they be merged?"""
    owners = [(entry.model, entry.at("model")) for entry in (schedule.baseline, *schedule.pool)]
    if len(schedule.references) > len(owners):
        owners.append((schedule.references[-1], schedule.at("base_model")))
    models = LocatedList()
    for reference, where in owners:
        entry = LocatedDict(model=reference, parameters=_located({"weight": 1.0}, where))
        entry.where, entry.at = where, {"model": where, "parameters": where}
        models.append(entry)
    models.where, models.at = schedule.where, [where for _, where in owners]
    document = {
        "merge_method": "linear",
        "models": models,
        "parameters": _located({"normalize": False}, schedule.where),
        "dtype": schedule.dtype,
        **({} if schedule.out_dtype is None else {"out_dtype": schedule.out_dtype}),
    }
    if schedule.out_dtype is None:
        del document["dtype"]  # the models' own type
    recipe = Recipe((Document.model_validate(_located(document, schedule.where)),), schedule.text)
    return make_plan(recipe, base_folder=schedule.folder)


def _located(values: Mapping[str, Any], where: str) -> LocatedDict:
    found = LocatedDict(values)
    found.where, found.at = where, dict.fromkeys(values, where)
    return found


def open_space(
    schedule: Schedule,
    *,
    cache: Path | None = None,
    threads: int | None = None,
    progress: engine.Progress | None = None,
) -> Space:
    """The models' geometry: one pass over the weights, or none where ``cache`` holds its result."""
    template = open_template(schedule)
    known = {} if cache is None else _cached_grams(cache, template)
    return _space(schedule, template, known, cache=cache, threads=threads, progress=progress)


def _space(
    schedule: Schedule,
    template: Plan,
    known: Mapping[str, Float64],
    *,
    cache: Path | None = None,
    threads: int | None = None,
    progress: engine.Progress | None = None,
) -> Space:
    """The space with Gram matrices: those ``known`` by tensor, the others from the weights."""
    items = merged(template)
    missing = {
        item.name: [part for part in item.root.operands if isinstance(part, Source)]
        for item in items
        if isinstance(item.root, Merge) and item.name not in known
    }
    found = dict(known)
    if missing:
        found |= engine.grams(template.models, missing, threads=threads, progress=progress)
        if cache is not None:
            _keep_grams(cache, template, found)
    grams = np.stack([found[item.name] for item in items])
    return Space(template, grams, _positions(template), _origin(schedule))


def _positions(template: Plan) -> list[float]:
    """Where each merged tensor's layer lies in its stack, for gradients."""
    whole = View("", template.config, {t.name: t for t in template.tensors}, template.donor)
    return [position(whole, item.name) for item in merged(template)]


def _origin(schedule: Schedule) -> int:
    return 0 if schedule.base_model is None else schedule.model_index("base_model") or 0


def _gram_key(template: Plan) -> str:
    return digest([model.fingerprint for model in template.models])


def _cached_grams(path: Path, template: Plan) -> dict[str, Float64]:
    """What an earlier run of the same models left; nothing where there was none."""
    if not path.is_file():
        return {}
    with np.load(path) as file:
        if str(file["key"]) != _gram_key(template):
            return {}
        names = [str(name) for name in file["names"]]
        return dict(zip(names, file["grams"], strict=True))


def _keep_grams(path: Path, template: Plan, grams: Mapping[str, Float64]) -> None:
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.savez(
            file,
            key=np.array(_gram_key(template)),
            names=np.array(list(grams)),
            grams=np.stack(list(grams.values())),
        )
    temporary.replace(path)


def walk(
    schedule: Schedule,
    space: Space,
    lab: Lab | None,
    seed: int,
    *,
    on_step: OnStep | None = None,
) -> Trajectory:
    """Takes every step of the schedule. ``lab`` None: nothing is measured."""
    models: dict[int, Scores] = {}
    given = {
        i: e.accuracy
        for i, e in enumerate((schedule.baseline, *schedule.pool))
        if e.accuracy is not None
    }
    evaluates = lab is not None and lab.scorer is not None
    if lab is not None and evaluates:
        models = {i: lab.score(Model(i)) for i in range(len(schedule.pool) + 1)}
    accuracies = {**given, **{i: scores.value for i, scores in models.items()}}
    states: list[Expr] = [Model(0)]
    scores: list[Scores | None] = [models.get(0)]
    geometry: list[Geometry | None] = [_geometry(space, lab, Model(0))]
    state = State(seed=seed, baseline_score=accuracies.get(0))

    def so_far() -> Trajectory:
        return Trajectory(
            schedule, state, tuple(states), tuple(scores), tuple(geometry), models, seed,
            lab.scorer.version if lab is not None and lab.scorer is not None else "",
        )  # fmt: skip

    if on_step is not None:
        on_step(so_far())
    while True:
        state = replace(
            state, distances=_distances(schedule, space, lab, states[state.current], state)
        )
        move = driver.next_step(schedule, state, accuracies)
        if move is None:
            return so_far()
        states.append(make(schedule, move, states))
        score = None
        if lab is not None and evaluates and driver.measured(schedule, move.number):
            score = lab.score(states[-1])
        scores.append(score)
        geometry.append(_geometry(space, lab, states[-1]))
        state = driver.judge(schedule, state, move, None if score is None else score.value)
        if on_step is not None:
            on_step(so_far())


def make(schedule: Schedule, move: Move, states: Sequence[Expr]) -> Blend:
    """The candidate that ``move`` makes; ``states`` by step number."""
    kind, number = move.other
    other: Expr = Model(number) if kind == "model" else states[number]
    return take(schedule, move.step, states[move.origin], other, move.seed)


def _geometry(space: Space, lab: Lab | None, state: Expr) -> Geometry | None:
    factors = space.coefficients(state)
    if factors is not None:
        return space.geometry(factors)
    if not space.is_measured:
        return None
    return None if lab is None or lab.scorer is None else lab.geometry(state)


def _distances(
    schedule: Schedule, space: Space, lab: Lab | None, current: Expr, state: State
) -> Mapping[int, float]:
    """Each pool model's angle to the current state, where the next step needs it."""
    number = len(state.records)
    steps = schedule.steps
    if number >= len(steps) or steps[number].partner not in ("nearest", "farthest"):
        return {}
    found = _geometry(space, lab, current)
    if found is None:
        assert lab is not None
        found = lab.geometry(current)
    return {i: found.angles[i] for i in range(1, len(schedule.pool) + 1)}


def compare(
    trajectory: Trajectory, space: Space, lab: Lab, *, on_row: Callable[[str], None] | None = None
) -> tuple[Row, ...]:
    """The schedule beside its one-shot equivalent, the baseline and the families of ``compare``.

    Every family gets as many evaluations as the walk made; the chosen ones meet the hold-out once.
    """
    schedule = trajectory.schedule
    settings = schedule.compare
    final = trajectory.states[trajectory.final]
    measured = [s for s in trajectory.scores[1:] if s is not None]
    budget = settings.budget if settings and settings.budget else max(1, len(measured))
    repeats = settings.seeds if settings else 1
    found = [
        baselines.Entry(
            "schedule", final, lab.score(final), len(measured), "the walk's final state"
        )
    ]
    place = _geometry(space, lab, final)
    if place is not None and not isinstance(final, Model):
        one = average([Model(i) for i in range(space.count)], list(place.one_shot))
        how = (
            f"one linear merge at the walk's effective weights ({place.residual:.1%} off the walk)"
        )
        found.append(baselines.Entry("one_shot", one, lab.score(one), 0, how))
    found.append(
        baselines.Entry("baseline", Model(0), lab.score(Model(0)), 0, schedule.baseline.label)
    )
    pool = baselines.pool_of(schedule, trajectory.used)
    own = [trajectory.models[i].value for i in sorted(trajectory.models)]
    stages = schedule.evaluate.stages if schedule.evaluate else ()
    for name in settings.methods if settings else ():
        if on_row is not None:
            on_row(name)
        entry = baselines.search(
            name, pool, lab, own, budget=budget, seed=trajectory.seed, stages=stages
        )
        if entry is not None:
            found.append(entry)
    return tuple(_row(entry, lab, repeats) for entry in found)


def _row(entry: baselines.Entry, lab: Lab, repeats: int) -> Row:
    assert lab.scorer is not None
    split = "holdout" if lab.scorer.has("holdout") else "steer"
    held = lab.score(entry.state, "holdout") if split == "holdout" else None
    again: tuple[float, ...] = ()
    if repeats > 1 and baselines.is_random(entry.state):
        first = held.value if held is not None else entry.steer.value
        others = [baselines.reseeded(entry.state, shift) for shift in range(1, repeats)]
        again = (first, *(lab.score(state, split).value for state in others))
    return Row(entry.name, entry.how, entry.state, entry.steer, held, entry.candidates, again)


def run(
    source: Any,
    out: str | Path,
    *,
    evaluate: bool = True,
    resume: bool = False,
    seed: int | None = None,
    threads: int | None = None,
    score: ScoreFunction | None = None,
    progress: engine.Progress | None = None,
    on_step: OnStep | None = None,
    on_row: Callable[[str], None] | None = None,
) -> Result:
    """Runs a schedule (path, YAML text, dict or `Schedule`) into the folder ``out``.

    ``score`` stands in for the schedule's ``callable``. ``evaluate`` False walks without measuring.
    ``resume`` continues a run that was interrupted. Raises FastmergeError, before anything is
    written, for what the schedule or its models get wrong.
    """
    from fastmerge.retrograde import report

    schedule = source if isinstance(source, Schedule) else load(source)
    if not evaluate:
        schedule = schedule.without_evaluation()
    out = Path(out)
    template = open_template(schedule)
    scorer = None
    if schedule.evaluate is not None:
        scorer = make_scorer(schedule.evaluate, schedule.folder, template.models[0].path, score)
    seed = _prepare(out, schedule, template, seed, resume)
    cache = out / GRAM_FILE
    known = _cached_grams(cache, template)
    if scorer is None and not known and not _needs_distances(schedule):
        return _run_unmeasured(schedule, template, out, seed, threads, progress, on_step)
    space = _space(schedule, template, known, cache=cache, threads=threads, progress=progress)
    journal = Journal(out / JOURNAL_FILE)
    lab = Lab(space, schedule.evaluate, scorer, journal, threads=threads)
    trajectory = walk(schedule, space, lab, seed, on_step=on_step)
    rows = compare(trajectory, space, lab, on_row=on_row) if scorer is not None else ()
    written = _write_model(space, out / MODEL_FOLDER, trajectory, threads, progress)
    result = Result(out, trajectory, rows, space, written)
    report.write(result)
    return result


def _run_unmeasured(
    schedule: Schedule,
    template: Plan,
    out: Path,
    seed: int,
    threads: int | None,
    progress: engine.Progress | None,
    on_step: OnStep | None,
) -> Result:
    """A walk that nothing steers needs no Gram matrix before the merge, which finds it on its way.

    So each weight is brought into memory once, and the walk costs what a one-shot merge does.
    """
    from fastmerge.retrograde import report

    bare = Space(template, None, _positions(template), _origin(schedule))
    trajectory = walk(schedule, bare, None, seed, on_step=on_step)
    known: dict[str, Float64] = {}
    names = frozenset(bare.names)

    def observe(item: TensorPlan, outcome: Outcome) -> None:
        if outcome.gram is not None and item.name in names:
            known[item.name] = outcome.gram

    final = trajectory.states[trajectory.final]
    collapses = not isinstance(final, Model) and all(
        node.method.is_combination for node in order(final)
    )
    written = _write_model(
        bare, out / MODEL_FOLDER, trajectory, threads, progress, observe if collapses else None
    )
    cache = out / GRAM_FILE
    space = _space(schedule, template, known, cache=cache, threads=threads, progress=progress)
    _keep_grams(cache, template, dict(zip(space.names, space.grams, strict=True)))
    geometry = tuple(_geometry(space, None, state) for state in trajectory.states)
    result = Result(out, replace(trajectory, geometry=geometry), (), space, written)
    report.write(result)
    return result


def _needs_distances(schedule: Schedule) -> bool:
    return any(step.partner in ("nearest", "farthest") for step in schedule.steps)


def describe(source: Any, *, evaluate: bool = True) -> dict[str, Any]:
    """What a run would do, in plain values: models, steps and costs. Reads headers, writes nothing.

    Raises FastmergeError for whatever `run` would refuse, missing tasks and data included.
    """
    from fastmerge.retrograde import report

    schedule = source if isinstance(source, Schedule) else load(source)
    if not evaluate:
        schedule = schedule.without_evaluation()
    template = open_template(schedule)
    if schedule.evaluate is not None:
        make_scorer(schedule.evaluate, schedule.folder, template.models[0].path)
    measured = [driver.measured(schedule, n) for n in range(1, len(schedule.steps) + 1)]
    families = schedule.compare.methods if schedule.compare else ()
    budget = (schedule.compare and schedule.compare.budget) or max(1, sum(measured))
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
                "method": report.step_text(step),
                "measured": measured[number - 1],
            }
            for number, step in enumerate(schedule.steps, start=1)
        ],
        "costs": {
            "bytes of weights": template.bytes_in,
            "evaluations of the walk": sum(measured),
            "evaluations of the models": len(entries) if schedule.evaluate else 0,
            "families compared": len(families),
            "evaluations of each": budget if families else 0,
        },
    }


def _prepare(out: Path, schedule: Schedule, template: Plan, seed: int | None, resume: bool) -> int:
    """Makes the run's folder, or checks that it holds this very run; returns the seed."""
    from fastmerge import __version__

    header: dict[str, Any] = {
        "fastmerge": __version__,
        "schedule": digest([yaml.safe_load(schedule.text), schedule.evaluate is not None]),
        "inputs": [model.fingerprint for model in template.models],
    }
    path = out / HEADER_FILE
    if path.is_file():
        if not resume:
            raise FastmergeError(f"{out}: holds a run already; use --resume, or another folder")
        found = json.loads(path.read_text())
        recorded = int(found.pop("seed"))
        if found != header:
            what = next(key for key in header if found.get(key) != header[key])
            raise FastmergeError(
                f"{out}: was begun with other '{what}'; use the same schedule and models, "
                "or another folder"
            )
        if seed is not None and seed != recorded:
            raise FastmergeError(f"{out}: was begun with seed {recorded}, not {seed}")
        return recorded
    if out.exists() and any(out.iterdir()):
        raise FastmergeError(f"{out}: is not empty; give a new folder")
    if seed is None:
        seed = schedule.seed if schedule.seed is not None else driver.draw_seed()
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**header, "seed": seed}, indent=1) + "\n")
    return seed


def _write_model(
    space: Space,
    folder: Path,
    trajectory: Trajectory,
    threads: int | None,
    progress: engine.Progress | None,
    observe: engine.Observer | None = None,
) -> engine.MergeReport:
    """The final state as a model folder, its card with the steps that led to it."""
    from fastmerge.retrograde import report

    text = report.lineage_text(trajectory)
    plan = space.plan(trajectory.states[trajectory.final], text)
    files = api.model_files(plan, folder.parent.name or folder.name)
    card = files["README.md"]
    assert isinstance(card, bytes)
    files["README.md"] = card + report.lineage_section(trajectory).encode()
    files["schedule.yml"] = files.pop(api.RECIPE_FILE)  # what it records is no recipe
    # Cheap beside an evaluation, and a folder half as old as the run would be a trap.
    return engine.merge_plan(
        plan,
        folder,
        threads=threads,
        overwrite=True,
        progress=progress,
        side_files=files,
        observe=observe,
    )
