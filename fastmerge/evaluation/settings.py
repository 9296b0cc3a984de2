"""How models are scored: tasks, hold-out, limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fastmerge.arguments import a_path
from fastmerge.errors import RecipeError, argument
from fastmerge.evaluation.split import Split
from fastmerge.recipe.kinds import keys_of_others
from fastmerge.recipe.located import LocatedDict, placed
from fastmerge.recipe.section import Section, expand, field, listed, mapping, one_of, string, whole
from fastmerge.recipe.source import read


class Task(Section):
    """One task of the harness: a name or a local YAML file; ``items``: a range of its documents."""

    name: str = field(string)
    metric: str | None = field(string, None)  # default: the task's first metric
    items: str | None = field(string, None)  # "0:200"
    num_fewshot: int | None = field(whole(0), None)

    def check(self) -> None:
        if self.items is not None:
            first, colon, last = self.items.partition(":")
            if not colon or not all(part.strip().isdecimal() or not part for part in (first, last)):
                raise RecipeError(
                    f"{self.at('items')}: 'items' is a range such as '0:200' or '200:', "
                    f"not '{self.items}'"
                )
            begin, end = self.span
            if end is not None and end <= begin:
                raise RecipeError(f"{self.at('items')}: 'items' {self.items} holds no document")

    @property
    def span(self) -> tuple[int, int | None]:
        """First document and the one past the last (None = to the end)."""
        first, _, last = (self.items or ":").partition(":")
        return int(first or 0), int(last) if last else None

    @property
    def key(self) -> str:
        """The name in reports and files; tells two ranges of one task apart."""
        short = Path(self.name).stem if self.name.endswith((".yaml", ".yml")) else self.name
        return short if self.items is None else f"{short}[{self.items}]"


_STANDS_IN = "python:score"  # a callable that is never imported
# Keys of a section of which exactly one says what scores; `scorers.register` adds others.
WAYS = ["tasks", "preset", "callable", "perplexity"]


class Evaluate(Section):
    """How states are scored: harness tasks, a callable, a text file's perplexity, or what was
    registered.
    """

    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        keys_of_others(), "what an 'evaluate' section may say stands here; give those keys alone"
    )
    every: str = field(one_of("step", "cycle", "end"), "step")
    tasks: tuple[Task, ...] = field(listed(Task), ())
    holdout: tuple[Task, ...] = field(listed(Task), ())
    split: Split | None = field(Split, None)  # of the same items, instead of ``holdout``
    preset: str | None = field(one_of("open_llm_leaderboard_v1"), None)
    callable: str | None = field(string, None)  # "module:function"
    perplexity: str | None = field(string, None)  # a text file
    data: str | None = field(string, None)  # a folder of JSON lines for the harness's own tasks
    include_path: tuple[str, ...] = field(listed(string), ())  # folders with task files
    num_fewshot: int | None = field(whole(0), None)
    limit: int | None = field(whole(1), None)
    batch_size: int = field(whole(1), 32)
    max_length: int | None = field(whole(2), None)
    device: str = field(string, "cpu")
    dtype: str = field(one_of("float32", "bfloat16", "float16"), "float32")
    # Staged halving of searches: items per task, rising.
    stages: tuple[int, ...] = field(listed(whole(1)), ())
    bootstrap: int = field(whole(100), 2000)  # resamples of the confidence intervals
    # What registered keys say.
    registered: Mapping[str, Any] = field(mapping, {})

    @classmethod
    def written_out(cls, data: LocatedDict) -> LocatedDict:
        full = expand(data, {"tasks": "name", "holdout": "name", "include_path": ""})
        added = {key: full.pop(key) for key in WAYS if key in full.keys() - cls.fields}
        full["registered"] = added or None
        return full

    def check(self) -> None:
        ways = [w for w in WAYS if self.registered.get(w) or getattr(self, w, None)]
        if len(ways) != 1:
            found = f"found {' and '.join(ways)}" if ways else f"found none{or_score()}"
            raise RecipeError(f"{self.where}: steer by exactly one of {', '.join(WAYS)}; {found}")
        if list(self.stages) != sorted(set(self.stages)):
            raise RecipeError(f"{self.at('stages')}: 'stages' must rise")
        if self.callable is not None and not all(self.callable.partition(":")):
            raise RecipeError(
                f"{self.at('callable')}: 'callable' is 'module:function', not '{self.callable}'"
            )
        if self.holdout and not (self.tasks or self.preset):
            raise RecipeError(
                f"{self.at('holdout')}: 'holdout' tasks go with 'tasks' or a 'preset'; a callable "
                "that takes 'split' scores its own hold-out"
            )
        if self.split is not None and self.holdout:
            raise RecipeError(
                f"{self.at('split')}: 'split' takes the hold-out from the tasks themselves; remove "
                "it, or 'holdout'"
            )
        if self.split is not None and self.callable is not None:
            raise RecipeError(
                f"{self.at('split')}: 'split' goes with 'tasks', a 'preset' or a 'perplexity'; a "
                "callable that takes 'split' scores its own hold-out"
            )
        if self.data is not None and not (self.tasks or self.preset):
            raise RecipeError(f"{self.at('data')}: 'data' goes with 'tasks' or a 'preset'")
        for held in self.holdout:
            for steering in self.tasks:
                if steering.name == held.name and overlap(steering.span, held.span):
                    raise RecipeError(
                        f"{held.where}: '{held.key}' is both a steering task and a hold-out: "
                        "give the hold-out another task or disjoint 'items'"
                    )
        keys = [t.key for t in (*self.tasks, *self.holdout)]
        for task in (*self.tasks, *self.holdout):
            if keys.count(task.key) > 1:
                raise RecipeError(f"{task.where}: task '{task.key}' is listed twice")

    def with_data(self, folder: str | Path) -> Evaluate:
        """The same with the rows of the harness's own tasks from ``folder``, as the working
        directory has it; raises FastmergeError where nothing reads it.
        """
        if not (self.tasks or self.preset):
            raise RecipeError(f"data: {self.way} reads none; it goes with 'tasks' or a 'preset'")
        return self.replace(data=str(a_path(folder, "data").expanduser().resolve()))

    @property
    def way(self) -> str:
        """The one key that says what scores."""
        return next(w for w in WAYS if self.registered.get(w) or getattr(self, w, None))

    def fewest(self, limit: int | None) -> int | None:
        """The items a task to score: ``limit`` or the settings' own; None is all."""
        return min((n for n in (limit, self.limit) if n is not None), default=None)

    @property
    def libraries(self) -> tuple[str, ...]:
        """What scoring imports; a callable that is handed a folder need not have transformers."""
        if self.callable is not None or self.registered:
            return ("torch",)
        harness = ("lm_eval",) if self.tasks or self.preset else ()
        return ("torch", "transformers", *harness)

    @property
    def scoring_settings(self) -> dict[str, Any]:
        """What decides a score beside the weights and what scores them."""
        found = {name: getattr(self, name) for name in ("dtype", "device", "max_length", "limit")}
        # Only where there is one: what was scored without keeps its key.
        return found if self.split is None else {**found, "split": self.split.plain()}


