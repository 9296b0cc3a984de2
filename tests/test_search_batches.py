"""Candidates that do not wait for one another: what is asked ahead, and what is found with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fastmerge import search
from fastmerge.errors import FastmergeError
from fastmerge.search import optimisers
from tests.test_search_study import file_of, models, near, points_of

__all__ = ["models"]  # the fixture

ALL = [name for name in optimisers.OPTIMISERS if name != "gradient"]
BATCHES: dict[str, Any] = {
    **{name: name for name in ALL},
    "tpe in fours": {"name": "tpe", "batch": 4},
    "coordinate in fours": {"name": "coordinate", "batch": 4},
}


def side_by_side(file: dict[str, Any], out: Path) -> tuple[Any, list[int]]:
    """The study scored as many at once as it allows, and how many that were each time."""
    study = search.open_study(file, out, threads=1)
    begun: dict[Any, float] = {}
    sizes = []
    while (candidate := study.ask()) is not None:
        if candidate not in begun:
            ahead = study.ahead()
            sizes.append(1 + len(ahead))
            for state in [candidate, *ahead]:
                assert state not in begun
                begun[state] = score_of(study, state)
        study.tell(candidate, begun[candidate])
    assert len(begun) == len(study.trials)  # nothing was begun that was not asked for
    return study, sizes


def score_of(study: Any, state: Any) -> float:
    return float(100 - 100 * sum((row[1:] - 0.7) @ (row[1:] - 0.7) for row in
                                 study.lab.space.coefficients(state)[:1]))  # fmt: skip


@pytest.mark.parametrize("optimiser", BATCHES.values(), ids=BATCHES)
def test_what_is_begun_ahead_is_asked_for_and_changes_nothing(
    models: list[Path], tmp_path: Path, optimiser: Any
) -> None:
    file = file_of(models, optimiser=optimiser, budget={"candidates": 37})
    study, sizes = side_by_side(file, tmp_path / "many")
    alone = search.open_study(file, tmp_path / "one", threads=1)
    while (candidate := alone.ask()) is not None:
        alone.tell(candidate, score_of(alone, candidate))
    assert points_of(alone) == points_of(study)
    name = optimiser if isinstance(optimiser, str) else optimiser["name"]
    if isinstance(optimiser, dict):
        assert max(sizes) == 4
    elif name in optimisers.ONE_AT_A_TIME or name in optimisers.BATCHED:
        assert max(sizes) == 1
    else:
        assert max(sizes) == {"cma": 6, "random": 12, "line": 5}[name] - (name == "line")
    assert study.best.value >= study.start.value + 2 * (name != "walk")


def test_a_stage_is_asked_for_at_once_and_within_the_budget(
    models: list[Path], tmp_path: Path
) -> None:
    file = file_of(models, optimiser={"name": "random", "population": 9}, budget={"items": 160})
    file["evaluate"]["stages"] = [2]
    study = search.open_study(file, tmp_path, threads=1)
    sizes = []
    while (candidate := study.ask()) is not None:
        sizes.append((study.limit, 1 + len(study.ahead())))
        study.tell(candidate, {"task": [near(study)] * (study.limit or 20)})
    # Nine on two items, three of them on all 20; the last batch is cut where the budget ends.
    assert sizes[:14] == [(None, 1), *((2, n) for n in range(9, 0, -1)),
                          *((None, n) for n in (3, 2, 1)), (2, 9)]  # fmt: skip
    assert study.spent == 156
    assert sizes[-2:] == [(None, 2), (None, 1)]


def test_what_a_batch_leaves_unknown_is_the_optimiser_s_own(
    models: list[Path], tmp_path: Path
) -> None:
    found = {}
    for batch in (1, 5):
        file = file_of(models, optimiser={"name": "tpe", "batch": batch}, seed=3)
        file["budget"] = {"candidates": 40}
        found[batch], _ = side_by_side(file, tmp_path / str(batch))
    assert points_of(found[1]) != points_of(found[5])
    plain = file_of(models, optimiser="tpe", seed=3, budget={"candidates": 40})
    assert points_of(side_by_side(plain, tmp_path / "plain")[0]) == points_of(found[1])


def test_words_and_stages_go_in_batches_too(models: list[Path], tmp_path: Path) -> None:
    file = file_of(models, optimiser={"name": "tpe", "batch": 6}, budget={"items": 700})
    file["space"]["merge_method"] = {"choose": ["ties", "dare_ties"]}
    file["evaluate"]["stages"] = [3]
    study = search.open_study(file, tmp_path, threads=1)
    while (candidate := study.ask()) is not None:
        value = math.nan if len(study.trials) == 5 else 50.0 * (study.point[0] == "dare_ties")
        study.tell(candidate, {"task": [value + study.point[1]] * (study.limit or 10)})
    assert study.best.point[0] == "dare_ties"
    limits = [trial.limit for trial in study.trials]
    assert limits[:8] == [None, *[3] * 6, None] and None in limits[8:]
    assert limits.count(None) < limits.count(3)  # pruned


def test_a_batch_is_part_of_what_decides_a_search(models: list[Path], tmp_path: Path) -> None:
    file = file_of(models, optimiser={"name": "tpe", "batch": 4})
    study = search.open_study(file | {"workers": 3}, tmp_path, threads=1)
    study.tell(study.ask(), 1.0)
    search.open_study(file, tmp_path, resume=True, threads=1)  # workers may change
    other = file | {"optimiser": {"name": "tpe", "batch": 5}}
    with pytest.raises(FastmergeError, match="was begun with other 'search'"):
        search.open_study(other, tmp_path, resume=True, threads=1)
    with pytest.raises(FastmergeError, match="'batch' is of tpe and coordinate; remove it"):
        search.open_study(file | {"optimiser": {"name": "cma", "batch": 4}}, tmp_path / "cma")
