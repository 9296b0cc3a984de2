"""One-shot merges of the same models, as many evaluations each: what a schedule must beat.

Each family draws candidates from a stated range with a recorded seed; the best on the steering
score is the family's entry. Hold-out items are looked at once, by the entries only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, cast

import numpy as np

from fastmerge.evaluation.scores import Scores
from fastmerge.recipe.settings import constant
from fastmerge.search.expressions import Expr, Model, average, blend, uniform
from fastmerge.search.search import Script, Scripted, drive

if TYPE_CHECKING:  # a schedule that measures nothing does without torch models' loaders
    from fastmerge.search.lab import Lab

_KEPT_SHARE, _KEPT_LEAST = 4, 5  # staged halving keeps a quarter, at least 5


@dataclass(frozen=True)
class Contender:
    """The best candidate of one family on the steering score."""

    name: str
    state: Expr
    steer: Scores
    candidates: int
    how: str  # in words, for the report
    # Steering scores in the order of measuring, of the candidates that were scored on all items.
    history: tuple[float, ...] = ()


@dataclass(frozen=True)
class Pool:
    """What the families draw from: models by number, and where deltas start."""

    models: tuple[int, ...]  # the baseline and the pool
    base: int  # base_model, else the baseline
    partners: tuple[int, ...]  # the pool models the walk used, else the whole pool
    labels: tuple[str, ...] = ()  # the models' names, by number

    @property
    def tuned(self) -> tuple[int, ...]:
        """The models that have a delta to the base."""
        return tuple(i for i in self.models if i != self.base)

    def name(self, number: int) -> str:
        """What a model is called in the descriptions of candidates."""
        return self.labels[number] if self.labels else f"model {number}"

    def names(self, numbers: Sequence[int]) -> str:
        """The models' names in a row."""
        return ", ".join(map(self.name, numbers))

    def weighted(self, numbers: Sequence[int], weights: Iterable[float]) -> str:
        """The models with their weights: 'blur 0.300, dolphin 0.700'."""
        pairs = zip(numbers, weights, strict=True)
        return ", ".join(f"{self.name(i)} {round(weight, 3) + 0.0:.3f}" for i, weight in pairs)


def candidates(
    name: str, pool: Pool, scores: Sequence[float], budget: int, seed: int
) -> Iterator[tuple[Expr, str]]:
    """Up to ``budget`` candidates of the family ``name``, each with its description.

    ``scores``: the models' own steering scores, by number (percent).
    """
    rng = np.random.default_rng([seed, BASELINES.index(name)])
    if name == "best_single":
        best = max(pool.models, key=lambda i: -math.inf if math.isnan(scores[i]) else scores[i])
        yield Model(best), f"{pool.name(best)} as it is"
    elif name == "model_stock":
        yield from _stocks(pool, budget)
    elif name == "line_search":
        middle = uniform(pool.partners)
        mean_of = "the mean of " if len(pool.partners) > 1 else ""
        for number in range(1, budget + 1):
            t = number / (budget + 1)
            yield (
                average([Model(0), middle], [1.0 - t, t]),
                f"t = {t:.4g} toward {mean_of}{pool.names(pool.partners)}",
            )
    elif name in _DRAWN:
        for _ in range(budget):
            yield _DRAWN[name](pool, rng)


def _draw_linear(pool: Pool, rng: np.random.Generator) -> tuple[Expr, str]:
    weights = rng.dirichlet(np.ones(len(pool.models)))
    state = average([Model(i) for i in pool.models], list(weights))
    return state, pool.weighted(pool.models, weights)


def _draw_slerp(pool: Pool, rng: np.random.Generator) -> tuple[Expr, str]:
    a, b = (int(i) for i in rng.choice(pool.models, 2, replace=False))
    t = float(rng.random())
    state = blend("slerp", [Model(a), Model(b)], parameters={"t": constant(t)})
    return state, f"{pool.name(a)} to {pool.name(b)}, t = {t:.3f}"


def _draw_task_arithmetic(pool: Pool, rng: np.random.Generator) -> tuple[Expr, str]:
    weights = rng.uniform(0.0, 1.2, len(pool.tuned))
    operands = [Model(pool.base), *(Model(i) for i in pool.tuned)]
    state = average(operands, [1.0 - float(weights.sum()), *weights])
    return state, pool.weighted(pool.tuned, weights)


def _draw_ties(pool: Pool, rng: np.random.Generator) -> tuple[Expr, str]:
    return _draw_consensus("ties", pool, rng, (0.1, 1.0), (0.4, 1.4))


def _draw_dare_ties(pool: Pool, rng: np.random.Generator) -> tuple[Expr, str]:
    return _draw_consensus("dare_ties", pool, rng, (0.4, 1.0), (0.4, 1.2))


