"""Takes the steps of a schedule: the driver's moves as expressions over the models, scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastmerge.evaluation.scores import Scores
from fastmerge.retrograde import driver
from fastmerge.retrograde.driver import State
from fastmerge.retrograde.moves import make
from fastmerge.retrograde.schedule import Schedule
from fastmerge.search.expressions import Expr, Model
from fastmerge.search.geometry import Geometry
from fastmerge.search.search import Script, Scripted, drive
from fastmerge.search.space import Space

if TYPE_CHECKING:  # a walk that measures nothing does without
    from fastmerge.search.lab import Lab


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


OnStep = Callable[[Trajectory], None]
OnModels = Callable[[Mapping[int, Scores]], None]


def walk(
    schedule: Schedule,
    space: Space,
    lab: Lab | None,
    seed: int,
    *,
    on_step: OnStep | None = None,
    on_models: OnModels | None = None,
) -> Trajectory:
    """Takes every step of the schedule. ``lab`` None: nothing is measured. ``on_models`` is told of
    the models' scores. Raises FastmergeError where a step has no model to choose from, or a state
    cannot be scored.
    """
    walker = Scripted(_walk(schedule, space, lab, seed, on_step, on_models))
    if lab is not None:
        drive(walker, lab.score)
    return walker.result


def _walk(
    schedule: Schedule,
    space: Space,
    lab: Lab | None,
    seed: int,
    on_step: OnStep | None,
    on_models: OnModels | None,
) -> Script[Trajectory]:
    models: dict[int, Scores] = {}
    given = {
        i: e.accuracy
        for i, e in enumerate((schedule.baseline, *schedule.pool))
        if e.accuracy is not None
    }
    evaluates = lab is not None and lab.scorer is not None
    numbers = range(len(schedule.pool) + 1) if evaluates else ()
    _ahead(lab, map(Model, numbers))
    for i in numbers:
        _say(lab, schedule.labels[i])
        models[i] = yield Model(i), None
    if on_models is not None and evaluates:
        on_models(models)
    accuracies = {**given, **{i: scores.value for i, scores in models.items()}}
    states: list[Expr] = [Model(0)]
    scores: list[Scores | None] = [models.get(0)]
    geometry: list[Geometry | None] = [geometry_of(space, lab, Model(0))]
    state = State(seed=seed, baseline_score=accuracies.get(0))
    foreseen = 0  # the last step that was begun ahead

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
        if lab is not None and lab.evaluators is not None and move.number > foreseen:
            coming = list(states)
            for after in driver.foreseen(schedule, state, move, accuracies):
                coming.append(make(schedule, after, coming))
            numbers = range(move.number, len(coming))
            _ahead(lab, (coming[n] for n in numbers if driver.measured(schedule, n)))
            foreseen = len(coming) - 1
        score = None
        if evaluates and driver.measured(schedule, move.number):
            _say(lab, f"step {move.number}")
            score = yield states[-1], None
        scores.append(score)
        geometry.append(geometry_of(space, lab, states[-1]))
        state = driver.judge(schedule, state, move, None if score is None else score.value)
        if on_step is not None:
            on_step(so_far())


def _ahead(lab: Lab | None, states: Iterable[Expr]) -> None:
    if lab is not None:
        lab.ahead((state, "steer", None) for state in states)


def _say(lab: Lab | None, stage: str) -> None:
    if lab is not None:
        lab.stage = stage


def geometry_of(space: Space, lab: Lab | None, state: Expr) -> Geometry | None:
    """Where ``state`` lies (norms in units of the weights, angles in degrees). One that is no
    combination must be made for it, which only a ``lab`` that scores does: without, and before the
    models' inner products are known, None. Raises FastmergeError as a merge does.
    """
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
    found = geometry_of(space, lab, current)
    if found is None:
        assert lab is not None
        found = lab.geometry(current)
    # The model that deltas are taken to has none itself, and so no angle.
    return {i: found.angles[i] for i in range(1, len(schedule.pool) + 1) if i in found.angles}
