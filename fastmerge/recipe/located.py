"""Mappings and lists that know where they stand, from a YAML file, YAML text or Python's own.

Shared by recipes and retrograde schedules. A place ('recipe.yml:12', or 'recipe: models[1].weight'
for a Python dict, which has no lines) is attached to every mapping, key and list item.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastmerge.errors import RecipeError, brief
from fastmerge.limits import MAX_NUMBER_LETTERS


class LocatedDict(dict[str, Any]):
    """A mapping with its own place and each key's."""

    where: str = ""
    at: dict[str, str]
    size: int = 0  # values in it, every alias of the YAML written out
    doubled: tuple[str, ...] = ()  # of a document: keys anywhere in it that a later one replaces


class LocatedList(list[Any]):
    """A list with its own place and each item's."""

    where: str = ""
    at: list[str]
    size: int = 0


def placed(where: str, **values: Any) -> LocatedDict:
    """A mapping that stands, with every key, at one place."""
    result = LocatedDict(values)
    result.where, result.at = where, dict.fromkeys(values, where)
    return result


def located(value: Any, place: str) -> Any:
    """A Python value (dict, list, scalar) as located containers; the place is its key path."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RecipeError(f"{place}: key {brief(key)} is not text")
            _check_text(key, place)
        result = LocatedDict({k: located(v, f"{place}.{k}") for k, v in value.items()})
        result.where, result.at = place, {key: f"{place}.{key}" for key in value}
        return result
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        items = LocatedList(located(item, f"{place}[{i}]") for i, item in enumerate(value))
        items.where, items.at = place, [f"{place}[{i}]" for i in range(len(value))]
        return items
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    plain = value.item() if isinstance(value, np.generic) else value
    if plain is not None and type(plain) not in (bool, int, float, str):
        raise RecipeError(f"{place}: {brief(plain)} has no meaning here")
    if isinstance(plain, str):
        _check_text(plain, place)
    # Beyond that Python does not write them.
    if type(plain) is int and plain.bit_length() > 3 * MAX_NUMBER_LETTERS:
        raise RecipeError(f"{place}: {brief(plain)} has no meaning here")
    return plain


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecipeError(
            f"{place}: {brief(ascii(text))} holds half of a surrogate pair, which is no text"
        ) from None
