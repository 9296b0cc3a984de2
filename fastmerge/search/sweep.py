"""A sweep over t: one Gram pass over the weights, then any number of merges or scores."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastmerge import api
from fastmerge.arguments import a_flag, a_function, a_list, a_path, a_text, one_of, plain
from fastmerge.engine.merge import merge_plan
from fastmerge.engine.products import grams
from fastmerge.errors import (
    FastmergeError,
    ModelError,
    OutputError,
    RecipeError,
    UnsupportedError,
    argument,
    enough_memory,
)
from fastmerge.evaluation.callables import ScoreFunction
from fastmerge.evaluation.evaluators import Measure, same_scorer
from fastmerge.evaluation.journal import check_own, digest, write_own
from fastmerge.evaluation.loaded import Loaded
from fastmerge.evaluation.outlook import slow_products
from fastmerge.evaluation.scorers import Scorer, Scoring, check_kept
from fastmerge.evaluation.scores import SameTasks, Scores, none
from fastmerge.evaluation.settings import Evaluate, load_evaluate
from fastmerge.evaluation.weights import SCORED, Merged
from fastmerge.limits import MAX_JOURNAL_BYTES
from fastmerge.llama import beside
from fastmerge.methods.table import T
from fastmerge.methods.types import Float64
from fastmerge.models.header import read_object
from fastmerge.models.model import folder_of
from fastmerge.models.side_files import is_tokenizer
from fastmerge.output.place import check_space, explain
from fastmerge.planning.plan import Plan
from fastmerge.planning.planner import make_plan
from fastmerge.progress import Progress, Shown, shown
from fastmerge.search.figures import require, sweep_png
from fastmerge.search.folder import Hold, entries
from fastmerge.tree.collapse import Collapsed, coefficients, collapse, weighted_sum
from fastmerge.tree.nodes import Leaf, Merge, Node, walk
from fastmerge.tree.rewrite import rewrite
from fastmerge.tree.unread import without_unread

FILE, BEST = "sweep.json", "best"
WRITTEN = ("all", "best", "none")  # which of a sweep's models become folders
MOST_VALUES = 10_000


@dataclass(frozen=True)
class Point:
    """One value of t, with its scores, the folder it was written to, or both.

    ``t``: as it was given. ``scores``: in percent, None where it is not scored. ``out``: the folder
    of its model, None where it is not written.
    """

    t: float
    scores: Scores | None
    out: Path | None


def parse_range(text: str) -> list[float]:
    """The values of "0:1:0.05", both ends included, or of "0.1,0.3"; else FastmergeError."""
    where = argument("t")
    a_text(text, where)
    try:
        if ":" in text:
            first, last, step = (float(part) for part in text.split(":"))
            if step <= 0 or last < first:
                raise ValueError
            count = int(np.floor((last - first) / step + 1e-9)) + 1
            if count > MOST_VALUES:
                raise FastmergeError(f"{where}: '{text}' has {count} values; at most {MOST_VALUES}")
            values = [round(first + i * step, 12) for i in range(count)]
        else:
            values = [float(part) + 0.0 for part in text.split(",")]  # -0.0 is 0.0
        if not np.isfinite(values).all():
            raise ValueError
        return [T.check(value, where) for value in values]
    except (ValueError, OverflowError):
        raise FastmergeError(
            f"{where}: '{text}' is neither first:last:step with a step above 0, as in 0:1:0.05, "
            "nor a list, as in 0.2,0.5"
        ) from None


@dataclass(frozen=True)
class Outlook:
    """What a sweep is going to do."""

    scored: int  # values of t to score
    written: int  # models to write
    nbytes: int  # of all of them
    notes: tuple[str, ...] = ()  # of what scores


def best_of(points: Sequence[Point]) -> Point | None:
    """The point with the highest score, the smallest t of equals; None where none has a number."""
    scored = [point for point in points if point.scores is not None]
    known = [point for point in scored if point.scores and not math.isnan(point.scores.value)]
    return max(known, key=lambda p: (p.scores.value if p.scores else 0.0, -p.t), default=None)


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
            double = {item.name for item in plan.tensors if item.in_float64}
            self._grams = grams(
                plan.models, wanted, in_float64=double, threads=threads, progress=progress
            )

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
        found = coefficients(moved, self._grams.get(name))
        return weighted_sum(tree.parts, found, measured=tree.needs_gram)


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


@enough_memory("sweep")
def sweep(
    recipe: Any,
    out: str | Path,
    values: Sequence[float],
    *,
    evaluate: Any = None,
    data: str | Path | None = None,
    write: str | None = None,
    resume: bool = False,
    threads: int | None = None,
    score: ScoreFunction | None = None,
    cluster: str | None = None,
    progress: Shown = None,
    on_start: Callable[[Outlook], None] | None = None,
    on_point: Callable[[Point], None] | None = None,
) -> list[Point]:
    """Scores ``recipe`` at each t into out/sweep.json and sweep.png and writes the best model, or,
    without ``evaluate``, writes every model.

    ``recipe``: as `fastmerge.plan` takes it, with a ``t`` or a linear merge of two. ``out``: a
    path. ``values``: those of t, in [-1, 2]. ``evaluate``: the keys of a schedule's `evaluate`
    section, as a file, YAML text or mapping. ``data``: a folder that stands in for that section's
    own. ``write``: 'all', 'best' or 'none' of the models instead. ``resume``: continue a sweep that
    was interrupted; points in sweep.json are not made again. ``threads``: of the CPU's pool,
    default FASTMERGE_NUM_THREADS or every CPU. ``score``: a function that stands in for what
    ``evaluate`` scores by. ``cluster``: a Ray cluster ("auto", "local" or an address) whose nodes
    score, side by side. ``progress``: True for a bar on stderr, or a function of bytes done, bytes
    in all and a tensor's name. ``on_start``, ``on_point``: functions that are called with what will
    be done, and with each point.

    Returns the points, in the order of ``values``. Raises, before a weight is read, RecipeError for
    recipe or settings, ModelError for the models, OutputError for what stands at ``out``,
    ResourceError where the disk has no room for all, FastmergeError for another argument.
    """
    out, resume = a_path(out, "out"), a_flag(resume, "resume")
    a_function(on_start, "on_start")
    a_function(on_point, "on_point")
    # Whole trees: what the recipe's own t leaves out, another takes in.
    plan = recipe if isinstance(recipe, Plan) else make_plan(recipe)
    scoring = _scoring(plan, evaluate, data, score, cluster)
    if write is not None:
        one_of(write, WRITTEN, "write")
    if scoring is None and write not in (None, "all"):
        raise FastmergeError(f"write: '{write}' needs scores: give 'evaluate'")
    if scoring is None and cluster is not None:
        raise UnsupportedError("cluster: scores, and without 'evaluate' nothing is scored")
    write = write or ("all" if scoring is None else "best")
    values = [T.check(plain(value, "values"), "values") for value in a_list(values, "values")]
    with ExitStack() as kept:
        scorer = None
        if scoring is not None:
            scorer = kept.enter_context(scoring.scorer(scores=cluster is None))
        told = kept.enter_context(shown(progress, f"sweeping to {out.name or out}"))
        return _swept(
            plan, out, values, scoring, scorer, write, resume, threads, cluster, told,
            on_start, on_point,
        )  # fmt: skip


@dataclass(frozen=True)
class _Scoring:
    """What scores a sweep's models, to be made here or elsewhere."""

    plan: Plan
    settings: Evaluate
    folder: Path
    function: ScoreFunction | None

    @contextmanager
    def scorer(self, *, scores: bool = True) -> Iterator[Scorer]:
        """See `Scoring`; for as long as it scores, the tokenizer lies in a folder."""
        with ExitStack() as kept:
            tokenizer = folder_of(self.plan.models[0])
            if self.plan.vocabulary is not None or self.plan.chat_template is not None:
                tokenizer = kept.enter_context(beside(self.plan, is_tokenizer))
            made = Scoring.of(self.settings, self.folder, tokenizer, self.function)
            yield made.scorer(scores=scores)


