"""Who chooses candidates: each a generator of points, which is sent the scores of every one.

All start from the point where the ranges start, whose scores they are given, and go on until nobody
asks them any more or they have converged. Points that do not wait for one another's scores are
asked for at once, so that they can be scored side by side. What is drawn follows from the seed
alone; the libraries of `cma` and `tpe` are imported where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from fastmerge.errors import RecipeError, ResourceError
from fastmerge.evaluation.scores import Scores
from fastmerge.extras import EXTRAS, install, missing
from fastmerge.methods.types import Float64
from fastmerge.search.families import ranked
from fastmerge.search.ranges import Point, Ranges

# Points and the most items a task to score them on; None: all. Then their scores, in their order.
Asked = tuple[Sequence[Point], int | None]
Moves = Generator[Asked, Sequence[Scores], None]

_KEPT_SHARE = 3  # staged halving keeps a third of a population
_POPULATION = 12  # of random draws that are staged
_STEP = 0.25  # of the ranges
_SMALLEST = 1 / 512  # of the ranges: steps below are noise beside any number of items
_LINE = 5  # points of a line before it is refined
_MOST_STARTS = 9  # of cma, each with twice the population


@dataclass(frozen=True)
class Setup:
    """What an optimiser knows of its search."""

    ranges: Ranges
    seed: int
    stages: Sequence[int] = ()
    population: int | None = None
    step: float | None = None
    batch: int = 1  # of tpe and coordinate, which then choose with less knowledge
    # The gradient of a loss by the numbers, as shares of their ranges.
    slope: Callable[[Point], Float64] | None = None

    def generator(self, name: str) -> np.random.Generator:
        """The stream of one optimiser."""
        return np.random.default_rng([self.seed, list(OPTIMISERS).index(name)])


def libraries(name: str) -> tuple[str, ...]:
    """What an optimiser imports."""
    return {"cma": ("cma",), "tpe": ("optuna",)}.get(name, ())


def require(name: str, ranges: Ranges, where: str) -> None:
    """Raises FastmergeError where the optimiser's library is missing, or it cannot move in these
    ranges.
    """
    absent = missing(*libraries(name))
    if absent:
        raise ResourceError(
            f"{where}: {name} needs the library {absent[0]}; install it with: "
            f"{install(EXTRAS[absent[0]])}"
        )
    words = [own.name for own in ranges.dimensions if not own.is_number]
    if words and name in ("cma", "line", "walk", "gradient"):
        raise RecipeError(
            f"{where}: {name} moves numbers alone, and {words[0]} is chosen; use tpe, random or "
            "coordinate, or one search for each"
        )


def random(setup: Setup, _start: Scores) -> Moves:
    """Points drawn evenly from the ranges."""
    rng = setup.generator("random")
    size = setup.population or _POPULATION
    while True:
        yield from halved([_drawn(setup.ranges, rng) for _ in range(size)], setup.stages)


def cma(setup: Setup, _start: Scores) -> Moves:
    """CMA-ES (Hansen and Ostermeier 2001) on the ranks of each population, begun anew with twice
    the population where it has converged.
    """
    library = import_module("cma")
    ranges, rng = setup.ranges, setup.generator("cma")
    size, middle = setup.population, ranges.units(ranges.start)
    for _ in range(_MOST_STARTS):
        options = {
            "bounds": [0.0, 1.0], "verbose": -9, "tolx": _SMALLEST / 4,
            # Ranks are no function's values: neither flat nor small.
            "tolfun": 0, "tolfunhist": 0, "tolflatfitness": 10**9, "tolstagnation": 10**9,
            # Its own draws are NumPy's global ones, which a scorer may draw from, too.
            "seed": math.nan, "randn": lambda *shape: rng.standard_normal(shape),
        }  # fmt: skip
        if len(middle) == 1:
            # Holding one number's deviation to a third of its range is a ValueError in cma 4.5.
            options["maxstd_boundrange"] = math.inf
        if size is not None:
            options["popsize"] = size
        es = library.CMAEvolutionStrategy(list(middle), setup.step or _STEP, options)
        size = 2 * es.popsize
        while not es.stop():
            drawn = es.ask()
            order = yield from halved([ranges.at(x) for x in drawn], setup.stages)
            ranks = [0.0] * len(drawn)
            for rank, i in enumerate(order):
                ranks[i] = float(rank)
            es.tell(drawn, ranks)
        middle = rng.random(len(middle))


def tpe(setup: Setup, start: Scores) -> Moves:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011); what is staged is pruned by
    successive halving.
    """
    optuna = import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ranges, kinds = setup.ranges, optuna.distributions
    made = {
        own.name: kinds.CategoricalDistribution(own.choices)
        if own.choices
        else kinds.FloatDistribution(own.low, own.high)
        for own in ranges.dimensions
    }
    study = optuna.create_study(
        direction="maximize",
        # The liar: of a point whose score is not known yet it takes a bad one, and keeps away.
        sampler=optuna.samplers.TPESampler(seed=setup.seed % 2**32, constant_liar=setup.batch > 1),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=_KEPT_SHARE),
    )
    if not math.isnan(start.value):
        begun = dict(zip(made, ranges.start, strict=True))
        study.add_trial(
            optuna.trial.create_trial(params=begun, distributions=made, value=start.value)
        )
    state = optuna.trial.TrialState
    while True:
        left = [study.ask(made) for _ in range(setup.batch)]
        for rung, limit in enumerate([*setup.stages, None]):
            asked = [_of_trial(ranges, trial.params) for trial in left]
            found = yield asked, limit
            going_on = []
            for trial, scores in zip(left, found, strict=True):
                if math.isnan(scores.value):
                    study.tell(trial, state=state.FAIL)
                    continue
                trial.report(scores.value, _KEPT_SHARE**rung)
                if limit is None:
                    study.tell(trial, scores.value)
                elif trial.should_prune():
                    study.tell(trial, state=state.PRUNED)
                else:
                    going_on.append(trial)
            left = going_on
            if not left:
                break


