"""A search over the points of a recipe: asks for states until its budget is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from fastmerge.errors import FastmergeError, RecipeError, UnsupportedError, in_a_line
from fastmerge.evaluation.callables import scores_of
from fastmerge.evaluation.scores import Scores, a_number
from fastmerge.methods.types import Float64
from fastmerge.search.document import SearchFile
from fastmerge.search.expressions import Expr, order
from fastmerge.search.folder import Hold
from fastmerge.search.lab import Lab
from fastmerge.search.optimisers import OPTIMISERS, Asked, Moves, Setup, require
from fastmerge.search.ranges import Point, Ranges, labels_of, plain
from fastmerge.search.recipes import expression, references_of

# Passes over an item that a gradient costs: one forward, and a backward of two.
GRADIENT_COST = 3
_MOST_FREE = 1000  # answers in a row that cost nothing: the optimiser turns in a circle
_NUDGE = 1e-3  # of the ranges, for the coefficients' own derivatives: points have six digits


class _SpentError(Exception):
    """The budget has no room for a gradient: the search is over."""


@dataclass(frozen=True)
class Trial:
    """One candidate, scored.

    ``number``: in the order told. ``point``: a value for each range. ``state``: what it is of the
    models. ``limit``: on how many items a task at most, None: all. ``scores``: in percent.
    ``spent``: of the budget, in its unit, with this one.
    """

    number: int
    point: Point
    state: Expr
    limit: int | None
    scores: Scores
    spent: int

    def __repr__(self) -> str:
        return in_a_line(self, "number", "limit", "scores", "spent")

    @property
    def value(self) -> float:
        """The steering score in percent, -inf where it is none."""
        return -math.inf if math.isnan(self.scores.value) else self.scores.value


class Study:
    """A `Search`: ``ask`` gives the state to score next, of at most ``limit`` items a task;
    ``tell`` takes its scores. What the journal knows is not asked again, so that the same calls on
    the folder of a killed search go on where it was. ``ahead`` are those that it asks for next
    whatever the scores: who has room for several begins them, too, and tells in the order asked.
    """

    def __init__(
        self, file: SearchFile, ranges: Ranges, lab: Lab, seed: int, hold: Hold | None = None
    ) -> None:
        """``hold``: of the run's folder, until `close`. Raises FastmergeError where the optimiser
        cannot search these ranges.
        """
        self._hold = hold
        self.file, self.ranges, self.lab, self.seed = file, ranges, lab, seed
        self.trials: list[Trial] = []
        self.limit: int | None = None
        self.spent = 0
        self._free = 0  # answers in a row that cost nothing
        self._slope_items = 0  # of the last gradient
        self._budget = file.budget
        self._is_smaller = self._note_budget()
        self._costs: dict[int | None, int] = {}  # the most of one at each limit
        self._done: dict[tuple[str, int | None], Scores] = {}
        self._expressions: dict[Point, Expr] = {}
        # Not the template's, which has the base of an adapted model, too.
        self.references = references_of(ranges.document(ranges.start))
        self._numbers = {name: number for number, name in enumerate(self.references)}
        self._moves = self._chosen()
        self._asked: Asked | None = next(self._moves, None)
        self._answers: list[Scores] = []  # to the first of the points that are asked for

    # -------- what is asked

    def ask(self) -> Expr | None:
        """Returns the state to score next, or None when the search is over."""
        while (point := self.point) is not None:
            limit = self._asked_limit
            state = self.expression(point)
            done = self._done_at(state, limit)
            if done is not None:  # once more, or no merge at all: it costs nothing
                self._free += 1
                if self._free > _MOST_FREE:
                    self._asked = None
                    break
                self._go_on(done)
                continue
            self._free = 0
            known = self.lab.known(state, limit=limit)
            if not self._affords(limit):
                if self._is_smaller and known is not None:
                    self._refuse_smaller()
                self._asked = None
                break
            self.limit = limit
            if known is None:
                return state
            self._take(state, known)
        return None

    def close(self) -> None:
        """Another process may work in the folder now."""
        if self._hold is not None:
            self._hold.close()

    def tell(self, candidate: Expr, scores: Any) -> None:
        """Takes the scores of the state that it asked for. ``candidate``: that state. ``scores``:
        `Scores`, a number, or by task a number or the numbers of its items, in percent where they
        are to be read so. Raises FastmergeError for another state or no scores.
        """
        if self.point is None or candidate is not self.expression(self.point):
            raise FastmergeError("tell: this state was not asked for; tell each before the next")
        found = scores_of(scores, "tell")
        kept = self.lab.known(candidate, limit=self.limit)
        self._take(candidate, kept or self.lab.keep(candidate, found, limit=self.limit))

    @property
    def point(self) -> Point | None:
        """The point of the state that was asked for last."""
        return None if self._asked is None else self._asked[0][len(self._answers)]

    def ahead(self) -> list[Expr]:
        """Returns the states that are asked for after this one whatever their scores, of at most
        ``limit`` items a task, too: as many as the budget surely lets it ask for.
        """
        if self._asked is None:
            return []
        points, limit = self._asked[0], self._asked_limit
        found: dict[str, Expr] = {}
        for point in points[len(self._answers) + 1 :]:
            if not self._affords(limit, beside=1 + len(found)):
                break
            state = self.expression(point)
            if self._done_at(state, limit) is None and self.lab.known(state, limit=limit) is None:
                found.setdefault(self.lab.space.fingerprint(state), state)
        return list(found.values())

    def expression(self, point: Point) -> Expr:
        """What the recipe makes of the models. ``point``: a value for each range. Returns the
        state.
        """
        if point not in self._expressions:
            document = self.ranges.document(point)
            self._expressions[point] = expression(document, self._numbers, self.seed)
        return self._expressions[point]

    def recipe(self, point: Point) -> Mapping[str, Any]:
        """The recipe of a candidate. ``point``: a value for each range. Returns a mapping, as
        `fastmerge.merge` takes it.
        """
        found = plain(self.ranges.recipe(point))
        assert isinstance(found, dict)
        if self.expression_draws(point) and not {"seed", "random_seed"} & found.keys():
            found["seed"] = self.seed
        return found

    def expression_draws(self, point: Point) -> bool:
        """Whether the method draws masks. ``point``: a value for each range. Returns True where it
        does.
        """
        return self.ranges.document(point).method.random

    # -------- what came of it

    @property
    def full(self) -> list[Trial]:
        """The candidates that were scored on all items."""
        return [trial for trial in self.trials if trial.limit is None]

    @property
    def labels(self) -> list[str]:
        """The models' names, by number."""
        return labels_of(self.references)

    @property
    def start(self) -> Trial | None:
        """The point where the ranges start; None before it is told."""
        return self.trials[0] if self.trials else None

    @property
    def best(self) -> Trial | None:
        """The best on the steering items, the earliest of equals; None before the first."""
        return max(self.full, key=lambda t: (t.value, -t.number), default=None)

    @property
    def front(self) -> list[Trial]:
        """The candidates that no other beats on every task, by falling score."""
        rows = [trial for trial in self.full if math.isfinite(trial.value)]
        values = [[task.value for _, task in sorted(t.scores.tasks.items())] for t in rows]
        found: list[Trial] = []
        for trial, own in zip(rows, values, strict=True):
            beaten = any(
                all(a >= b for a, b in zip(other, own, strict=True)) and other != own
                for other in values
            )
            twin = any(t.scores.tasks == trial.scores.tasks for t in found)
            if not beaten and not twin:
                found.append(trial)
        return sorted(found, key=lambda t: (-t.value, t.number))

    # -------- inside

    def _done_at(self, state: Expr, limit: int | None) -> Scores | None:
        """The scores that a state has already: those it was told, or none at all where the method
        does not take its values: weights that sum to 0 by which it divides, an epsilon of della's
        above the density.
        """
        try:
            for node in order(state):
                self.lab.space.check(node)
            return self._done.get((self.lab.space.fingerprint(state), limit))
        except RecipeError:
            if not self.trials:
                raise  # the start is what the recipe says
            return Scores({})

    def _chosen(self) -> Moves:
        """The start, then what the optimiser asks for."""
        settings = self.file.optimiser
        require(settings.name, self.ranges, settings.where)
        (start,) = yield [self.ranges.start], None
        setup = Setup(
            self.ranges,
            self.seed,
            self.file.evaluate.stages,
            settings.population,
            settings.step,
            settings.batch or 1,
            self._slope,
        )
        yield from OPTIMISERS[settings.name](setup, start)

    def _note_budget(self) -> bool:
        """Whether the folder was begun with a larger budget, or one in the other unit."""
        journal, own = self.lab.journal, self._budget
        before = journal.read("budget", _budget)
        now = {own.unit: own.most}
        is_smaller = before is not None and own.most < before.get(own.unit, math.inf)
        if before != now and not is_smaller:
            journal.put("budget", now)
        return is_smaller

    def _refuse_smaller(self) -> NoReturn:
        """What is known beyond the budget would be forgotten by the report, perhaps the best."""
        budget = self._budget
        before = self.lab.journal.read("budget", _budget)
        had = " and ".join(f"{most} {unit}" for unit, most in (before or {}).items())
        raise RecipeError(
            f"{budget.at(budget.unit)}: {budget.most} {budget.unit} buy less than the folder holds "
            f"already, which was searched with {had}: give no less, or another folder"
        )

    def _affords(self, limit: int | None, beside: int = 0) -> bool:
        """Whether the budget has room for one more, and for ``beside`` others."""
        if not self.trials:
            return True  # the start is always scored: there is no search without
        cost = self._cost(limit) if self._budget.unit == "items" else 1
        return self.spent + (1 + beside) * max(1, cost) <= self._budget.most

    def _cost(self, limit: int | None) -> int:
        """The items of a candidate: as many as one took, before the first of a stage as many of the
        start's as the limit leaves.
        """
        if limit is None or limit in self._costs:
            return self._costs[limit]
        return sum(min(limit, size) for size in self._sizes)

    @property
    def _asked_limit(self) -> int | None:
        """The most items a task of what is asked for; None, too, for a stage that leaves none out,
        whose survivors would be scored on the same items once more.
        """
        assert self._asked is not None
        limit = self._asked[1]
        tasks = self.trials[0].scores.tasks.values() if self.trials else ()
        known = bool(tasks) and all(task.items for task in tasks)
        return None if limit is not None and known and max(self._sizes) <= limit else limit

    @property
    def _sizes(self) -> list[int]:
        """How many items each part of the start's tasks has; of one that tells none, of all."""
        found: list[int] = []
        for task in self.trials[0].scores.tasks.values():
            found += map(len, task.items.values()) if task.items else [task.count]
        return found

    def _take(self, state: Expr, scores: Scores) -> None:
        point = self.point
        assert point is not None
        limit = self._asked_limit
        items = sum(task.count for task in scores.tasks.values())
        self._costs[limit] = max(items, self._costs.get(limit, 0))
        if not self.trials and self._budget.unit == "items" and items > self._budget.most:
            raise RecipeError(
                f"{self._budget.at('items')}: one candidate takes {items} items, more than the "
                f"budget of {self._budget.most}"
            )
        self.spent += items if self._budget.unit == "items" else 1
        self._done[self.lab.space.fingerprint(state), limit] = scores
        number = len(self.trials)
        self.trials.append(Trial(number, point, state, limit, scores, self.spent))
        self._go_on(scores)

    def _go_on(self, scores: Scores) -> None:
        assert self._asked is not None
        self._answers.append(scores)
        if len(self._answers) < len(self._asked[0]):
            return
        answers, self._answers = self._answers, []
        try:
            self._asked = self._moves.send(answers)
        except (StopIteration, _SpentError):
            self._asked = None

    def _slope(self, point: Point) -> Float64:
        """The gradient of the loss by the numbers at ``point``, as shares of their ranges: through
        the coefficients, whose own derivatives the Gram matrices give.
        """
        state = self.expression(point)
        cost = GRADIENT_COST * (self._slope_items or self._costs.get(None, 0))
        if self._budget.unit == "items" and self.spent + cost > self._budget.most:
            if self._is_smaller and self.lab.knows_slope(state):
                self._refuse_smaller()
            raise _SpentError
        by_coefficient, items = self.lab.slope(state)
        self._slope_items = items
        self.spent += GRADIENT_COST * items if self._budget.unit == "items" else 1
        units = self.ranges.units(point)
        found = np.zeros(len(units))
        for i in range(len(units)):
            ends = []
            for nudge in (_NUDGE, -_NUDGE):
                moved = units.copy()
                moved[i] = min(1.0, max(0.0, moved[i] + nudge))
                ends.append((moved[i], self._coefficients(self.ranges.at(moved, point))))
            (high, above), (low, below) = ends
            found[i] = float(np.sum(by_coefficient * (above - below))) / (high - low)
        return found

    def _coefficients(self, point: Point) -> Float64:
        factors = self.lab.space.coefficients(self.expression(point))
        assert factors is not None  # checked before the search
        return factors

    def check_gradient(self) -> None:
        """Raises UnsupportedError where the optimiser is `gradient` and the recipe is none of
        coefficients.
        """
        if self.file.optimiser.name != "gradient":
            return
        state = self.expression(self.ranges.start)
        if self.lab.space.coefficients(state) is None:
            name = self.ranges.document(self.ranges.start).method.name
            where = self.file.optimiser.where
            raise UnsupportedError(
                f"{where}: gradient needs a method that is a combination of whole models, such as "
                f"linear, task_arithmetic or slerp; {name} is none"
            )


def _budget(kept: Mapping[str, Any]) -> dict[str, float]:
    return {unit: a_number(most) for unit, most in kept.items()}