@dataclass(frozen=True)
class _Scores:
    """Makes, wherever it is called, what scores the sweep at one t; see `Evaluators`."""

    swept: Sweep
    scoring: _Scoring
    key: str
    folder: Path

    def __call__(self, number: int, threads: int) -> Measure:
        with self.scoring.scorer() as scorer:
            same_scorer(scorer, self.key)
        own = self.folder / SCORED / str(number)
        return _scores_at(self.swept, self.scoring.settings, scorer, own, threads)


def _scoring(
    plan: Plan, evaluate: Any, data: str | Path | None, score: ScoreFunction | None,
    cluster: str | None,
) -> _Scoring | None:  # fmt: skip
    """What scores; None where nothing is to be scored."""
    if evaluate is None and score is None:
        if data is not None:
            raise FastmergeError("data: is for 'evaluate', which is not given")
        return None
    settings = load_evaluate(evaluate, is_scored=score is not None)
    require(*settings.libraries, cluster=cluster)
    if data is not None:
        settings = settings.with_data(data)
    is_file = isinstance(evaluate, (str, Path)) and "\n" not in str(evaluate)
    return _Scoring(plan, settings, Path(evaluate).parent if is_file else Path(), score)


def _swept(
    plan: Plan,
    out: Path,
    values: Sequence[float],
    scoring: _Scoring | None,
    scorer: Scorer | None,
    write: str,
    resume: bool,
    threads: int | None,
    cluster: str | None,
    progress: Progress | None,
    on_start: Callable[[Outlook], None] | None,
    on_point: Callable[[Point], None] | None,
) -> list[Point]:
    key = digest([plan.key, None if scorer is None else scorer.key])
    if resume and scorer is not None:
        check_kept(scorer)
    try:
        known = _known(out, key, values, resume)
        outlook = _outlook(plan, values, known, write, scored=scorer is not None)
        check_space(_existing(out), outlook.nbytes)
    except OSError as error:
        raise explain(error, out) from error
    if scoring is not None:
        slow = slow_products(scoring.settings) if cluster is None else ()
        outlook = replace(outlook, notes=(*slow, *_unused(scoring.settings)))
    if on_start is not None:
        on_start(outlook)
    points = []
    with ExitStack() as kept:
        kept.enter_context(Hold(out))
        swept = Sweep(plan, threads=threads, progress=progress)
        _save(out, key, known)  # a kill before the first point leaves a sweep to resume, too
        measured: Callable[[float], Scores] | None = None
        if scoring is not None and scorer is not None:
            missing = [t for t in values if known.get(t, Point(t, None, None)).scores is None]
            measured = _measured(swept, scoring, scorer, out, missing, threads, cluster, kept)
        same = SameTasks()
        for t in values:
            point = known.get(t, Point(t, None, None))
            if point.scores is None and measured is not None:
                point = replace(point, scores=measured(t))
            if point.scores is not None and scorer is not None:
                same.check(point.scores, "steer", scorer.version)
            if point.out is None and write == "all":
                folder = out / _folder_of(t)
                _write(swept.plan(t), folder, threads, overwrite=resume)
                point = replace(point, out=folder)
            points.append(point)
            known[t] = point  # with those of an earlier, finer sweep that are still to come
            _save(out, key, known)
            if on_point is not None:
                on_point(point)
        best = best_of(points)
        if write == "best" and best is not None:
            _write(swept.plan(best.t), out / BEST, threads, overwrite=True)
            _save(out, key, known, best.t)
    if scorer is not None:
        pairs = [(point.t, point.scores) for point in points if point.scores is not None]
        write_own(out / "sweep.png", sweep_png(pairs))
    return points


