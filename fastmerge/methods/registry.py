"""Methods of others: rows that are not fastmerge's own, in this process."""

from __future__ import annotations

from typing import get_args

from fastmerge.errors import FastmergeError, RecipeError
from fastmerge.methods.shapes import Combination, Consensus, Elementwise, Function
from fastmerge.methods.table import METHODS
from fastmerge.methods.types import REQUIRED, Base, Method, Parameter

_OWN = frozenset(METHODS)


def register(method: Method) -> Method:
    """Adds a row, which recipes, schedules, `fastmerge.ops.merge` and the list of methods then know
    like any other.

    ``method``: a Combination, Consensus, Elementwise or Function of `fastmerge.methods.shapes`. Its
    ``version`` (any text) goes into the key that a merge is continued under, so that no output
    mixes two versions of the code.

    Returns the row. Raises FastmergeError for a row that cannot work, or a name that is taken.
    """
    fault = _fault(method)
    if fault:
        raise FastmergeError(f"register: method {method.name!r}: {fault}")
    METHODS[method.name] = method
    return method


def unregister(name: str) -> None:
    """Takes a registered row away again.

    ``name``: of a method that `register` added. Raises FastmergeError for any other.
    """
    if name in _OWN or name not in METHODS:
        raise FastmergeError(f"unregister: no method '{name}' was registered")
    del METHODS[name]


def _fault(method: Method) -> str | None:
    """What is wrong with a row that is not fastmerge's own."""
    if not isinstance(method, (Combination, Consensus, Elementwise, Function)):
        return "make it a Combination, a Consensus, an Elementwise or a Function"
    if not isinstance(method.name, str) or not method.name.isidentifier():
        return "its name must be one word of letters, digits and underscores"
    if method.name in METHODS:
        hint = "" if method.name in _OWN else ", or unregister that first"
        return f"there is one of this name; choose another{hint}"
    if not isinstance(method.version, str) or not method.version:
        return "give it a version, any text that changes with its code"
    if method.base not in get_args(Base):
        return f"base must be one of {', '.join(get_args(Base))}"
    if isinstance(method, Consensus) and method.base != "required":
        return "a consensus is of deltas: its base must be 'required'"
    least, most = method.min_operands, method.max_operands
    if least < 1 or (most is not None and most < least):
        return "it must take at least one model, and max_operands is None or no less than that"
    if len({p.name for p in method.parameters}) < len(method.parameters):
        return "two of its parameters have one name"
    return next((f for p in method.parameters if (f := _parameter_fault(p, method))), None)


def _parameter_fault(parameter: Parameter, method: Method) -> str | None:
    if parameter.kind not in (float, int, bool, str):
        return f"parameter '{parameter.name}': its kind must be float, int, bool or str"
    if parameter.kind is str and not parameter.choices:
        return f"parameter '{parameter.name}': text needs choices"
    if method.random and parameter.name == "rng":
        return "parameter 'rng': is what a random function draws from; choose another name"
    if parameter.default is REQUIRED or parameter.default is None:
        return None
    try:
        parameter.check(parameter.default, "default")
    except RecipeError as error:
        return str(error)
    return None
