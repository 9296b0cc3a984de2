"""Searches: what asks for states and is told their scores, whoever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastmerge.evaluation.journal import Journal
from fastmerge.evaluation.scores import Scores, TaskScore
from fastmerge.retrograde import Schedule, Search, drive, load, open_space, walk
from fastmerge.search.expressions import Expr, Model, average
from fastmerge.search.families import Pool, search
from fastmerge.search.lab import Lab


class Nearness:
    """How near a state lies to 0.7 m0 + 0.3 m1, on as many tensors as it may look at."""

    key, version = "nearness", "nearness"

    def __init__(self, target: Any) -> None:
        self._target = target
        self.calls: list[tuple[str, int | None]] = []

    def has(self, split: str) -> bool:
        return split == "steer"

    def score(self, weights: Any, split: str, limit: int | None = None) -> Scores:
        self.calls.append((split, limit))
        state = weights.state_dict()
        names = [name for name in self._target if name.endswith("proj.weight")][:limit]
        off = [float((state[name].double() - self._target[name]).norm()) for name in names]
        return Scores({"near": TaskScore(100.0 - sum(off), "", len(off))})


class Ternary:
    """A foreign search: ternary search for the best t between two models."""

    def __init__(self, rounds: int) -> None:
        self._low, self._high, self._rounds = 0.0, 1.0, rounds
        self._told: list[float] = []

    @property
    def best(self) -> float:
        return (self._low + self._high) / 2

    def ask(self) -> Expr | None:
        third = (self._high - self._low) / 3
        t = self._high - third if self._told else self._low + third
        return average([Model(0), Model(1)], [1 - t, t]) if self._rounds else None

    def tell(self, candidate: Expr, scores: Scores) -> None:
        assert candidate.operands == (Model(0), Model(1))
        self._told.append(scores.value)
        if len(self._told) == 2:
            first, second = self._told
            third = (self._high - self._low) / 3
            self._low += third if first < second else 0.0
            self._high -= third if first >= second else 0.0
            self._rounds, self._told = self._rounds - 1, []


@pytest.fixture
def opened(zoo: Any, tmp_path: Path) -> tuple[Lab, Schedule]:
    import torch

    base = zoo.base("m0", dtype="F32")
    others = [zoo.tune(base, f"m{i}", seed=i, dtype="F32", size=0.05) for i in range(1, 8)]
    a, b = zoo.read(base), zoo.read(others[0])
    target = {name: 0.7 * a[name].astype(float) + 0.3 * b[name] for name in a}
    step = {"degrade": {"partner": "m1", "method": "slerp", "t": 0.3}}
    schedule = load(
        {
            "baseline": str(base),
            "pool": [str(path) for path in others],
            "schedule": {"steps": [step]},
            "evaluate": {"callable": "stand:in"},
        }
    )
    scorer = Nearness({name: torch.tensor(x) for name, x in target.items()})
    space = open_space(schedule, threads=1)
    journal = Journal(tmp_path / "journal.jsonl")
    return Lab(space, schedule.evaluate, scorer, journal, threads=1), schedule


def test_a_foreign_search_finds_what_the_scores_lead_to(opened: tuple[Lab, Schedule]) -> None:
    lab, _ = opened
    foreign = Ternary(rounds=12)
    typed: Search = foreign
    drive(typed, lab.score)
    assert foreign.best == pytest.approx(0.3, abs=0.01)
    assert len(lab.scorer.calls) == 24
    drive(Ternary(rounds=12), lab.score)
    assert len(lab.scorer.calls) == 24  # the journal remembers


def test_a_walk_and_a_family_ask_the_same_way(opened: tuple[Lab, Schedule]) -> None:
    lab, schedule = opened
    trajectory = walk(schedule, lab.space, lab, seed=1)
    assert lab.scorer.calls == [("steer", None)] * 9  # eight models, one step
    own = [trajectory.models[i].value for i in range(8)]
    lab.scorer.calls.clear()
    pool = Pool(tuple(range(8)), 0, (1,))
    best = search("linear", pool, lab, own, budget=24, seed=3, stages=(2, 4))
    # 24 on 2 items; a quarter of them, 6, on 4; and 5, the fewest that are kept, on all.
    assert [limit for _, limit in lab.scorer.calls] == [2] * 24 + [4] * 6 + [None] * 5
    assert best is not None and best.candidates == 24
    assert lab.score(best.state).value == best.steer.value
