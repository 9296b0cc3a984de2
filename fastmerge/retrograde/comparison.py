"""The schedule beside what one merge could have done, with as many evaluations each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastmerge.retrograde.schedule import Schedule
from fastmerge.retrograde.walking import Trajectory, geometry_of
from fastmerge.search.expressions import (
    Model,
    average,
    is_random,
    reseeded,
)
from fastmerge.search.families import Contender, Pool, search
from fastmerge.search.lab import Lab
from fastmerge.search.rows import Row
from fastmerge.search.space import Space


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
    walked = tuple(scores.value for scores in measured)
    budget = settings.budget if settings and settings.budget else max(1, len(measured))
    repeats = settings.seeds if settings else 1
    lab.stage = "the walk's final state"
    found = [
        Contender(
            "schedule", final, lab.score(final), len(measured), "the walk's final state", walked
        )
    ]
    place = geometry_of(space, lab, final)
    if place is not None and not isinstance(final, Model):
        one = average([Model(i) for i in range(space.count)], list(place.one_shot))
        lab.stage = "the walk's one-shot equivalent"
        how = f"the one linear merge nearest to the walk ({place.residual:.1%} off it)"
        found.append(Contender("one_shot", one, lab.score(one), 0, how))
    found.append(Contender("baseline", Model(0), lab.score(Model(0)), 0, schedule.baseline.label))
    pool = pool_of(schedule, trajectory.used)
    own = [trajectory.models[i].value for i in sorted(trajectory.models)]
    stages = schedule.evaluate.stages if schedule.evaluate else ()
    for name in settings.methods if settings else ():
        lab.stage = name
        if on_row is not None:
            on_row(name)
        entry = search(name, pool, lab, own, budget=budget, seed=trajectory.seed, stages=stages)
        if entry is not None:
            found.append(entry)
    return tuple(_row(entry, lab, repeats) for entry in found)


def _row(entry: Contender, lab: Lab, repeats: int) -> Row:
    assert lab.scorer is not None
    split = "holdout" if lab.scorer.has("holdout") else "steer"
    lab.stage = entry.name
    held = lab.score(entry.state, "holdout") if split == "holdout" else None
    again: tuple[float, ...] = ()
    if repeats > 1 and is_random(entry.state):
        first = held.value if held is not None else entry.steer.value
        others = [reseeded(entry.state, shift) for shift in range(1, repeats)]
        again = (first, *(lab.score(state, split).value for state in others))
    return Row(
        entry.name,
        entry.how,
        entry.state,
        entry.steer,
        held,
        entry.candidates,
        again,
        entry.history,
    )


def pool_of(schedule: Schedule, used: Sequence[int]) -> Pool:
    """The models of a schedule; ``used`` are the pool models that its walk has merged in."""
    models = tuple(range(len(schedule.pool) + 1))
    base = 0 if schedule.base_model is None else schedule.model_index("base_model")
    partners = tuple(dict.fromkeys(used)) or models[1:]
    return Pool(models, base or 0, partners, tuple(schedule.labels))
