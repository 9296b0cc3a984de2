"""How models are scored: tasks, hold-out, limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastmerge.errors import RecipeError
from fastmerge.recipe.located import LocatedDict, Section, expand, read

Handler = Callable[[Any], Any]
Positive = Annotated[int, Field(ge=1)]


class Task(Section):
    """One task of the harness: a name or a local YAML file; ``items``: a range of its documents."""

    name: str
    metric: str | None = None  # default: the task's first metric
    items: str | None = None  # "0:200"
    num_fewshot: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _range(self) -> Task:
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
        return self

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


# Keys of a section of which exactly one says what scores; `scorers.register` adds others.
WAYS = ["tasks", "preset", "callable", "perplexity"]


class Evaluate(Section):
    """How states are scored: harness tasks, a callable, a text file's perplexity, or what was
    registered.
    """

    every: Literal["step", "cycle", "end"] = "step"
    tasks: tuple[Task, ...] = ()
    holdout: tuple[Task, ...] = ()
    preset: Literal["open_llm_leaderboard_v1"] | None = None
    callable: str | None = None  # "module:function"
    perplexity: str | None = None  # a text file
    include_path: tuple[str, ...] = ()  # folders with task files
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Positive | None = None
    batch_size: Positive = 32
    max_length: Annotated[int, Field(ge=2)] | None = None
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    stages: tuple[Positive, ...] = ()  # staged halving of searches: items per task, rising
    bootstrap: Annotated[int, Field(ge=100)] = 2000  # resamples of the confidence intervals
    registered: dict[str, Any] = Field(default_factory=dict)  # what registered keys say

    @model_validator(mode="wrap")
    @classmethod
    def _shorthand(cls, value: Any, handler: Handler) -> Any:
        full = expand(value, {"tasks": "name", "holdout": "name", "include_path": ""})
        if isinstance(full, LocatedDict):
            added = {key: full.pop(key) for key in WAYS if key in full.keys() - cls.model_fields}
            full["registered"] = added or None
        return handler(full)

    @model_validator(mode="after")
    def _one_scorer(self) -> Evaluate:
        ways = [w for w in WAYS if self.registered.get(w) or getattr(self, w, None)]
        if len(ways) != 1:
            found = f"found {' and '.join(ways)}" if ways else "found none"
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
        return self

    @property
    def way(self) -> str:
        """The one key that says what scores."""
        return next(w for w in WAYS if self.registered.get(w) or getattr(self, w, None))

    @property
    def scoring_settings(self) -> dict[str, Any]:
        """What decides a score beside the weights and what scores them."""
        return self.model_dump(include={"dtype", "device", "max_length", "limit"})


def load_evaluate(source: Any) -> Evaluate:
    """A schedule's `evaluate` section on its own, from a file, YAML text or a dict."""
    documents, _, _ = read(source, "evaluate")
    return Evaluate.model_validate(documents[0])


def overlap(a: tuple[int, int | None], b: tuple[int, int | None]) -> bool:
    """Whether two ranges of documents share one; None = to the end."""
    ends = [end for _, end in (a, b) if end is not None]
    return max(a[0], b[0]) < min(ends) if ends else True
