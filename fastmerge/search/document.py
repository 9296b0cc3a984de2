"""The file of a search: a recipe whose numbers may be ranges, what scores, and how much."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fastmerge.arguments import a_flag
from fastmerge.errors import RecipeError, in_words
from fastmerge.evaluation.settings import Evaluate, for_function, or_score
from fastmerge.recipe.kinds import keys_of_others
from fastmerge.recipe.located import LocatedDict
from fastmerge.recipe.section import Section, expand, field, one_of, real, whole
from fastmerge.recipe.source import read
from fastmerge.search.optimisers import BATCHED, OPTIMISERS, STAGED
from fastmerge.search.ranges import Ranges

_AT_ONCE = 10_000  # candidates: they are drawn before the first is scored


class Optimiser(Section):
    """Who chooses the candidates."""

    name: str = field(one_of(*OPTIMISERS))
    population: int | None = field(whole(2, _AT_ONCE), None)  # of cma, of a staged batch
    step: float | None = field(real(high=1, above=0), None)  # the first, as a share of the ranges
    batch: int | None = field(whole(1, _AT_ONCE), None)  # at once, of who can do with one

    def check(self) -> None:
        for key, known in (
            ("population", ("cma", "random")),
            ("step", ("cma", "coordinate")),
            ("batch", BATCHED),
        ):
            if getattr(self, key) is not None and self.name not in known:
                raise RecipeError(f"{self.at(key)}: '{key}' is of {' and '.join(known)}; remove it")


class Budget(Section):
    """What the candidates may cost: items scored (items times candidates), or candidates."""

    items: int | None = field(whole(1), None)
    candidates: int | None = field(whole(1), None)

    def check(self) -> None:
        if (self.items is None) == (self.candidates is None):
            raise RecipeError(f"{self.where}: give either 'items' or 'candidates'")

    @property
    def most(self) -> int:
        """In its own unit."""
        return self.items or self.candidates or 0

    @property
    def unit(self) -> str:
        """What it counts."""
        return "candidates" if self.items is None else "items"


def _recipe(value: Any) -> LocatedDict | str:
    if not isinstance(value, (LocatedDict, str)):
        raise ValueError("must be a recipe, or the path of one")
    return value


class SearchFile(Section):
    """A search over the points of one recipe."""

    refused: ClassVar[Mapping[str, str]] = keys_of_others("search")
    space: LocatedDict | str = field(_recipe)
    optimiser: Optimiser = field(Optimiser)
    budget: Budget = field(Budget)
    evaluate: Evaluate = field(Evaluate)
    seed: int | None = field(whole(0, below=2**63), None)
    workers: int = field(whole(1), 1)  # processes that score; what is found is the same
    text: str = ""  # the file as written, for the record
    folder: Path = Path()  # what relative paths in the file are relative to

    @classmethod
    def written_out(cls, data: LocatedDict) -> LocatedDict:
        return expand(data, {"optimiser": "name", "budget": "items"})

    def belongs(self, name: str) -> str:
        return "put it under 'evaluate:'" if name in Evaluate.fields else ""

    def check(self) -> None:
        if self.optimiser.name == "gradient" and self.evaluate.callable is not None:
            raise RecipeError(
                f"{self.optimiser.where}: gradient: needs tasks or a perplexity, which say the "
                "right continuations; a callable's score has no gradient"
            )
        if self.evaluate.stages and self.optimiser.name not in STAGED:
            raise RecipeError(
                f"{self.evaluate.at('stages')}: {self.optimiser.name} compares each candidate with "
                f"the one before, on all items; 'stages' are for {', '.join(STAGED)}"
            )

        if self.evaluate.stages and self.budget.unit == "candidates":
            raise RecipeError(
                f"{self.budget.at('candidates')}: with 'stages' not all candidates cost the same; "
                "give 'items'"
            )

    def ranges(self) -> Ranges:
        """The recipe's ranges; raises FastmergeError where it is none or has none."""
        found = self.space
        if isinstance(found, str):
            near = self.folder / found
            documents, _, _ = read(near if os.path.exists(near) else Path(found), "recipe")
            if len(documents) > 1:
                raise RecipeError(f"{documents[1].where}: a search takes a recipe of one document")
            found = documents[0]
        return Ranges(found)


def load(source: Any, *, is_scored: bool = False) -> SearchFile:
    """A search's file, checked: its own words, not yet its models.

    ``source``: a path, YAML text, a mapping, or a `SearchFile`, which is returned as it is.
    ``is_scored``: by the caller or its function, which needs no `evaluate` section.

    Returns a `SearchFile`. Raises RecipeError, with the line of the fault, FastmergeError for what
    is no source.
    """
    if isinstance(source, SearchFile):
        return source
    documents, written, _ = read(source, "search")
    if len(documents) > 1:
        raise RecipeError(f"{documents[1].where}: the file of a search holds one document")
    is_file = not isinstance(source, Mapping) and "\n" not in str(source)
    folder = Path(os.fspath(source)).parent if is_file else Path()
    document = for_function(documents[0]) if a_flag(is_scored, "is_scored") else documents[0]
    missing = "'evaluate' is missing"
    with in_words({f"{missing}$": f"{missing}; say there what scores{or_score()}"}):
        return SearchFile(document).replace(text=written, folder=folder)