def or_score() -> str:
    """What a Python caller may do where nothing scores."""
    return " (or pass score=, a function)" if argument("score") == "score" else ""


def for_function(document: LocatedDict) -> LocatedDict:
    """The document of a schedule or a search that a function given from Python scores: its
    `evaluate` section need not say what scores, and may be missing.
    """
    own = _for_function(document.get("evaluate"))
    full = LocatedDict({**document, "evaluate": own})
    full.where, full.at = document.where, {"evaluate": document.where, **document.at}
    return full


def _for_function(section: Any) -> Any:
    if section is None:
        return placed("evaluate", callable=_STANDS_IN)
    if not isinstance(section, LocatedDict) or any(section.get(way) for way in WAYS):
        return section
    full = LocatedDict({**section, "callable": _STANDS_IN})
    full.where, full.at = section.where, {**section.at, "callable": section.where}
    return full


def load_evaluate(source: Any, *, is_scored: bool = False) -> Evaluate:
    """A schedule's `evaluate` section on its own, from a file, YAML text or a dict; ``is_scored``:
    by a function given from Python, for which it need not say what scores, nor be there (None).
    """
    document = None if source is None and is_scored else read(source, "evaluate")[0][0]
    return Evaluate(_for_function(document) if is_scored else document)


def overlap(a: tuple[int, int | None], b: tuple[int, int | None]) -> bool:
    """Whether two ranges of documents share one; None = to the end."""
    ends = [end for _, end in (a, b) if end is not None]
    return max(a[0], b[0]) < min(ends) if ends else True
