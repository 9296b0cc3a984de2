"""The schedule beside what one merge could have done, with as many evaluations each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from fastmerge.evaluation.scores import Scores
from fastmerge.retrograde import driver
from fastmerge.retrograde.schedule import Schedule
from fastmerge.retrograde.walking import Trajectory, geometry_of
from fastmerge.search.expressions import (
    Model,
    average,
    is_random,
    reseeded,
)
from fastmerge.search.families import Contender, Family, Pool
from fastmerge.search.lab import Lab, Wanted
from fastmerge.search.rows import Row
from fastmerge.search.space import Space


def begin(
    schedule: Schedule, lab: Lab, seed: int, models: Mapping[int, Scores], budget: int,
    used: Sequence[int], names: Sequence[str],
) -> dict[str, Family]:  # fmt: skip
    """The families called ``names``, their first candidates begun where others measure.

    ``models``: the models' scores; ``used``: the pool models that the walk has merged in.
    """
    pool = pool_of(schedule, used)
    own = [models[i].value for i in sorted(models)]
    stages = schedule.evaluate.stages if schedule.evaluate else ()
    found = {}
    for name in names:
        family = Family.of(name, pool, lab, own, budget=budget, seed=seed, stages=stages)
        if family is not None:
            found[name] = family
    return found


def begin_beside(schedule: Schedule, lab: Lab, seed: int, models: Mapping[int, Scores]) -> None:
    """Has evaluators that a walk leaves idle measure what it is going to be compared with."""
    settings = schedule.compare
    if schedule.stop is not None or settings is None:
        return  # how many candidates there are shows when it has stopped
    budget = schedule.budget(driver.walked(schedule))
    names = [name for name in settings.methods if name != "line_search"]  # toward what was used
    with lab.spare():
        begin(schedule, lab, seed, models, budget, (), names)


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
    repeats = settings.seeds if settings else 1
    lab.stage = "the walk's final state"
    found = [
        Contender(
            "schedule", final, lab.score(final), len(measured), "the walk's final state", walked
        )
    ]
    place = geometry_of(space, lab, final)
    one = None
    if place is not None and not isinstance(final, Model):
        one = average([Model(i) for i in range(space.count)], list(place.one_shot))
        lab.ahead([(one, "steer", None)])
    names = settings.methods if settings else ()
    budget = schedule.budget(len(measured))
    families = begin(
        schedule, lab, trajectory.seed, trajectory.models, budget, trajectory.used, names
    )
    if one is not None and place is not None:
        lab.stage = "the walk's one-shot equivalent"
        how = f"the one linear merge nearest to the walk ({place.residual:.1%} off it)"
        found.append(Contender("one_shot", one, lab.score(one), 0, how))
    found.append(Contender("baseline", Model(0), lab.score(Model(0)), 0, schedule.baseline.label))
    for name in names:
        lab.stage = name
        if on_row is not None:
            on_row(name)
        if name in families:
            found.append(families[name].search())
    lab.ahead(wanted for entry in found for wanted in _reported(entry, lab, repeats))
    return tuple(_row(entry, lab, repeats) for entry in found)


def _reported(entry: Contender, lab: Lab, repeats: int) -> Iterator[Wanted]:
    """What a row measures: the entry on the split that is reported, then with other masks."""
    split = "holdout" if lab.scorer is not None and lab.scorer.has("holdout") else "steer"
    yield entry.state, split, None
    if is_random(entry.state):
        for shift in range(1, repeats):
            yield reseeded(entry.state, shift), split, None


def _row(entry: Contender, lab: Lab, repeats: int) -> Row:
    lab.stage = entry.name
    first, *others = _reported(entry, lab, repeats)
    held = lab.score(*first) if first[1] == "holdout" else None
    again: tuple[float, ...] = ()
    if others:
        own = held.value if held is not None else entry.steer.value
        again = (own, *(lab.score(*each).value for each in others))
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
