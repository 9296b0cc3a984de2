"""The contest: schedules, and what one merge does with as many measured models.

A family measures `BUDGET` models on the steering items and enters the best of them; entries meet
the test items. Everything drawn follows from the round's number, and the lab remembers every score,
so that a run goes on where it stopped. PROTOCOL.md says what each family is for.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmerge.recipe.settings import affine
from fastmerge.retrograde import (
    Blend,
    Lab,
    Model,
    Schedule,
    Scores,
    Space,
    Trajectory,
    average,
    blend,
    drive,
    load,
    walk,
)
from fastmerge.search import families as one_shots
from fastmerge.search.expressions import Expr

BUDGET = 4  # models that a family measures in a round: a walk's cycles, a search's candidates
LAYERS = 4  # fractions along the layers of a schedule that has its own for each layer

# Arms of the schedule: (method, where a retrace goes, the rule of acceptance, fractions by layer).
WALKS: Mapping[str, tuple[str, str, str, bool]] = {
    "walk_linear": ("linear", "baseline", "always", False),
    "walk_slerp": ("slerp", "baseline", "always", False),
    "walk_ties": ("ties", "baseline", "always", False),
    "walk_dare_ties": ("dare_ties", "baseline", "always", False),
    "walk_slerp_layers": ("slerp", "baseline", "always", True),
    "walk_slerp_best": ("slerp", "best", "always", False),
    "walk_slerp_previous": ("slerp", "previous", "always", False),
    "walk_slerp_improve": ("slerp", "baseline", "improve", False),
    "walk_slerp_anneal": ("slerp", "baseline", "anneal", False),
}
# One merge, as many candidates; those but the first are fastmerge's own families.
RIVALS = (
    "anchored", "line_search", "linear", "ties", "dare_ties", "slerp", "task_arithmetic",
    "greedy_soup", "model_stock",
)  # fmt: skip
COLLAPSED = {"collapsed_slerp": "walk_slerp", "collapsed_ties": "walk_ties",
             "collapsed_dare_ties": "walk_dare_ties"}  # fmt: skip
# fastmerge search's, over linear coefficients: one has what all arms together have.
OPTIMISERS = {"cma_es": "cma", "optuna": "tpe", "random_search": "random"}
DENSITY = {"ties": (0.3, 0.9), "dare_ties": (0.6, 0.95)}  # as benchmarks/retrograde draws them
FRACTION = (0.1, 0.6)


@dataclass(frozen=True)
class Entry:
    """What a family enters; ``measured``: its models in their order, where that is known."""

    family: str
    state: Expr
    steer: Scores
    measured: tuple[tuple[Expr, Scores], ...]
    trajectory: Trajectory | None = None
    step: int = 0  # of the trajectory, whose state is entered


def rng_of(round_number: int, purpose: str) -> np.random.Generator:
    """The stream of one purpose of one round."""
    return np.random.default_rng([round_number, zlib.crc32(purpose.encode())])


@dataclass(frozen=True)
class Skeleton:
    """What all schedules of a round share: partners, each once, and the fractions of each cycle.

    ``degrade`` and ``retrace``: (BUDGET, LAYERS); schedules that are the same for all layers use
    the first column.
    """

    partners: tuple[str, ...]
    degrade: np.ndarray
    retrace: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, partners: Sequence[str]) -> Skeleton:
        size = (BUDGET, LAYERS)
        degrade, retrace = (rng.uniform(*FRACTION, size).round(3) for _ in range(2))
        names = [str(name) for name in rng.permutation(partners)]
        return cls(tuple(names[i % len(names)] for i in range(BUDGET)), degrade, retrace)


class Contest:
    """One round: the models' space, a lab that scores on the steering items."""

    def __init__(
        self, lab: Lab, schedule: Mapping[str, Any], round_number: int, say: Callable[[str], None]
    ) -> None:
        """``schedule``: the schedule's keys that all arms share: models and evaluation."""
        self.lab = lab
        self.shared = schedule
        self._round = round_number
        self._say = say
        entries = [schedule["baseline"], *schedule["pool"]]
        self.names = [entry["name"] for entry in entries]
        self._pool = one_shots.Pool(
            tuple(range(len(entries))), 0, tuple(range(1, len(entries))), tuple(self.names)
        )

    @property
    def space(self) -> Space:
        """The models' geometry."""
        return self.lab.space

    def score(self, state: Expr, stage: str) -> Scores:
        self.lab.stage = stage
        return self.lab.score(state)

    def singles(self) -> list[Scores]:
        """The models' own scores: every family knows them, none pays for them."""
        return [self.score(Model(i), name) for i, name in enumerate(self.names)]

    def skeleton(self, purpose: str = "skeleton") -> Skeleton:
        """The schedules' own, or a fresh draw of the same kind for another purpose."""
        return Skeleton.draw(rng_of(self._round, purpose), self.names[1:])

    def walk(self, family: str) -> Entry:
        """A schedule of `BUDGET` cycles; it enters the best state after one of them."""
        schedule = self.schedule(family, self.skeleton())
        self._say(f"round {self._round}: {family}")
        trajectory = walk(schedule, self.space, self.lab, seed=self._round)
        pairs = zip(trajectory.states[1:], trajectory.scores[1:], strict=True)
        measured = {n: (state, s) for n, (state, s) in enumerate(pairs, 1) if s is not None}
        step = max(measured, key=lambda n: (measured[n][1].value, -n))
        return Entry(family, *measured[step], tuple(measured.values()), trajectory, step)

    def schedule(self, family: str, skeleton: Skeleton) -> Schedule:
        """The schedule of one arm, as a user would write it."""
        method, toward, rule, by_layer = WALKS[family]
        options: dict[str, Any] = {"method": method}
        if method in DENSITY:
            density = rng_of(self._round, f"density {method}").uniform(*DENSITY[method])
            # Not normalised: it would undo t where one of the two is the base itself.
            options |= {"base": "baseline", "density": round(float(density), 3), "normalize": False}

        def fraction(values: np.ndarray) -> Any:
            return [float(v) for v in values] if by_layer else float(values[0])

        steps: list[dict[str, Any]] = []
        for partner, a, b in zip(
            skeleton.partners, skeleton.degrade, skeleton.retrace, strict=True
        ):
            steps.append({"degrade": {"partner": partner, "t": fraction(a), **options}})
            steps.append({"retrace": {"toward": toward, "t": fraction(b), **options}})
        return load({**self.shared, "schedule": {"steps": steps}, "accept": rule})

    def rival(self, family: str, singles: Sequence[Scores]) -> Entry | None:
        """One-shot merges, the best of as many."""
        self._say(f"round {self._round}: {family}")
        if family == "anchored":
            return self.best_of(family, self.anchored())
        self.lab.stage = family
        found = one_shots.search(
            family, self._pool, self.lab, [s.value for s in singles], budget=BUDGET,
            seed=self._round,
        )  # fmt: skip
        if found is None:
            return None
        return Entry(family, found.state, found.steer, ())

    def optimiser(self, name: str) -> Entry:
        """A search by ``fastmerge search``'s optimiser over the four weights of task arithmetic,
        with what all arms of the schedule spend.
        """
        from fastmerge.search.document import load as load_search
        from fastmerge.search.study import Study

        self._say(f"round {self._round}: {name}")
        first, *others = [self.shared["baseline"], *self.shared["pool"]]
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": first["model"],
            "models": [{"model": o["model"], "parameters": {"weight": "0..1"}} for o in others],
        }
        file = load_search(
            {
                "space": recipe,
                "optimiser": OPTIMISERS[name],
                "budget": {"candidates": len(WALKS) * BUDGET},
                "evaluate": {k: v for k, v in self.shared["evaluate"].items() if k != "every"},
            }
        )
        study = Study(file, file.ranges(), self.lab, self._round)
        self.lab.stage = name
        drive(study, self.lab.score)
        best = study.best
        assert best is not None
        measured = tuple((trial.state, trial.scores) for trial in study.full)
        return Entry(name, best.state, best.scores, measured)

    def anchored(self) -> list[Expr]:
        """Linear merges with effective weights of a schedule freshly drawn: its prior, no path."""
        weights = effective(self.skeleton("anchored"), self.names)
        return [average([Model(i) for i in range(len(self.names))], row) for row in weights]

    def uniform(self) -> Entry:
        """The plain mean of all models."""
        count = len(self.names)
        state = average([Model(i) for i in range(count)], [1.0 / count] * count)
        scores = self.score(state, "uniform")
        return Entry("uniform", state, scores, ((state, scores),))

    def best_of(self, family: str, states: Sequence[Expr]) -> Entry:
        """The best on the steering items, the earlier of equals."""
        measured = tuple((state, self.score(state, family)) for state in states)
        state, scores = max(measured, key=lambda pair: pair[1].value)
        return Entry(family, state, scores, measured)

    def collapsed(self, family: str, entry: Entry) -> Entry:
        """One merge for each cycle of a walk, at its effective weights, by the walk's method (of
        SLERP: linear): what is left of the walk without its path.
        """
        assert entry.trajectory is not None
        self._say(f"round {self._round}: {family}")
        states = [self.own_one_shot(entry.family, entry.trajectory, step) for step in _cycles()]
        return self.best_of(family, states)

    def own_one_shot(self, family: str, trajectory: Trajectory, step: int) -> Expr:
        """The state after ``step`` in one merge: the walk's own method at its effective weights,
        or, for linear and SLERP, the linear merge that the same steps make, layer by layer.
        """
        method = WALKS[family][0]
        if method not in DENSITY:
            return linear_of(trajectory, step)
        weights = effective_of(trajectory, step, len(self.names))
        parameters = trajectory.schedule.steps[0].parameters
        kept = {name: parameters[name] for name in ("density", "normalize")}
        return blend(
            method, [Model(i) for i in range(1, len(self.names))], list(weights[1:]),
            base=Model(0), parameters=kept, seed=1000 + self._round,
        )  # fmt: skip