def _scores_at(
    swept: Sweep, settings: Evaluate, scorer: Scorer, near: Path, threads: int | None
) -> Callable[[float], Scores]:
    loaded = Loaded(settings, threads)

    def scores(t: float) -> Scores:
        with Merged(swept.plan(t), loaded.load, near=near, threads=threads) as weights:
            return scorer.score(weights, "steer")

    return scores


def _measured(
    swept: Sweep, scoring: _Scoring, scorer: Scorer, out: Path, values: Sequence[float],
    threads: int | None, cluster: str | None, kept: ExitStack,
) -> Callable[[float], Scores]:  # fmt: skip
    """What gives the scores at one t: here, or of a cluster, which begins with all ``values``."""
    if cluster is None:
        return _scores_at(swept, scoring.settings, scorer, out, threads)
    from fastmerge.evaluation.on_ray import evaluators_on

    make = _Scores(swept, scoring, scorer.key, out.absolute())
    device = scoring.settings.device
    evaluators = kept.enter_context(
        evaluators_on(cluster, make, out, device=device, threads=threads)
    )
    for t in values:
        evaluators.begin(repr(t), t)
    return lambda t: evaluators.answer(repr(t), t)


def _outlook(
    plan: Plan, values: Sequence[float], known: Mapping[float, Point], write: str, *, scored: bool
) -> Outlook:
    points = [known.get(t, Point(t, None, None)) for t in values]
    missing = sum(point.out is None for point in points)
    written = {"all": missing, "best": 1, "none": 0}[write]
    measured = sum(point.scores is None for point in points) if scored else 0
    return Outlook(measured, written, written * plan.bytes_out)


