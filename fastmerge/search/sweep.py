"""A sweep over t: one Gram pass over the weights, then any number of merges or scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastmerge import api
from fastmerge.engine.merge import merge_plan
from fastmerge.engine.products import grams
from fastmerge.engine.report import Progress
from fastmerge.errors import FastmergeError, OutputError, RecipeError, UnsupportedError
from fastmerge.evaluation.callables import ScoreFunction
from fastmerge.evaluation.journal import digest, write_atomically
from fastmerge.evaluation.loaded import Loaded
from fastmerge.evaluation.scorers import Scorer, make_scorer
from fastmerge.evaluation.scores import Scores, none
from fastmerge.evaluation.settings import Evaluate, load_evaluate
from fastmerge.evaluation.weights import Merged
from fastmerge.llama import beside
from fastmerge.methods.table import T
from fastmerge.methods.types import Float64
from fastmerge.models.model import folder_of
from fastmerge.models.side_files import is_tokenizer
from fastmerge.plan.plan import Plan
from fastmerge.plan.planner import make_plan
from fastmerge.search.figures import require, sweep_png
from fastmerge.tree.collapse import Collapsed, coefficients, collapse, weighted_sum
from fastmerge.tree.nodes import Leaf, Merge, Node, walk
from fastmerge.tree.rewrite import rewrite
from fastmerge.tree.unread import without_unread

FILE = "sweep.json"
MOST_VALUES = 10_000


@dataclass(frozen=True)
class Point:
    """One value of t: its scores, or the folder it was written to."""

    t: float
    scores: Scores | None
    out: Path | None


def parse_range(text: str) -> list[float]:
    """The values of "0:1:0.05", both ends included, or of "0.1,0.3"; else FastmergeError."""
    try:
        if ":" in text:
            first, last, step = (float(part) for part in text.split(":"))
            if step <= 0 or last < first:
                raise ValueError
            count = int(np.floor((last - first) / step + 1e-9)) + 1
            if count > MOST_VALUES:
                raise FastmergeError(f"--t: '{text}' has {count} values; at most {MOST_VALUES}")
            values = [round(first + i * step, 12) for i in range(count)]
        else:
            values = [float(part) + 0.0 for part in text.split(",")]  # -0.0 is 0.0
        if not np.isfinite(values).all():
            raise ValueError
        return [T.check(value, "--t") for value in values]
    except (ValueError, OverflowError):
        raise FastmergeError(
            f"--t: '{text}' is neither first:last:step with a step above 0, as in 0:1:0.05, "
            "nor a list, as in 0.2,0.5"
        ) from None


class Sweep:
    """A recipe whose t varies: a method with a parameter t, or two models averaged linearly."""

    def __init__(
        self,
        plan: Plan,
        *,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Makes the Gram matrices, where a rule needs them, in one pass over the weights."""
        self._plan = plan
        self._trees: dict[str, Collapsed] = {}
        for item in plan.tensors:
            if not isinstance(item.root, Merge):
                continue
            tree = collapse(item.root)
            if not tree.is_complete or tree.axis is not None:
                raise UnsupportedError(
                    f"sweep: '{item.root.method.name}' does not follow from one Gram matrix; sweep "
                    "methods that are combinations of whole tensors"
                )
            self._trees[item.name] = tree
        roots = [tree.root for tree in self._trees.values()]
        if not any(_has_t(node) for root in roots for node in walk(root)):
            raise RecipeError(
                "sweep: nothing in this recipe has a t; use slerp, or linear with two models"
            )
        wanted = {n: _sources(tree) for n, tree in self._trees.items() if tree.needs_gram}
        self._grams: Mapping[str, Float64] = {}
        if wanted:
            self._grams = grams(plan.models, wanted, threads=threads, progress=progress)

    def plan(self, t: float) -> Plan:
        """The plan at one t: one linear merge of the sources for each tensor."""
        tensors = []
        for item in self._plan.tensors:
            tree = self._trees.get(item.name)
            root = item.root if tree is None else self._root(item.name, t)
            tensors.append(replace(item, root=without_unread(root)))
        text = f"# swept to t = {t:g}\n{self._plan.recipe_text}"
        return replace(self._plan, tensors=tuple(tensors), recipe_text=text)

    def _root(self, name: str, t: float) -> Merge:
        tree = self._trees[name]
        moved = replace(tree, root=_with_t(tree.root, t), reference=0 if tree.needs_gram else None)
        return weighted_sum(tree.parts, coefficients(moved, self._grams.get(name)))


def _sources(tree: Collapsed) -> list[Leaf]:
    return [part for part in tree.parts if isinstance(part, Leaf)]


def _has_t(node: Node) -> bool:
    if not isinstance(node, Merge):
        return False
    return "t" in node.values or (node.method.name == "linear" and len(node.operands) == 2)


def _with_t(root: Merge, t: float) -> Merge:
    """The tree with every t replaced; a linear pair gets the weights 1 - t and t."""

    def at_t(node: Merge) -> Merge:
        if "t" in node.values:
            return replace(node, values={**node.values, "t": t})
        if _has_t(node):
            pair = zip(node.operand_values, (1.0 - t, t), strict=True)
            each = tuple({**own, "weight": weight} for own, weight in pair)
            return replace(node, operand_values=each)
        return node

    result = rewrite(root, at_t)
    assert isinstance(result, Merge)
    return result


