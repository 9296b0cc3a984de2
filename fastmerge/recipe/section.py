"""Sections: the mappings of a recipe or a schedule as classes, whose faults are one line with their
place.

A field is a class attribute, ``name: type = field(kind, default)``; a kind is a function from what
the file holds to a value, which raises ValueError with what the value must be. Not by a library for
validation: to import one takes longer than to plan a merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from copy import copy
from typing import Any, ClassVar, NoReturn, TypeVar, overload

from fastmerge.errors import FastmergeError, RecipeError, UnsupportedError, near_miss, nearest
from fastmerge.limits import MAX_RECIPE_VALUES
from fastmerge.recipe.located import LocatedDict, LocatedList, located, placed

T = TypeVar("T")
D = TypeVar("D")
S = TypeVar("S", bound="Section")
Kind = Callable[[Any], T]

_REQUIRED: Any = object()


class FaultError(ValueError):
    """What a value must be; ``path`` leads to it through lists, ``error`` is the class to raise."""

    def __init__(self, message: str, *path: int, error: type[FastmergeError] = RecipeError) -> None:
        super().__init__(message)
        self.path, self.error = path, error

    @classmethod
    def inside(cls, index: int, fault: ValueError) -> FaultError:
        """The fault of item ``index``, as its list has it."""
        path = getattr(fault, "path", ())
        return cls(str(fault), index, *path, error=getattr(fault, "error", RecipeError))


class _Field:
    """A field until its class is made."""

    def __init__(self, kind: Kind[Any], default: Any) -> None:
        self.kind, self.default = kind, default


@overload
def field(kind: Kind[T]) -> T: ...
@overload
def field(kind: Kind[T], default: D) -> T | D: ...
def field(kind: Kind[Any], default: Any = _REQUIRED) -> Any:
    """A field of a `Section`: required, or with the value of an absent or null key."""
    return _Field(kind, default)


class Section:
    """A mapping in a recipe or schedule: unknown keys are refused with the nearest known one.

    ``refused`` maps keys that other tools know to why they cannot be used here. A null value counts
    as absent. A ``tolerant`` section refuses only those unknown keys that misspell a known one, and
    lists the others in ``ignored``. Made from the mapping; raises FastmergeError with the place of
    the first fault.
    """

    tolerant: ClassVar[bool] = False

    refused: ClassVar[Mapping[str, str]] = {}
    fields: ClassVar[Mapping[str, _Field]] = {}  # by name, in order
    where: str  # the section's own place
    ignored: tuple[str, ...]  # unknown keys in words: name, place, where it belongs
    _at: Mapping[str, str]

    def __init_subclass__(cls) -> None:
        own = {name: value for name, value in vars(cls).items() if isinstance(value, _Field)}
        cls.fields = {**cls.fields, **own}
        for name in own:
            delattr(cls, name)

    def __init__(self, data: Any) -> None:
        if not isinstance(data, Mapping):
            wanted = ", ".join(f"'{k}:'" for k, f in self.fields.items() if f.default is _REQUIRED)
            raise FaultError(f"must be a mapping with {wanted}" if wanted else "must be a mapping")
        if not isinstance(data, LocatedDict):
            data = located(data, type(self).__name__.lower())
        data = self.written_out(data)
        self.where, self._at = data.where, data.at
        ignored = list(data.doubled)
        for name in data:  # before other keys: a file of another kind has more that are unknown
            if name in self.refused and data[name] is not None:
                raise UnsupportedError(
                    f"{data.at[name]}: '{name}' is not supported: {self.refused[name]}"
                )
        for name in data:
            if name in self.fields or name in self.refused:
                continue
            if not self.tolerant or self.misspells(name):
                raise RecipeError(f"{data.at[name]}: unknown key '{name}'; {self.hint(name)}")
            remedy = self.belongs(name)
            ignored.append(f"'{name}' ({data.at[name]}{f'; {remedy}' if remedy else ''})")
        self.ignored = tuple(ignored)
        for name, own in self.fields.items():
            setattr(self, name, _value(own, name, data))
        self.check()

    @classmethod
    def written_out(cls, data: LocatedDict) -> LocatedDict:
        """``data`` without the shorthand that this section allows."""
        return data

    def misspells(self, name: str) -> bool:
        """Whether an unknown key is a misspelling of a known one."""
        return near_miss(name, self.fields) is not None

    def hint(self, name: str) -> str:
        """Where a key that is unknown here belongs, or the nearest that is known."""
        return self.belongs(name) or nearest(name, self.fields)

    def belongs(self, name: str) -> str:  # noqa: ARG002
        """What to do instead of an unknown key that means something elsewhere; empty where it means
        nothing.
        """
        return ""

    def check(self) -> None:
        """What the kinds do not say; raises FastmergeError. The section knows its places by now."""

    def refuse(self, key: str, message: str) -> NoReturn:
        """Raises RecipeError at the place of ``key``."""
        raise RecipeError(f"{self.at(key)}: {message}")

    def at(self, name: str) -> str:
        """The place of the key ``name``, or of the section when the key is absent."""
        return self._at.get(name, self.where)

    def replace(self: S, **values: Any) -> S:
        """The same but for ``values``, which are not checked."""
        other = copy(self)
        vars(other).update(values)
        return other

    def plain(self, *, without: Collection[str] = ()) -> dict[str, Any]:
        """The values by key, sections among them as dicts."""
        return {name: _plain(getattr(self, name)) for name in self.fields if name not in without}


def _value(own: _Field, name: str, data: LocatedDict) -> Any:
    given = data.get(name)
    if given is None and own.default is not _REQUIRED:
        return own.default
    try:
        if given is None:
            strange = next((key for key in data if "did you" in nearest(key, (name,))), name)
            raise FaultError("is missing" + (f"; is it '{strange}'?" if strange != name else ""))
        if isinstance(given, (LocatedDict, LocatedList)) and given.size > MAX_RECIPE_VALUES:
            raise FaultError(
                f"makes more than {MAX_RECIPE_VALUES} values of its aliases; write out what "
                "is meant"
            )
        return own.kind(given)
    except ValueError as error:
        fault = error if isinstance(error, FaultError) else FaultError(str(error))
        place, path, inner = data.at.get(name, data.where), name, given
        for index in fault.path:
            path += f"[{index}]"
            if isinstance(inner, LocatedList) and index < len(inner):
                place, inner = inner.at[index], inner[index]
        raise fault.error(f"{place}: '{path}' {fault}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.plain()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


# ---------------------------------------------------------------- kinds


def string(value: Any) -> str:
    """Text as it is."""
    if not isinstance(value, str):
        raise FaultError("must be text; quote it")
    return value


def whole(low: float = -math.inf, high: float = math.inf, *, below: float = math.inf) -> Kind[int]:
    """A whole number in [low, high] and less than ``below``; quoted ones count."""

    def kind(value: Any) -> int:
        try:
            found = int(value) if isinstance(value, str) else value
        except ValueError:
            found = None
        if isinstance(found, bool) or not isinstance(found, (int, float)) or found % 1:
            raise FaultError("must be a valid integer")
        _check_bounds(found, low, high, below=below)
        return int(found)

    return kind


def real(
    low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf
) -> Kind[float]:
    """A finite number in [low, high] and more than ``above``; quoted ones count."""

    def kind(value: Any) -> float:
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not math.isfinite(found):
            raise FaultError("must be a valid number")
        _check_bounds(found, low, high, above=above)
        return found

    return kind


def _check_bounds(
    value: float, low: float, high: float, *, above: float = -math.inf, below: float = math.inf
) -> None:
    for fits, words, bound in (
        (value >= low, "greater than or equal to", low),
        (value > above or above == -math.inf, "greater than", above),
        (value <= high, "less than or equal to", high),
        (value < below or below == math.inf, "less than", below),
    ):
        if not fits:
            raise FaultError(f"must be {words} {bound}")


def one_of(*words: str) -> Kind[str]:
    """One of ``words``."""

    def kind(value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            *most, last = (f"'{word}'" for word in words)
            raise FaultError(f"must be {', '.join(most)} or {last}" if most else f"must be {last}")
        return value

    return kind


def listed(kind: Kind[T], count: int | None = None) -> Kind[tuple[T, ...]]:
    """A list of one kind, of ``count`` values where that is given."""

    def items(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list):
            glued = isinstance(value, (str, dict)) and any(
                str(text).startswith("-") for text in ([value] if isinstance(value, str) else value)
            )
            raise FaultError(f"must be a list{'; write a blank behind each -' * glued}")
        if count is not None and len(value) < count:
            raise FaultError("is missing", len(value))
        if count is not None and len(value) > count:
            raise FaultError(f"must have {count} values, not {len(value)}")
        found = []
        for index, item in enumerate(value):
            try:
                found.append(kind(item))
            except ValueError as fault:
                raise FaultError.inside(index, fault) from None
        return tuple(found)

    return items


def mapping(value: Any) -> Mapping[str, Any]:
    """Any mapping, as it is."""
    if not isinstance(value, Mapping):
        raise FaultError("must be a mapping")
    return value


# ---------------------------------------------------------------- shorthand


def expand(data: LocatedDict, short: Mapping[str, str]) -> LocatedDict:
    """Writes out shorthand: ``accept: improve`` means ``accept: {rule: improve}``; lists by item.

    ``short`` maps a key to the one a bare value stands for; "" for keys that hold a list of texts.
    """
    full = LocatedDict(data)
    full.where, full.at = data.where, data.at

    def section(value: Any, key: str, place: str) -> Any:
        if isinstance(value, Mapping) or value is None:
            return value
        return placed(place, **{key: value})

    for name, key in short.items():
        value = data.get(name)
        if key == "":
            if isinstance(value, str):
                full[name] = LocatedList([value])
                full[name].where, full[name].at = data.at[name], [data.at[name]]
        elif isinstance(value, LocatedList) and key != "methods":
            items = LocatedList(
                section(item, key, place) for item, place in zip(value, value.at, strict=True)
            )
            items.where, items.at = value.where, value.at
            full[name] = items
        elif name in data:
            full[name] = section(value, key, data.at[name])
    return full
