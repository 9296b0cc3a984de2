"""Measures states: makes their weights, loads them into one model, scores it, remembers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastmerge import live
from fastmerge.engine.in_memory import materialise_plan
from fastmerge.engine.products import gram_with
from fastmerge.errors import UnsupportedError
from fastmerge.evaluation.evaluators import Evaluators, Measure, same_scorer
from fastmerge.evaluation.journal import Journal, digest
from fastmerge.evaluation.loaded import Loaded
from fastmerge.evaluation.loss import Differentiable, gradients
from fastmerge.evaluation.scorers import Scorer, Scoring
from fastmerge.evaluation.scores import SameTasks, Scores
from fastmerge.evaluation.settings import Evaluate
from fastmerge.evaluation.weights import SCORED, Merged
from fastmerge.methods.types import Float64
from fastmerge.ops import coefficient_gradients
from fastmerge.planning.inputs import TensorPlan
from fastmerge.planning.plan import Plan
from fastmerge.search.expressions import Expr, Model
from fastmerge.search.geometry import Geometry
from fastmerge.search.space import Space

Wanted = tuple[Expr, str, int | None]  # a state, the split, and at most how many items a task


@dataclass(frozen=True)
class Measurement:
    """One measurement of a run, told before it begins and, with ``seconds``, when it is over."""

    what: str
    split: str
    number: int  # of those made by this lab, from 1: what the journal knew is not measured
    most: int | None  # how many the run will make at most
    seconds: float | None = None
    expected: float | None = None  # seconds, at most about, where that can be told before


class Lab:
    """Measures states: makes their weights, loads them into one model, scores it, remembers."""

    def __init__(
        self,
        space: Space,
        settings: Evaluate | None,
        scorer: Scorer | None,
        journal: Journal,
        *,
        threads: int | None = None,
        folder: Path | None = None,
        observe: Callable[[Measurement], None] | None = None,
        most: int | None = None,
        expected: float | None = None,
        evaluators: Evaluators | None = None,
    ) -> None:
        """``folder``: where a scorer's model folder is made; None is the system's temporary one.
        ``observe`` is told of every measurement, of which there will be ``most`` at most, of
        ``expected`` seconds each. ``evaluators``: who measures instead (of a `LabMaker`).
        """
        self.evaluators = evaluators
        self._later = False
        self._most, self._expected = most, expected
        self.stage = ""  # what is being measured, in words; who asks for scores says it
        self._observe = observe
        self._measured = 0
        self.space = space
        self.scorer = scorer
        self._journal = journal
        self._threads = threads
        self._folder = folder
        self._model = None if settings is None else Loaded(settings, threads)
        self._loaded: tuple[str, Any] | None = None
        self._tasks = SameTasks()

    @property
    def journal(self) -> Journal:
        """What the run's folder keeps."""
        return self._journal

    def score(self, state: Expr, split: str = "steer", limit: int | None = None) -> Scores:
        """The scores of ``state``; the same state and settings are measured once."""
        if self.scorer is None:
            raise ValueError("this run does not evaluate")
        known = self.known(state, split, limit)
        if known is not None:
            return known
        return self.keep(state, self._measure(state, split, limit), split, limit)

    def ahead(self, wanted: Iterable[Wanted]) -> None:
        """Says what scores are going to be asked for: evaluators, where there are any, measure them
        in this order while others are waited for. What is never asked for is not kept.
        """
        if self.evaluators is None or self.scorer is None:
            return
        for state, split, limit in wanted:
            if self.known(state, split, limit) is None:
                key = self._key("score", state, split, limit)
                self.evaluators.begin(key, (state, split, limit), later=self._later)

    @contextmanager
    def spare(self) -> Iterator[None]:
        """What is said ahead within is measured when nothing else is to be."""
        self._later = True
        try:
            yield
        finally:
            self._later = False

    def known(self, state: Expr, split: str = "steer", limit: int | None = None) -> Scores | None:
        """What the journal has of a state's scores."""
        key = self._key("score", state, split, limit)
        found = self._journal.read(key, Scores.from_json)
        if found is not None:
            self._tasks.check(found, split, self._who)
        return found

    def keep(
        self, state: Expr, scores: Scores, split: str = "steer", limit: int | None = None
    ) -> Scores:
        """Writes scores to the journal; returns them as a resumed run will see them, which must be
        the same digits.
        """
        self._tasks.check(scores, split, self._who)
        key = self._key("score", state, split, limit)
        self._journal.put(key, scores.as_json())
        return Scores.from_json(self._journal.get(key))

    @property
    def _who(self) -> str:
        return "tell" if self.scorer is None else self.scorer.version

    def slope(self, state: Expr) -> tuple[Float64, int]:
        """The gradient of the loss that goes with the score, by each tensor's coefficients over the
        models, float64 (tensors, n), and how many items it is of. A scorer says its targets, see
        fastmerge.evaluation.loss.
        """
        scorer = self.scorer
        if not isinstance(scorer, Differentiable):
            raise UnsupportedError(
                "gradient: needs tasks or a perplexity, which say the right continuations; a "
                "callable's score has no gradient"
            )
        key = self._key("slope", state, "steer", None)
        if self._journal.get(key) is None:
            if self.evaluators is None:
                found = self.measure_slope(state)
            else:
                found = self.evaluators.answer(key, Slope(state))
            self._journal.put(key, found)
        kept = self._journal.read(key, self._slope)
        assert kept is not None
        return kept

    def _slope(self, kept: Mapping[str, Any]) -> tuple[Float64, int]:
        rows = np.array(kept["rows"], np.float64)
        if (
            rows.shape != (len(self.space.names), self.space.count)
            or type(kept["items"]) is not int
        ):
            raise ValueError
        return rows, kept["items"]

    def measure_slope(self, state: Expr) -> dict[str, Any]:
        """What the journal has of a slope, measured here and now."""
        assert isinstance(self.scorer, Differentiable)
        model = self.model(state)
        targets = self.scorer.targets(model, "steer")
        loss, grads = gradients(model, targets)
        rows = np.zeros((len(self.space.names), self.space.count))
        index = {name: i for i, name in enumerate(self.space.names)}
        for number in range(self.space.count):
            plan = self.space.plan(Model(number))
            for item, tensor in live.tensors(plan, threads=self._threads):
                if item.name in grads and item.name in index:
                    own = {item.name: tensor.float()}
                    grad = {item.name: grads[item.name].float().cpu().contiguous()}
                    found = coefficient_gradients(grad, [own], threads=self._threads)
                    rows[index[item.name], number] = found[item.name][0]
        return {"loss": loss, "rows": rows.tolist(), "items": len(targets)}

    def knows_slope(self, state: Expr) -> bool:
        """Whether `slope` measures nothing any more."""
        return self._journal.get(self._key("slope", state, "steer", None)) is not None

    def _key(self, kind: str, state: Expr, split: str, limit: int | None) -> str:
        scorer = "told" if self.scorer is None else self.scorer.key
        return f"{kind}:{digest([self.space.fingerprint(state), scorer, split, limit])}"

    def _measure(self, state: Expr, split: str, limit: int | None) -> Scores:
        assert self.scorer is not None
        self._measured += 1
        told = Measurement(self.stage, split, self._measured, self._most, expected=self._expected)
        if self._observe is not None:
            self._observe(told)
        begun = time.perf_counter()
        if self.evaluators is None:
            scores = self.measure(state, split, limit)
        else:
            key = self._key("score", state, split, limit)
            scores, place = self.evaluators.answer(key, (state, split, limit))
            if place is not None:
                self._keep(self.space.fingerprint(state), place)
        if self._observe is not None:
            self._observe(replace(told, seconds=time.perf_counter() - begun))
        return scores

    def measure(self, state: Expr, split: str, limit: int | None) -> Scores:
        """The scores, measured here and now."""
        assert self.scorer is not None
        with self.weights(state) as weights:
            scores = self.scorer.score(weights, split, limit)
        if not isinstance(self.scorer, Differentiable):
            # Other people's code may have changed the numbers; of ours that it reads them alone.
            self._loaded = None
        return scores

    def weights(self, state: Expr) -> Merged:
        """The weights of ``state``, for a scorer; a context, at whose end its folder is gone."""
        plan = self.space.plan(state)
        load = partial(self._load, state)
        return Merged(plan, load, near=self._folder, threads=self._threads)

    def model(self, state: Expr) -> Any:
        """The loaded model with the weights of ``state``."""
        return self.weights(state).torch()

    def _load(self, state: Expr, plan: Plan) -> Any:
        assert self._model is not None
        key = self.space.fingerprint(state)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # half-loaded weights are nobody's
            collapses = self.space.coefficients(state) is not None
            meter = None if collapses else GramMeter(self.space)
            model = self._model.load(plan, meter)
            if meter is not None:
                self._keep(key, self.space.geometry_of(meter.grams).as_json())
            self._loaded = key, model
        return self._loaded[1]

    def geometry(self, state: Expr) -> Geometry:
        """Where ``state`` lies; one that does not collapse is materialised for it, once."""
        factors = self.space.coefficients(state)
        if factors is not None:
            return self.space.geometry(factors)
        key = self.space.fingerprint(state)
        if self._journal.get(f"geometry 2:{key}") is None:
            meter = GramMeter(self.space)
            for item, array in materialise_plan(self.space.plan(state), threads=self._threads):
                meter(item, array)
            self._keep(key, self.space.geometry_of(meter.grams).as_json())
        found = self._journal.read(f"geometry 2:{key}", self._geometry)
        assert found is not None
        return found

    def _geometry(self, kept: Mapping[str, Any]) -> Geometry:
        found = Geometry.from_json(kept)
        if len(found.one_shot) != self.space.count or len(found.angles) != self.space.count - 1:
            raise ValueError
        return found

    def place(self, state: Expr) -> Any:
        """What the journal has of where a state lies, which measuring one that does not collapse
        finds; or None.
        """
        return self._journal.get(f"geometry 2:{self.space.fingerprint(state)}")

    def _keep(self, key: str, geometry: Any) -> None:
        if self._journal.get(f"geometry 2:{key}") is None:
            self._journal.put(f"geometry 2:{key}", geometry)