def sweep(
    recipe: Any,
    out: Path,
    values: Sequence[float],
    *,
    evaluate: Any = None,
    data: str | Path | None = None,
    resume: bool = False,
    threads: int | None = None,
    score: ScoreFunction | None = None,
    progress: Progress | None = None,
    on_point: Callable[[Point], None] | None = None,
) -> list[Point]:
    """Scores ``recipe`` at each t into out/sweep.json and sweep.png, or, without ``evaluate``,
    writes the models.

    ``evaluate``: the keys of a schedule's `evaluate` section, as a file, YAML text or dict.
    ``resume`` continues a sweep that was interrupted: points in sweep.json are not made again.
    """
    # Whole trees: what the recipe's own t leaves out, another takes in.
    plan = recipe if isinstance(recipe, Plan) else make_plan(recipe)
    with ExitStack() as kept:
        scoring = _scoring(plan, evaluate, data, score, kept)
        return _swept(plan, out, values, scoring, resume, threads, progress, on_point)


def _scoring(
    plan: Plan,
    evaluate: Any,
    data: str | Path | None,
    score: ScoreFunction | None,
    kept: ExitStack,
) -> tuple[Scorer, Evaluate] | None:
    """What scores, and its settings; None where nothing is to be scored."""
    if evaluate is None:
        if data is not None:
            raise FastmergeError("data: is for 'evaluate', which is not given")
        return None
    require()
    settings = load_evaluate(evaluate)
    if data is not None:
        settings = settings.with_data(data)
    is_file = not isinstance(evaluate, Mapping) and "\n" not in str(evaluate)
    folder = Path(evaluate).parent if is_file else Path()
    tokenizer = folder_of(plan.models[0])
    if plan.vocabulary is not None or plan.chat_template is not None:
        tokenizer = kept.enter_context(beside(plan, is_tokenizer))
    return make_scorer(settings, folder, tokenizer, score), settings


def _swept(
    plan: Plan,
    out: Path,
    values: Sequence[float],
    scoring: tuple[Scorer, Evaluate] | None,
    resume: bool,
    threads: int | None,
    progress: Progress | None,
    on_point: Callable[[Point], None] | None,
) -> list[Point]:
    scorer, settings = scoring or (None, None)
    key = digest([plan.key, None if scorer is None else scorer.key])
    known = _known(out, key, resume)
    swept = Sweep(plan, threads=threads, progress=progress)
    out.mkdir(parents=True, exist_ok=True)
    _save(out, key, known)  # a kill before the first point leaves a sweep to resume, too
    loaded = None if settings is None else Loaded(settings, threads)
    points = []
    for t in values:
        if t in known:
            point = known[t]
        elif loaded is not None and scorer is not None:
            with Merged(swept.plan(t), loaded.load, near=out, threads=threads) as weights:
                point = Point(t, scorer.score(weights, "steer"), None)
        else:
            here, folder = swept.plan(t), out / f"t={repr(t).removesuffix('.0')}"
            files = api.model_files(here, folder.name)
            # A kill between the folder's last rename and sweep.json leaves it whole, not noted.
            merge_plan(here, folder, threads=threads, overwrite=resume, side_files=files)
            point = Point(t, None, folder)
        points.append(point)
        known[t] = point  # with those of an earlier, finer sweep that are still to come
        _save(out, key, known)
        if on_point is not None:
            on_point(point)
    if scorer is not None:
        pairs = [(point.t, point.scores.value) for point in points if point.scores is not None]
        write_atomically(out / "sweep.png", sweep_png(pairs))
    return points


def _save(out: Path, key: str, known: Mapping[float, Point]) -> None:
    table = {"key": key, "points": [_json(known[t]) for t in sorted(known)]}
    write_atomically(out / FILE, json.dumps(table, indent=1) + "\n")


def _known(out: Path, key: str, resume: bool) -> dict[float, Point]:
    """The points of an interrupted sweep by t; FastmergeError where ``out`` holds anything else."""
    if not out.exists() or not any(out.iterdir()):
        return {}
    if not resume:
        raise OutputError(f"{out}: is not empty; give a new folder, or --resume a sweep")
    if not (out / FILE).is_file():
        raise OutputError(f"{out}: holds no sweep to resume ({FILE} is missing)")
    try:
        table = json.loads((out / FILE).read_text())
        points = {entry["t"]: _point(entry, out) for entry in table["points"]}
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{out / FILE}: is damaged; use another folder") from None
    if table["key"] != key:
        raise OutputError(
            f"{out}: was begun with another recipe, other models or another evaluation"
        )
    return {t: point for t, point in points.items() if point.out is None or point.out.is_dir()}


def _json(point: Point) -> dict[str, Any]:
    if point.scores is None:
        return {"t": point.t, "model": None if point.out is None else point.out.name}
    return {"t": point.t, "score": none(point.scores.value), "tasks": point.scores.as_json()}


def _point(entry: Mapping[str, Any], out: Path) -> Point:
    if "model" in entry:
        return Point(entry["t"], None, out / entry["model"])
    return Point(entry["t"], Scores.from_json(entry["tasks"]), None)
