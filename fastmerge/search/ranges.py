"""A recipe whose numbers may be ranges: what a search moves in, and the recipe of each point."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmerge.errors import RecipeError, in_words
from fastmerge.methods.types import Float64
from fastmerge.recipe.document import Document
from fastmerge.recipe.located import LocatedDict, LocatedList, placed
from fastmerge.recipe.section import Section, field, listed, real, string, whole

_NUMBER = r"([-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)"
# 0..1; not 0...1, which is 0 to .1 as little as 0. to 1
_SHORT = re.compile(rf"\s*{_NUMBER}\s*\.\.(?!\.)\s*{_NUMBER}\s*")
_MEANT = re.compile(r"\.\.|…|‥")  # in what was meant for such a range
_BETWEEN = 0.381966  # of a range, where no whole number is to be found by chance
_DIGITS = 6  # of a point's numbers: its recipe as text is the point

Choice = str | bool | float
Point = tuple[Choice, ...]  # parallel to a space's dimensions


class Range(Section):
    """A number that is searched: ``layers`` of them along the layers, and as many again for each
    filter of ``per`` and for all other tensors.
    """

    low: float = field(real())
    high: float = field(real())
    start: float | None = field(real(), None)  # by default the middle
    layers: int | None = field(whole(2, 1000), None)
    per: tuple[str, ...] = field(listed(string), ())

    def check(self) -> None:
        if not 0 < self.high - self.low < math.inf:
            raise RecipeError(f"{self.where}: 'low' must be less than 'high', by a finite number")
        if self.start is not None and not self.low <= self.start <= self.high:
            raise RecipeError(f"{self.at('start')}: 'start' must be from 'low' to 'high'")
        if not self.low < _rounded((self.low + self.high) / 2) < self.high:
            raise RecipeError(
                f"{self.where}: from {self.low} to {self.high} lies no number of {_DIGITS} digits, "
                "which those of a point have; give a wider range"
            )
        if len({*self.per, ""}) <= len(self.per):
            raise RecipeError(f"{self.at('per')}: 'per' takes words, each of them once")

    @property
    def middle(self) -> float:
        """Where a search starts, with the digits of a point."""
        start = (self.low + self.high) / 2 if self.start is None else self.start
        return min(self.high, max(self.low, _rounded(start)))


class Choose(Section):
    """A word that is searched, the first one first."""

    choose: tuple[Choice, ...] = field(lambda value: _choices(value))

    def check(self) -> None:
        if len(set(self.choose)) < max(2, len(self.choose)):
            raise RecipeError(f"{self.at('choose')}: 'choose' takes two or more different values")


def _choices(value: Any) -> tuple[Choice, ...]:
    if not isinstance(value, list) or not all(type(v) in (str, bool, int, float) for v in value):
        raise ValueError("must be a list of values")
    return tuple(value)


@dataclass(frozen=True)
class Dimension:
    """One thing that is searched: a number from ``low`` to ``high``, or one of ``choices``."""

    name: str
    low: float = 0.0
    high: float = 0.0
    start: Choice = 0.0
    choices: tuple[Choice, ...] = ()
    model: str | None = None  # the model whose parameter it is
    parameter: str = ""

    @property
    def is_number(self) -> bool:
        return not self.choices


class _Slot(NamedTuple):
    """Where a dimension's value goes."""

    dimension: int