def _cycles() -> range:
    """The numbers of the steps that end a cycle."""
    return range(2, 2 * BUDGET + 1, 2)


def _followed(trajectory: Trajectory, step: int, take: Callable[[Any, Any, Any], Any]) -> Any:
    """A state by the walk's own moves up to ``step``: take(step, state, other)."""
    made: dict[int, Any] = {0: Model(0)}
    for record in trajectory.state.records[:step]:
        move = record.move
        kind, number = move.other
        other = Model(number) if kind == "model" else made[number]
        made[move.number] = take(move.step, made[move.origin], other)
    return made[step]


def linear_of(trajectory: Trajectory, step: int) -> Expr:
    """The same steps, each linear: which is one linear merge, by layer where fractions are."""

    def take(move: Any, state: Expr, other: Expr) -> Blend:
        return average((state, other), (affine(move.t, -1.0, 1.0), move.t))

    return _followed(trajectory, step, take)


def effective_of(trajectory: Trajectory, step: int, count: int) -> np.ndarray:
    """What is left of each model by the fractions alone, float64 (count,); it sums to 1."""
    unit = np.eye(count)

    def weights(state: Any) -> np.ndarray:
        return unit[state.index] if isinstance(state, Model) else state

    def take(move: Any, state: Any, other: Any) -> np.ndarray:
        t = float(move.t.rules[0].values[0])
        return (1 - t) * weights(state) + t * weights(other)

    return np.asarray(weights(_followed(trajectory, step, take)))


def effective(skeleton: Skeleton, names: Sequence[str]) -> list[list[float]]:
    """The weights of ``names``, the baseline first, after each cycle of a schedule that retraces
    to the baseline.
    """
    unit = np.eye(len(names))
    weights = unit[0]
    found = []
    for partner, a, b in zip(
        skeleton.partners, skeleton.degrade[:, 0], skeleton.retrace[:, 0], strict=True
    ):
        weights = (1 - a) * weights + a * unit[names.index(partner)]
        weights = (1 - b) * weights + b * unit[0]
        found.append([float(w) for w in weights])
    return found
