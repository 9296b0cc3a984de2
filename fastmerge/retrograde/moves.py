"""A step of a walk as an expression over the models."""

from __future__ import annotations

from collections.abc import Sequence

from fastmerge.methods import METHODS, Consensus
from fastmerge.recipe.settings import affine, constant, value_of
from fastmerge.retrograde.driver import Move
from fastmerge.retrograde.schedule import STATE, Schedule, Step, uses_t
from fastmerge.search.expressions import Blend, Expr, Model, average, blend


def take(schedule: Schedule, step: Step, state: Expr, other: Expr, seed: int | None) -> Blend:
    """The state that ``step`` makes of ``state`` and ``other``; t is the fraction of the way.

    Delta methods with the state as base: state + t * merge(other - state). With a fixed base the
    state and the other are both operands, weighted 1 - t and t.
    """
    method = METHODS[step.method]
    parameters = {name: value for name, value in step.parameters.items() if name != "t"}
    t = step.t if step.t is not None else constant(0.0)
    away = affine(t, -1.0, 1.0)
    base_name = schedule.base_of(step)
    if method.max_operands == 1:  # of the other alone, with the state as base
        given = {**parameters, "t": t} if method.parameter("t") is not None else parameters
        return blend(step.method, (other,), base=state, parameters=given, seed=seed)
    if method.parameter("t") is not None:
        return blend(step.method, (state, other), parameters={**parameters, "t": t}, seed=seed)
    if not isinstance(method, Consensus):
        base = None if base_name is None else Model(_number(schedule, base_name))
        weights = [away, t] if uses_t(method) else None
        if step.method == "linear":
            parameters = {"normalize": constant(False), **parameters}
        return blend(
            step.method, (state, other), weights, base=base, parameters=parameters, seed=seed
        )
    if base_name == STATE:
        if step.method == "task_arithmetic":
            return average((state, other), (away, t))
        parameters = {**parameters, "lambda": t}
        return blend(step.method, (other,), (1.0,), base=state, parameters=parameters, seed=seed)
    assert base_name is not None
    base = Model(_number(schedule, base_name))
    factor = value_of(parameters.get("lambda"), 1.0)
    if step.method == "task_arithmetic" and factor is not None:
        # base + l ((1 - t)(state - base) + t (other - base)) is a combination: the walk collapses.
        weights = [constant(1.0 - factor), affine(away, factor, 0.0), affine(t, factor, 0.0)]
        return average((base, state, other), weights)
    return blend(
        step.method, (state, other), (away, t), base=base, parameters=parameters, seed=seed
    )


def _number(schedule: Schedule, name: str) -> int:
    number = schedule.model_index(name)
    assert number is not None  # checked when the schedule was read
    return number


def make(schedule: Schedule, move: Move, states: Sequence[Expr]) -> Blend:
    """The candidate that ``move`` makes; ``states`` by step number."""
    kind, number = move.other
    other: Expr = Model(number) if kind == "model" else states[number]
    return take(schedule, move.step, states[move.origin], other, move.seed)
