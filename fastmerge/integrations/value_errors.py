"""Errors that callers of the replaced functions catch as ValueError."""

from __future__ import annotations

from collections.abc import Mapping

from fastmerge.errors import FastmergeError, ModelError, RecipeError, UnsupportedError


class RecipeValueError(RecipeError, ValueError):
    """A RecipeError where the package that is stood in for raises ValueError."""


class ModelValueError(ModelError, ValueError):
    """A ModelError where the package that is stood in for raises ValueError."""


class UnsupportedValueError(UnsupportedError, ValueError):
    """An UnsupportedError where the package that is stood in for raises ValueError."""


class ArgumentValueError(FastmergeError, ValueError):
    """A FastmergeError about a call where the package that is stood in for raises ValueError."""


_OF: Mapping[type[FastmergeError], type[FastmergeError]] = {
    FastmergeError: ArgumentValueError,
    RecipeError: RecipeValueError,
    ModelError: ModelValueError,
    UnsupportedError: UnsupportedValueError,
}


def as_value_error(error: FastmergeError, text: str | None = None) -> FastmergeError:
    """The same, with another ``text`` if there is one, as a ValueError too where it is about
    recipe, models or arguments.
    """
    return _OF.get(type(error), type(error))(str(error) if text is None else text)