def _draw_consensus(
    method: str,
    pool: Pool,
    rng: np.random.Generator,
    densities: tuple[float, float],
    factors: tuple[float, float],
) -> tuple[Expr, str]:
    weights = rng.dirichlet(np.ones(len(pool.tuned)))
    density, factor = float(rng.uniform(*densities)), float(rng.uniform(*factors))
    state = blend(
        method,
        [Model(i) for i in pool.tuned],
        list(weights),
        base=Model(pool.base),
        parameters={"density": constant(density), "lambda": constant(factor)},
        seed=int(rng.integers(2**31)),
    )
    how = pool.weighted(pool.tuned, weights)
    return state, f"{how}; density {density:.3f}, lambda {factor:.3f}"


def _stocks(pool: Pool, budget: int) -> Iterator[tuple[Expr, str]]:
    """Largest subsets first: Model Stock has no parameter to search."""
    subsets = [
        subset
        for size in range(len(pool.tuned), 1, -1)
        for subset in combinations(pool.tuned, size)
    ]
    for subset in subsets[:budget]:
        state = blend("model_stock", [Model(i) for i in subset], base=Model(pool.base))
        yield state, pool.names(subset)


_DRAWN: dict[str, Callable[[Pool, np.random.Generator], tuple[Expr, str]]] = {
    "linear": _draw_linear,
    "slerp": _draw_slerp,
    "task_arithmetic": _draw_task_arithmetic,
    "ties": _draw_ties,
    "dare_ties": _draw_dare_ties,
}


@dataclass(frozen=True)
class Family:
    """One family's search, of which nothing was measured yet; ``stages`` are begun ahead."""

    script: Scripted[Contender]
    lab: Lab

    @classmethod
    def of(
        cls, name: str, pool: Pool, lab: Lab, scores: Sequence[float], *, budget: int, seed: int,
        stages: Sequence[int] = (),
    ) -> Family | None:  # fmt: skip
        """None where the models do not allow the family ``name``."""
        if name == "greedy_soup":
            return cls(Scripted(_greedy_soup(pool, scores, budget)), lab)
        found = list(candidates(name, pool, scores, budget, seed))
        return cls(Scripted(_best_of(name, found, stages, lab)), lab) if found else None

    def search(self) -> Contender:
        """The family's best."""
        history = []

        def score(state: Expr) -> Scores:
            limit = self.script.limit  # of this one: the family goes on when it is told
            found = self.lab.score(state, limit=limit)
            if limit is None:
                history.append(found.value)
            return found

        drive(self.script, score)
        return replace(self.script.result, history=tuple(history))


def search(
    name: str, pool: Pool, lab: Lab, scores: Sequence[float], *, budget: int, seed: int,
    stages: Sequence[int] = (),
) -> Contender | None:  # fmt: skip
    """The family's best, or None where the models do not allow the family."""
    family = Family.of(name, pool, lab, scores, budget=budget, seed=seed, stages=stages)
    return None if family is None else family.search()


def _best_of(
    name: str, found: Sequence[tuple[Expr, str]], stages: Sequence[int], lab: Lab
) -> Script[Contender]:
    """The best on all items, of those that were good on the few of each stage."""
    kept = list(range(len(found)))
    for items in stages:
        if len(kept) <= _KEPT_LEAST:
            break
        values = []
        lab.ahead((found[i][0], "steer", items) for i in kept)
        for i in kept:
            scores = yield found[i][0], items
            values.append((i, scores.value))
        kept = ranked(values)[: max(_KEPT_LEAST, math.ceil(len(kept) / _KEPT_SHARE))]
    full = {}
    lab.ahead((found[i][0], "steer", None) for i in sorted(kept))
    for i in sorted(kept):
        full[i] = yield found[i][0], None
    best = ranked([(i, scores.value) for i, scores in full.items()])[0]
    return Contender(name, found[best][0], full[best], len(found), found[best][1])


def ranked(values: Sequence[tuple[int, float]]) -> list[int]:
    """Numbers by falling score, NaN last, the earlier of equals first."""
    return [i for i, v in sorted(values, key=lambda p: (math.isnan(p[1]), -p[1], p[0]))]


def _greedy_soup(pool: Pool, scores: Sequence[float], budget: int) -> Script[Contender]:
    """Adds models to the average, best first, where the score rises (Wortsman et al. 2022)."""
    first, *others = ranked([(i, scores[i]) for i in pool.models])
    members, chosen = [first], cast(Expr, Model(first))
    best = yield chosen, None
    for other in others[:budget]:
        trial = [*members, other]
        candidate = uniform(trial)
        found = yield candidate, None
        if found.value > best.value:
            members, chosen, best = trial, candidate, found
    tried = len(others[:budget])
    return Contender("greedy_soup", chosen, best, tried, pool.names(members))


BASELINES = (
    "best_single",
    "linear",
    "slerp",
    "ties",
    "dare_ties",
    "task_arithmetic",
    "model_stock",
    "greedy_soup",
    "line_search",
)
