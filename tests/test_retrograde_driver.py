"""The driver: pure, so every policy and rule is tested without a weight."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge.errors import FastmergeError
from fastmerge.retrograde.driver import Accuracies as Scores
from fastmerge.retrograde.driver import (
    State,
    final_state,
    judge,
    measured,
    next_step,
    stopped,
)
from fastmerge.retrograde.schedule import Schedule, load

DEGRADE = {"partner": "weakest", "method": "linear", "t": 0.4}
RETRACE = {"toward": "baseline", "method": "linear", "t": 0.5}


def make(cycles: int = 3, pool: int = 3, **top: Any) -> Schedule:
    moves = {"cycles": cycles, "degrade": DEGRADE, "retrace": RETRACE}
    for key in ("degrade", "retrace"):
        moves[key] = {**moves[key], **top.pop(key, {})}  # type: ignore[dict-item]
    if "steps" in top:
        moves = {"steps": top.pop("steps")}
    return load(
        {
            "baseline": "base",
            "pool": [{"model": f"m{i}"} for i in range(1, pool + 1)],
            "schedule": moves,
            "evaluate": {"callable": "a:b"},
            **top,
        }
    )


def play(
    schedule: Schedule,
    outcomes: list[float | None],
    scores: Scores,
    seed: int = 0,
    baseline: float = 50.0,
) -> State:
    state = State(seed=seed, baseline_score=baseline)
    for outcome in outcomes:
        move = next_step(schedule, state, scores)
        if move is None:
            break
        state = judge(schedule, state, move, outcome)
    return state


def partners(state: State) -> list[int]:
    return [r.move.other[1] for r in state.records if r.move.step.kind == "degrade"]


SCORES = {1: 40.0, 2: 30.0, 3: 45.0}


@pytest.mark.parametrize(
    "policy, chosen",
    [("weakest", [2, 2, 2]), ("strongest", [3, 3, 3]), ("next", [1, 2, 3]), ("m1", [1, 1, 1])],
)
def test_policy(policy: str, chosen: list[int]) -> None:
    schedule = make(degrade={"partner": policy})
    assert partners(play(schedule, [50.0] * 6, SCORES)) == chosen


def test_next_goes_round_the_pool() -> None:
    assert partners(play(make(5, 2, degrade={"partner": "next"}), [1.0] * 10, {})) == [
        1,
        2,
        1,
        2,
        1,
    ]


@pytest.mark.parametrize("policy, chosen", [("nearest", 2), ("farthest", 3)])
def test_distance_policies_use_the_distances_of_the_state(policy: str, chosen: int) -> None:
    state = State(seed=0, baseline_score=50.0, distances={1: 0.5, 2: 0.1, 3: 0.9})
    move = next_step(make(degrade={"partner": policy}), state, {})
    assert move is not None and move.other == ("model", chosen)


def test_random_partners_follow_the_seed_alone() -> None:
    schedule = make(40, degrade={"partner": "random"})
    first = partners(play(schedule, [50.0] * 80, {}, seed=7))
    assert first == partners(play(schedule, [1.0] * 80, {1: 3.0}, seed=7))
    assert first != partners(play(schedule, [50.0] * 80, {}, seed=8))
    assert set(Counter(first)) == {1, 2, 3}


def test_equal_accuracies_choose_the_first_in_the_pool() -> None:
    for policy in ("weakest", "strongest"):
        assert partners(
            play(make(1, degrade={"partner": policy}), [1.0] * 2, dict.fromkeys([1, 2, 3], 5.0))
        ) == [1]


def test_models_without_a_finite_score_are_not_ranked() -> None:
    scores = {1: math.nan, 2: 44.0}
    assert partners(play(make(1), [1.0] * 2, scores)) == [2]
    with pytest.raises(FastmergeError, match="every pool model scores NaN"):
        next_step(make(1), State(seed=0), {1: math.nan})


TARGETS = {
    "baseline": ("baseline", 0),
    "best": ("best", 2),
    "previous": ("previous", 2),
    "step-1": ("step: 1", 1),
    "step-0": ("step: 0", 0),
}


@pytest.mark.parametrize("toward, state_number", TARGETS.values(), ids=TARGETS)
def test_retrace_target(toward: str, state_number: int) -> None:
    steps = [
        {"degrade": DEGRADE},
        {"retrace": RETRACE},
        {"degrade": DEGRADE},
        {"retrace": {**RETRACE, "toward": toward}},
    ]
    state = play(make(steps=steps), [40.0, 60.0, 45.0], SCORES)
    move = next_step(make(steps=steps), state, SCORES)
    assert move is not None and move.other == ("state", state_number) and move.origin == 3


def test_previous_of_the_baseline_is_the_baseline() -> None:
    steps = [{"retrace": {**RETRACE, "toward": "previous"}}]
    move = next_step(make(steps=steps), State(seed=0), {})
    assert move is not None and move.other == ("state", 0) and move.origin == 0


def test_always_accepts_whatever_the_score() -> None:
    state = play(make(), [10.0, 20.0, 5.0, 4.0, 3.0, 2.0], SCORES)
    assert [r.accepted for r in state.records] == [True] * 6
    assert state.current == 6 and state.best == 0


def test_improve_judges_cycles_and_falls_back_to_the_state_before() -> None:
    schedule = make(accept="improve")
    state = play(schedule, [10.0, 60.0, 10.0, 55.0, 10.0, 61.0], SCORES)
    assert [r.accepted for r in state.records] == [True, True, True, False, True, True]
    assert [r.state for r in state.records] == [1, 2, 3, 2, 5, 6]
    assert state.records[4].move.origin == 2
    assert state.current == state.best == 6


def test_improve_refuses_an_equal_score() -> None:
    state = play(make(1, accept="improve"), [10.0, 50.0], SCORES)
    assert not state.records[1].accepted and state.current == 0


def test_improve_by_step_judges_the_degrade_too() -> None:
    schedule = make(1, accept={"rule": "improve", "judge": "step"})
    state = play(schedule, [49.0, 51.0], SCORES)
    assert [r.accepted for r in state.records] == [False, True]
    assert state.records[1].move.origin == 0


def test_anneal_takes_small_losses_sometimes_and_large_ones_never() -> None:
    rule = {"rule": "anneal", "temperature": 1.0, "cooling": 1.0}
    schedule = make(1, accept=rule)
    small = [play(schedule, [0.0, 49.5], SCORES, seed=s).records[1].accepted for s in range(400)]
    large = [play(schedule, [0.0, 20.0], SCORES, seed=s).records[1].accepted for s in range(400)]
    # exp(-0.5) = 0.607; the standard error of 400 draws is 0.024.
    assert abs(sum(small) / 400 - math.exp(-0.5)) < 0.1
    assert not any(large)
    assert play(schedule, [0.0, 50.1], SCORES).records[1].accepted


def test_anneal_cools() -> None:
    schedule = make(2, accept={"rule": "anneal", "temperature": 10.0, "cooling": 0.01})
    states = [play(schedule, [0.0, 50.1, 0.0, 49.0], SCORES, seed=s) for s in range(200)]
    # The second judgement is at 0.1 point: exp(-11) is never drawn in 200 tries.
    assert not any(state.records[3].accepted for state in states)


@pytest.mark.parametrize("rule", ["always", "improve", "anneal"])
def test_a_nan_score_is_never_accepted(rule: str) -> None:
    state = play(make(accept=rule), [math.nan, 60.0, 10.0, math.nan, 10.0, 61.0], SCORES)
    assert [r.accepted for r in state.records] == [False, True, True, False, True, True]
    assert state.records[1].move.origin == 0  # the broken degrade left no trace
    # A broken retrace undoes only itself where every state is taken; where states are judged, the
    # degraded one that it started from is not kept.
    assert state.records[4].move.origin == (3 if rule == "always" else 2)
    assert state.best == 6


def test_patience_counts_judgements_without_a_new_best() -> None:
    schedule = make(9, stop={"patience": 2})
    state = play(schedule, [1.0, 60.0, 1.0, 55.0, 1.0, 54.0, 1.0, 99.0], SCORES)
    assert len(state.records) == 6 and stopped(schedule, state)
    assert next_step(schedule, state, SCORES) is None


def test_keep_best_or_last() -> None:
    outcomes: list[float | None] = [1.0, 60.0, 1.0, 55.0, 1.0, 54.0]
    assert final_state(make(keep="best"), play(make(), outcomes, SCORES)) == 2
    assert final_state(make(), play(make(), outcomes, SCORES)) == 6


def test_which_steps_are_measured() -> None:
    numbers = range(1, 7)
    for every, expected in (("step", [1, 2, 3, 4, 5, 6]), ("cycle", [2, 4, 6]), ("end", [6])):
        schedule = make(evaluate={"callable": "a:b", "every": every})
        assert [n for n in numbers if measured(schedule, n)] == expected


def test_unmeasured_steps_are_taken() -> None:
    state = play(make(2), [None] * 4, SCORES)
    assert [r.accepted for r in state.records] == [True] * 4 and not any(
        r.judged for r in state.records
    )


score = st.one_of(st.none(), st.floats(0, 100), st.just(math.nan))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(score, min_size=1, max_size=8),
    st.sampled_from(["always", "improve", "anneal"]),
    st.sampled_from(["step", "cycle"]),
    st.sampled_from(["weakest", "next", "random"]),
    st.integers(0, 2**31),
)
def test_invariants_of_every_walk(
    outcomes: list[float | None], rule: str, by: str, policy: str, seed: int
) -> None:
    schedule = make(4, accept={"rule": rule, "judge": by}, degrade={"partner": policy})
    state = play(schedule, outcomes, SCORES, seed=seed)
    again = play(schedule, outcomes, SCORES, seed=seed)
    assert repr(state) == repr(again)
    origin = 0
    for record in state.records:
        assert record.move.origin == origin  # each step starts where the last one left off
        assert record.state == record.move.number or not record.accepted
        assert 0 <= record.state <= record.move.number
        if record.score is not None and math.isnan(record.score):
            assert not record.accepted
        origin = record.state
    scored = [s for s in (state.score(i) for i in range(len(state.records) + 1)) if s is not None]
    best = state.score(state.best)
    assert best is not None and all(not math.isnan(s) for s in [best])
    if rule == "always":
        assert best == max(s for s in scored if not math.isnan(s))


def test_a_walk_does_not_stay_on_a_state_that_nothing_scored() -> None:
    """every: cycle, a broken partner: the degraded state is NaN, and so is every retrace to it."""
    schedule = make(2, evaluate={"callable": "a:b", "every": "cycle"})
    state = play(schedule, [None, math.nan, None, math.nan], {1: 10.0})
    assert [record.state for record in state.records] == [1, 0, 3, 0]
    assert final_state(schedule, state) == 0


def test_broken_candidates_use_up_patience() -> None:
    schedule = make(9, stop={"patience": 2}, accept={"rule": "always", "judge": "step"})
    assert len(play(schedule, [math.nan] * 18, {1: 10.0}).records) == 2


def test_annealing_may_cool_to_nothing() -> None:
    schedule = make(60, accept={"rule": "anneal", "cooling": 1e-10, "judge": "step"})
    assert len(play(schedule, [40.0] * 120, {1: 10.0}).records) == 120
