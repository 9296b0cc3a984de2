"""The driver of a walk: pure functions from (schedule, state, scores) to the next step.

It knows nothing about weights. The same schedule, seed and scores give the same steps, which
is also how an interrupted run resumes: it walks again over the scores it has written down.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from fastmerge.errors import RecipeError
from fastmerge.methods import METHODS
from fastmerge.retrograde.schedule import Schedule, Step

Accuracies = Mapping[int, float]  # percent, by the model's number; missing or NaN: not known


@dataclass(frozen=True)
class Move:
    """One step to take: merge state ``origin`` with ``other``.

    ``other`` is ('model', number) for a pool model or ('state', step number) for an ancestor; the
    baseline is state 0.
    """

    number: int
    step: Step
    origin: int
    other: tuple[str, int]
    why: str  # how the partner was chosen, for the report
    seed: int | None  # of the masks, where the method draws any


@dataclass(frozen=True)
class Record:
    """One step taken: its move, its score in percent (None: not measured), and the verdict."""

    move: Move
    score: float | None
    judged: bool
    accepted: bool
    state: int  # the state the walk stands on afterwards

    @property
    def is_broken(self) -> bool:
        """Whether the candidate scored NaN: refused by every rule, and judged by none."""
        return self.score is not None and math.isnan(self.score)


@dataclass(frozen=True)
class State:
    """Where the walk stands. States are numbered by the step that made them; 0 is the baseline."""

    seed: int
    baseline_score: float | None = None
    records: tuple[Record, ...] = ()
    # distance of each pool model from the current state, for nearest and farthest; any unit
    distances: Mapping[int, float] = field(default_factory=dict)

    @property
    def current(self) -> int:
        """The state the next step starts from."""
        return self.records[-1].state if self.records else 0

    @property
    def held(self) -> int:
        """The last state that a judgement kept: where a rejected candidate falls back to."""
        return next((r.state for r in reversed(self.records) if r.judged), 0)

    @property
    def previous(self) -> int:
        """The state the current one was made from; the baseline is its own."""
        current = self.current
        return 0 if current == 0 else self.records[current - 1].move.origin

    def score(self, state: int) -> float | None:
        """The score of a state in percent; None when it was not measured."""
        return self.baseline_score if state == 0 else self.records[state - 1].score

    @property
    def best(self) -> int:
        """The kept state with the highest score; the earliest of equals."""
        best, top = 0, _or_worst(self.baseline_score)
        for record in self.records:
            if record.accepted and _or_worst(record.score) > top:
                best, top = record.move.number, _or_worst(record.score)
        return best


def next_step(schedule: Schedule, state: State, scores: Accuracies) -> Move | None:
    """The move to make now, or None when the schedule is finished or has stopped early.

    Raises FastmergeError when a policy has no model to choose from.
    """
    number = len(state.records) + 1
    steps = schedule.steps
    if number > len(steps) or stopped(schedule, state):
        return None
    step = steps[number - 1]
    if step.partner is not None:
        partner, why = _partner(schedule, state, scores, step.partner, number)
        other = ("model", partner)
    else:
        target, why = _ancestor(state, step)
        other = ("state", target)
    draws = METHODS[step.method].random
    seed = int(_generator(state.seed, number, 1).integers(2**31)) if draws else None
    return Move(number, step, state.current, other, why, seed)


def judge(schedule: Schedule, state: State, move: Move, score: float | None) -> State:
    """The state after ``move`` was measured (score None: it was not).

    Every rule refuses a score that is NaN. Degrade steps pass unjudged unless ``judge: step``; a
    refused retrace returns to the state before its cycle.
    """
    rule = schedule.accept
    broken = score is not None and math.isnan(score)
    judged = broken or (score is not None and (rule.judge == "step" or move.step.kind == "retrace"))
    accepted = not broken
    if judged and not broken and rule.rule != "always":
        reference = _or_worst(state.score(state.held))
        assert score is not None
        accepted = score > reference
        if rule.rule == "anneal" and not accepted:
            judgements = sum(r.judged for r in state.records)
            temperature = rule.temperature * rule.cooling**judgements
            # Cooling underflows to 0 in the end, where only what improves is accepted.
            chance = math.exp((score - reference) / temperature) if temperature > 0 else 0.0
            accepted = bool(_generator(state.seed, move.number, 2).random() < chance)
    # A broken degrade must not cost the ground of the cycle: it only undoes itself. A broken
    # retrace must not leave the walk on a degraded state that nothing has judged, and neither may
    # stay on a state without a score, which may be what broke it.
    only_undone = (
        broken
        and (move.step.kind == "degrade" or rule.rule == "always")
        and (move.origin == 0 or state.score(move.origin) is not None)
    )
    fallback = move.origin if only_undone else state.held
    record = Record(
        move, score, judged and not broken, accepted, move.number if accepted else fallback
    )
    return replace(state, records=(*state.records, record))


def measured(schedule: Schedule, number: int) -> bool:
    """Whether step ``number`` (from 1) is to be scored."""
    if schedule.evaluate is None:
        return False
    steps = schedule.steps
    every = schedule.evaluate.every
    if every == "step" or number == len(steps):
        return True
    return every == "cycle" and steps[number - 1].kind == "retrace"


def walked(schedule: Schedule) -> int:
    """How many steps are scored, where none is refused and nothing stops the walk."""
    return sum(measured(schedule, number) for number in range(1, len(schedule.steps) + 1))


def waits(schedule: Schedule, number: int) -> bool:
    """Whether the step after ``number`` is decided by scores of the walk, or by where its state
    lies: it must wait until they are known.
    """
    rule, steps = schedule.accept, schedule.steps
    judged = rule.judge == "step" or steps[number - 1].kind == "retrace"
    if schedule.stop is not None or (
        rule.rule != "always" and judged and measured(schedule, number)
    ):
        return True
    if number == len(steps):
        return False
    coming = steps[number]
    return coming.toward == "best" or coming.partner in ("nearest", "farthest")


def foreseen(schedule: Schedule, state: State, move: Move, scores: Accuracies) -> Iterator[Move]:
    """The moves after ``move`` that are the same whatever their scores will be, unless one is NaN.

    ``state``: before ``move``; ``scores``: of the models.
    """
    found: Move | None = move
    while found is not None and not waits(schedule, found.number):
        state = judge(schedule, state, found, None)
        found = next_step(schedule, state, scores)
        if found is not None:
            yield found


def rounds(schedule: Schedule) -> int:
    """How many measurements of a walk are made one after another where there is room for all that
    can be made side by side.
    """
    found, is_open = 0, False
    for number in range(1, len(schedule.steps) + 1):
        is_open = is_open or measured(schedule, number)
        if waits(schedule, number) or number == len(schedule.steps):
            found, is_open = found + is_open, False
    return found


def stopped(schedule: Schedule, state: State) -> bool:
    """Whether ``patience`` judgements have gone by without a new best."""
    if schedule.stop is None:
        return False
    best = state.best
    since = sum(r.move.number > best for r in state.records if r.judged or r.is_broken)
    return since >= schedule.stop.patience


def final_state(schedule: Schedule, state: State) -> int:
    """The state that becomes the final model."""
    return state.best if schedule.keep == "best" else state.current


def draw_seed() -> int:
    """A seed for a schedule that names none; the run prints and records it."""
    return secrets.randbits(32)


def _partner(
    schedule: Schedule, state: State, scores: Accuracies, policy: str, number: int
) -> tuple[int, str]:
    pool = range(1, len(schedule.pool) + 1)
    named = schedule.pool_index(policy)
    if named is not None:
        return named, "by name"
    if policy == "random":
        return int(_generator(state.seed, number, 0).integers(1, len(pool) + 1)), "at random"
    if policy == "next":
        earlier = sum(r.move.step.kind == "degrade" for r in state.records)
        return pool[earlier % len(pool)], "next in the pool"
    values = state.distances if policy in ("nearest", "farthest") else scores
    known = [i for i in pool if i in values and not math.isnan(values[i])]
    if not known and policy in ("weakest", "strongest") and any(i in scores for i in pool):
        given = any(entry.accuracy is not None for entry in schedule.pool)
        raise RecipeError(
            f"step {number}: every pool model scores NaN, so none is the {policy}"
            f"{'; given accuracies count only where nothing is measured' if given else ''}: mend "
            "what scores, or name the partner"
        )
    if not known:
        what = "distance" if policy in ("nearest", "farthest") else "accuracy"
        raise RecipeError(
            f"step {number}: no pool model has a known {what} to choose the '{policy}' by; "
            "name the partner"
        )
    pick = min if policy in ("weakest", "nearest") else max
    chosen = pick(known, key=lambda i: values[i])
    return chosen, f"{policy} ({values[chosen]:.4g})"


def _ancestor(state: State, step: Step) -> tuple[int, str]:
    target = step.target_step
    if target is not None:
        return (target and state.records[target - 1].state), f"state after step {target}"
    if step.toward == "best":
        return state.best, "best so far"
    if step.toward == "previous":
        return state.previous, "the state before"
    return 0, "the baseline"


def _generator(seed: int, step: int, purpose: int) -> np.random.Generator:
    """One stream for each (step, purpose), so that no draw depends on which others were made."""
    return np.random.default_rng([seed, step, purpose])


def _or_worst(score: float | None) -> float:
    return -math.inf if score is None or math.isnan(score) else score