class Ranges:
    """The ranges of one recipe, in its order."""

    def __init__(self, recipe: LocatedDict) -> None:
        """Raises FastmergeError for a range that is none, and where there is none at all."""
        self.dimensions: list[Dimension] = []
        self.per: list[tuple[str, str]] = []  # words of tensors' names, with their places
        models = recipe.get("models")
        listed = models if isinstance(models, LocatedList) else ()
        references = [str(m.get("model")) if isinstance(m, LocatedDict) else "" for m in listed]
        self._labels = labels_of(references)
        self.source = plain(recipe)  # as it is written
        self._pattern = self._found(recipe, (), recipe.where)
        self.where = recipe.where
        if not self.dimensions:
            raise RecipeError(
                f"{recipe.where}: no number of the recipe is a range; write one as 0..1 or as "
                "{low: 0, high: 1}"
            )

    # -------- reading

    def _found(self, value: Any, path: tuple[str | int, ...], where: str) -> Any:
        """The recipe with a slot, or several, in the place of each range."""
        if isinstance(value, LocatedDict):
            if path and value.keys() & {"choose", "low", "high"}:
                is_word = "choose" in value
                if "parameters" not in path and not (is_word and path == ("merge_method",)):
                    raise RecipeError(
                        f"{where}: ranges and 'choose' are for what stands under 'parameters:', "
                        "'choose' for merge_method, too; write one search for each"
                    )
                return (
                    self._slot(path, Choose(value)) if is_word else self._spread(Range(value), path)
                )
            if isinstance(value.get("filter"), str) and isinstance((None, *path)[-1], int):
                path = (*path[:-1], f"({value['filter']})")
            own = {k: self._found(v, (*path, k), value.at[k]) for k, v in value.items()}
            made = LocatedDict(own)
            made.where, made.at = value.where, value.at
            return made
        if isinstance(value, LocatedList):
            pairs = zip(value, value.at, strict=True)
            items = LocatedList(self._found(v, (*path, i), at) for i, (v, at) in enumerate(pairs))
            items.where, items.at = value.where, value.at
            return items
        if not isinstance(value, str) or "parameters" not in path or path[-1] == "filter":
            return value
        found = _SHORT.fullmatch(value)
        if found is None:
            if _MEANT.search(value):
                raise RecipeError(
                    f"{where}: '{value}' is no range; write two finite numbers as 0..1, or as "
                    "{low: 0, high: 1}"
                )
            return value
        given = Range(placed(where, low=float(found[1]), high=float(found[2])))
        return self._spread(given, path)

    def _slot(self, path: tuple[str | int, ...], choose: Choose) -> _Slot:
        name, model, parameter = self._name(path)
        first = choose.choose[0]
        self.dimensions.append(
            Dimension(name, start=first, choices=choose.choose, model=model, parameter=parameter)
        )
        return _Slot(len(self.dimensions) - 1)

    def _spread(self, given: Range, path: tuple[str | int, ...]) -> Any:
        inside = path[-1]
        if given.layers is not None and isinstance(inside, int):
            raise RecipeError(f"{given.at('layers')}: 'layers' is not for one value of a list")
        if given.per and (isinstance(inside, int) or inside == "value"):
            raise RecipeError(f"{given.at('per')}: 'per' is for a parameter as a whole")
        if not given.per:
            return self._along(given, path, "")
        self.per += [(word, given.at("per")) for word in given.per]
        rules = LocatedList(
            placed(given.where, filter=word, value=self._along(given, path, f"({word})"))
            for word in given.per
        )
        rules.append(placed(given.where, value=self._along(given, path, "(others)")))
        rules.where, rules.at = given.where, [given.where] * len(rules)
        return rules

    def _along(self, given: Range, path: tuple[str | int, ...], suffix: str) -> Any:
        name, model, parameter = self._name(path)

        def one(ending: str) -> _Slot:
            self.dimensions.append(
                Dimension(
                    f"{name}{suffix}{ending}",
                    given.low,
                    given.high,
                    given.middle,
                    model=model,
                    parameter=parameter,
                )
            )
            return _Slot(len(self.dimensions) - 1)

        if given.layers is None:
            return one("")
        values = LocatedList(one(f"[{i}]") for i in range(given.layers))
        values.where, values.at = given.where, [given.where] * given.layers
        return values

    def _name(self, path: tuple[str | int, ...]) -> tuple[str, str | None, str]:
        """A dimension's name, its model's and its parameter's: 'math.weight', 'math', 'weight'."""
        model = None
        if path[0] == "models" and len(path) > 1 and isinstance(path[1], int):
            model, path = self._labels[path[1]], path[2:]
        words = [str(part) for part in path if part not in ("parameters", "value")]
        parameter = words[0] if words else ""
        rest = "".join(word if word.startswith("(") else f"[{word}]" for word in words[1:])
        return f"{model}.{parameter}{rest}" if model else f"{parameter}{rest}", model, parameter

    # -------- points

    @property
    def start(self) -> Point:
        """Where every search starts."""
        return tuple(own.start for own in self.dimensions)

    @property
    def numbers(self) -> list[int]:
        """The dimensions that are numbers."""
        return [i for i, own in enumerate(self.dimensions) if own.is_number]

    def units(self, point: Point) -> Float64:
        """A point's numbers, each as the share of the way from low to high."""
        own = [self.dimensions[i] for i in self.numbers]
        values = [float(point[i]) for i in self.numbers]
        pairs = zip(values, own, strict=True)
        return np.array([(x - one.low) / (one.high - one.low) for x, one in pairs])

    def at(self, units: Sequence[float] | Float64, point: Point | None = None) -> Point:
        """The point of these numbers as shares, cut to [0, 1]; its words are those of ``point``."""
        found = list(self.start if point is None else point)
        for share, i in zip(units, self.numbers, strict=True):
            own = self.dimensions[i]
            value = own.low + min(1.0, max(0.0, float(share))) * (own.high - own.low)
            found[i] = min(own.high, max(own.low, _rounded(value)))
        return tuple(found)

    def recipe(self, point: Point) -> LocatedDict:
        """The recipe with the point's values, which knows its places."""
        found = _filled(self._pattern, point)
        assert isinstance(found, LocatedDict)
        return found

    def document(self, point: Point) -> Document:
        """The recipe of a point, checked; raises FastmergeError."""
        return Document(self.recipe(point))

    def words(self) -> Iterator[Point]:
        """The start, and it with every other value of each word."""
        yield self.start
        for i, own in enumerate(self.dimensions):
            for word in own.choices[1:]:
                yield (*self.start[:i], word, *self.start[i + 1 :])

    def ends(self) -> list[Point]:
        """The points of all numbers low and of all of them high."""
        return [self.at([share] * len(self.numbers)) for share in (0.0, 1.0)]

    def check_between(self) -> None:
        """Raises RecipeError where a number must be a whole one: most of a range are not."""
        whole = r"must be a whole number, not .*"
        remedy = "takes whole numbers alone: list them, as {choose: [1, 2, 3]}"
        with in_words({whole: remedy}):
            self.document(self.at([_BETWEEN] * len(self.numbers)))

    def shown(self, point: Point) -> str:
        """A point in words: 'math.weight 0.3, density 0.5'."""
        pairs = zip(self.dimensions, point, strict=True)
        return ", ".join(
            f"{own.name} {value:.4g}" if own.is_number else f"{own.name} {value}"
            for own, value in pairs
        )


def _filled(value: Any, point: Point) -> Any:
    if isinstance(value, _Slot):
        return point[value.dimension]
    if isinstance(value, LocatedDict):
        made = LocatedDict({k: _filled(v, point) for k, v in value.items()})
        made.where, made.at = value.where, value.at
        return made
    if isinstance(value, LocatedList):
        items = LocatedList(_filled(v, point) for v in value)
        items.where, items.at = value.where, value.at
        return items
    return value


def plain(value: Any) -> Any:
    """A recipe as Python's own dictionaries and lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def labels_of(references: Sequence[str]) -> list[str]:
    """The last parts of the models' names; the whole of those that share one."""
    short = [Path(reference).name or reference for reference in references]
    pairs = zip(short, references, strict=True)
    return [reference if short.count(label) > 1 else label for label, reference in pairs]