def line(setup: Setup, _start: Scores) -> Moves:
    """All numbers together from low to high: evenly spaced points, then between the best and its
    neighbours.
    """
    ranges = setup.ranges
    count = len(ranges.numbers)
    known: dict[float, float] = {}
    gap = 1.0 / (_LINE - 1)
    asked = [float(t) for t in np.linspace(0.0, 1.0, _LINE)]
    while gap >= _SMALLEST:
        found = yield [ranges.at([t] * count) for t in asked], None
        known |= {t: scores.value for t, scores in zip(asked, found, strict=True)}
        gap /= 2
        best = _best(known)
        asked = [t for t in (best - gap, best + gap) if 0.0 <= t <= 1.0]


def coordinate(setup: Setup, start: Scores) -> Moves:
    """One number or word at a time, kept where the score rises, the best of a batch of them; half
    the step after a round without.
    """
    ranges, rng = setup.ranges, setup.generator("coordinate")
    point, best = ranges.start, _or_worst(start.value)
    step = setup.step or _STEP
    numbers = ranges.numbers
    while step > _SMALLEST:
        moved = False
        turns = [
            (int(i), which)
            for i in rng.permutation(len(ranges.dimensions))
            for which in range(len(_beside(ranges, numbers, point, int(i), step)))
        ]
        while turns:
            now, turns = turns[: setup.batch], turns[setup.batch :]
            asked = [_beside(ranges, numbers, point, i, step)[which] for i, which in now]
            found = yield asked, None
            values = [_or_worst(scores.value) for scores in found]
            top = int(np.argmax(values))
            if values[top] > best:
                point, best, moved = asked[top], values[top], True
                turns = [turn for turn in turns if turn[0] != now[top][0]]
        if not moved:
            step /= 2


def walk(setup: Setup, start: Scores) -> Moves:
    """Degrade toward a model, retrace toward the best so far, kept where that improves: a
    retrograde walk within the ranges. The models are where their own weights are high and the
    others' low; without weights, the two ends of all numbers.
    """
    ranges, rng = setup.ranges, setup.generator("walk")
    ends = _ends(ranges)
    here = best = ranges.units(ranges.start)
    top = _or_worst(start.value)
    while True:
        place, moves = ends[int(rng.integers(len(ends)))]
        toward = np.where(moves, place, here)
        degraded = here + rng.uniform(0.1, 0.6) * (toward - here)
        state = degraded + rng.uniform(0.2, 0.8) * (best - degraded)
        (scores,) = yield [ranges.at(state)], None
        if _or_worst(scores.value) > top:
            here = best = state
            top = scores.value