@dataclass(frozen=True)
class Slope:
    """A request for `Lab.measure_slope`."""

    state: Expr


@dataclass(frozen=True)
class LabMaker:
    """Makes, wherever it is called, what measures as a lab of these does; see `Evaluators`."""

    space: Space
    scoring: Scoring
    key: str  # of the scorer, whose scores they must be
    folder: Path  # of the run

    def __call__(self, number: int, threads: int) -> Measure:
        scorer = same_scorer(self.scoring.scorer(), self.key)
        own = self.folder / SCORED / str(number)
        settings = self.scoring.settings
        lab = Lab(self.space, settings, scorer, Journal(None), threads=threads, folder=own)

        def measure(request: Wanted | Slope) -> Any:
            if isinstance(request, Slope):
                return lab.measure_slope(request.state)
            return lab.measure(*request), lab.place(request[0])

        return measure


class GramMeter:
    """Gram matrices of [x_0, x_1 - x_0, ..., state - x_0], filled in tensor by tensor."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._index = {name: i for i, name in enumerate(space.names)}
        size = space.count + 1
        self.grams = np.zeros((len(space.names), size, size))

    def __call__(self, item: TensorPlan, array: np.ndarray[Any, Any]) -> None:
        """One tensor of the state; those that are only copied do not count."""
        index = self._index.get(item.name)
        if index is None:
            return
        sources = self._space.sources(item.name)
        self.grams[index] = gram_with(self._space.template.models, sources, array)