def _unused(settings: Evaluate) -> list[str]:
    """What a sweep makes nothing of, though its file says it."""
    notes = {
        "holdout": "a sweep meets no hold-out: the best of its scores looks better than it is",
        "split": "a sweep scores the steering part alone, whose best looks better than it is",
        "stages": "a sweep scores every t on all items",
    }
    return [f"{settings.at(key)}: {said}" for key, said in notes.items() if getattr(settings, key)]


def _existing(out: Path) -> Path:
    """The folder itself or the nearest above it that exists."""
    return next(folder for folder in (out, *out.absolute().parents) if os.path.isdir(folder))


def _write(plan: Plan, folder: Path, threads: int | None, *, overwrite: bool) -> None:
    files = api.model_files(plan, folder.name)
    # A kill between the folder's last rename and sweep.json leaves it whole, not noted.
    merge_plan(plan, folder, threads=threads, overwrite=overwrite, side_files=files)


def _save(out: Path, key: str, known: Mapping[float, Point], best: float | None = None) -> None:
    table: dict[str, Any] = {"key": key, "points": [_json(known[t]) for t in sorted(known)]}
    if best is not None:
        table["best"] = {"t": best, "model": BEST}
    write_own(out / FILE, json.dumps(table, indent=1) + "\n")


def _folder_of(t: float) -> str:
    return f"t={repr(t).removesuffix('.0')}"


def _known(out: Path, key: str, values: Sequence[float], resume: bool) -> dict[float, Point]:
    """The points of an interrupted sweep by t; FastmergeError where ``out`` holds anything else."""
    check_own(out, FILE, BEST, *(_folder_of(t) for t in values))
    if not entries(out):
        return {}
    begun = os.path.isfile(out / FILE)
    if not begun and resume:
        raise OutputError(f"{out}: holds no sweep to resume ({FILE} is missing)")
    table = _table(out / FILE, out) if begun else None
    if table is not None and not table[1] and entries(out) <= {FILE, SCORED}:
        return {}  # it failed before its first result: nothing stands in the way of the same again
    if table is None or not resume:
        raise OutputError(
            f"{out}: is not empty; give a new folder, or {argument('resume', True)} to go on with "
            "a sweep"
        )
    if table[0] != key:
        raise OutputError(
            f"{out}: was begun with another recipe, other models or another evaluation"
        )
    return table[1]


def _table(file: Path, out: Path) -> tuple[str, dict[float, Point]]:
    """A sweep's key and its points, without the folders that are gone."""
    try:
        table = read_object(file, max_bytes=MAX_JOURNAL_BYTES)
        points = {entry["t"]: _point(entry, out) for entry in table["points"]}
        key = table["key"]
    except (ModelError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise OutputError(f"{file}: is damaged; use another folder") from None
    gone = {t: replace(p, out=None) for t, p in points.items() if p.out and not p.out.is_dir()}
    return key, {t: p for t, p in {**points, **gone}.items() if p.scores or p.out}


def _json(point: Point) -> dict[str, Any]:
    found: dict[str, Any] = {"t": point.t}
    if point.scores is not None:
        found |= {"score": none(point.scores.value), "tasks": point.scores.as_json()}
    if point.out is not None:
        found["model"] = point.out.name
    return found


def _point(entry: Mapping[str, Any], out: Path) -> Point:
    scores = Scores.from_json(entry["tasks"]) if "tasks" in entry else None
    t = entry["t"]
    if entry.get("model", _folder_of(t)) != _folder_of(t):
        raise ValueError("a model that no sweep wrote")
    return Point(t, scores, out / entry["model"] if "model" in entry else None)