def gradient(setup: Setup, start: Scores) -> Moves:
    """Steepest descent of the loss, cut to the ranges, its length by the score: the first of three
    halved steps that does not lower it, else shorter ones.
    """
    assert setup.slope is not None
    ranges = setup.ranges
    here, top = ranges.units(ranges.start), _or_worst(start.value)
    step = 0.5
    while step > _SMALLEST:
        slope = np.nan_to_num(setup.slope(ranges.at(here)))
        blocked = ((here <= 0) & (slope > 0)) | ((here >= 1) & (slope < 0))
        slope = np.where(blocked, 0.0, slope)
        size = float(np.abs(slope).max(initial=0.0))
        if size == 0.0:
            return
        best = here
        for length in (step, step / 2, step / 4):
            trial = np.clip(here - length * slope / size, 0.0, 1.0)
            (scores,) = yield [ranges.at(trial)], None
            value = _or_worst(scores.value)
            if value >= top:  # on the plateaus of few items the loss still falls
                step = min(0.5, 2 * length) if value > top else length
                best, top = trial, value
                break
        else:
            step /= 8
        here = best


def halved(
    points: Sequence[Point], stages: Sequence[int]
) -> Generator[Asked, Sequence[Scores], list[int]]:
    """The points' numbers, best first: each stage keeps a third, and only those that are left are
    scored on all items.
    """
    kept, behind = list(range(len(points))), list[int]()
    for limit in [*stages, None]:
        found = yield [points[i] for i in kept], limit
        kept = ranked([(i, scores.value) for i, scores in zip(kept, found, strict=True)])
        if limit is not None:
            size = math.ceil(len(kept) / _KEPT_SHARE)
            kept, behind = kept[:size], kept[size:] + behind
    return kept + behind


def _of_trial(ranges: Ranges, params: Mapping[str, Any]) -> Point:
    words = tuple(params[own.name] for own in ranges.dimensions)
    return ranges.at(ranges.units(words), words)


def _drawn(ranges: Ranges, rng: np.random.Generator) -> Point:
    words = tuple(
        own.choices[int(rng.integers(len(own.choices)))] if own.choices else own.start
        for own in ranges.dimensions
    )
    return ranges.at(rng.random(len(ranges.numbers)), words)


def _beside(
    ranges: Ranges, numbers: Sequence[int], point: Point, i: int, step: float
) -> list[Point]:
    """The points one step away along dimension ``i``."""
    own = ranges.dimensions[i]
    if own.choices:
        others = (word for word in own.choices if word != point[i])
        return [(*point[:i], word, *point[i + 1 :]) for word in others]
    units = ranges.units(point)
    place = numbers.index(i)
    found = []
    for toward in (step, -step):
        moved = units.copy()
        moved[place] = min(1.0, max(0.0, units[place] + toward))
        if moved[place] != units[place]:
            found.append(ranges.at(moved, point))
    return found


def _ends(ranges: Ranges) -> list[tuple[Float64, Any]]:
    """Where the models lie, as shares, and which numbers lead there."""
    own = [ranges.dimensions[i] for i in ranges.numbers]
    weighs = np.array([one.parameter == "weight" and one.model is not None for one in own])
    if not weighs.any():
        both = np.ones(len(own), dtype=bool)
        return [(np.zeros(len(own)), both), (np.ones(len(own)), both)]
    models = dict.fromkeys(one.model for one, is_one in zip(own, weighs, strict=True) if is_one)
    found = [(np.zeros(len(own)), weighs)]  # all weights low: the base, where there is one
    found += [(np.array([float(one.model == model) for one in own]), weighs) for model in models]
    return found


def _best(known: dict[float, float]) -> float:
    return max(known, key=lambda t: (_or_worst(known[t]), -t))


def _or_worst(value: float) -> float:
    return -math.inf if math.isnan(value) else value


OPTIMISERS: dict[str, Callable[[Setup, Scores], Moves]] = {
    "cma": cma,
    "tpe": tpe,
    "random": random,
    "line": line,
    "coordinate": coordinate,
    "walk": walk,
    "gradient": gradient,
}
STAGED = ("cma", "tpe", "random")
BATCHED = ("tpe", "coordinate")  # one at a time where no `batch` is given
ONE_AT_A_TIME = ("walk", "gradient")  # each candidate follows from the scores before it
