"""Methods of others as plain functions: `method` makes the row from the signature; packages offer
theirs as entry points ``fastmerge.methods``, which load when a name is asked for that no row has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from fastmerge.errors import FOREIGN, FastmergeError, RecipeError, brief, nearest, plain_word
from fastmerge.methods.registry import register
from fastmerge.methods.shapes import (
    Combination,
    Consensus,
    Elementwise,
    Factors,
    Function,
    Terms,
    called,
)
from fastmerge.methods.table import METHODS
from fastmerge.methods.types import REQUIRED, Base, Float64, Method, Parameter, Values

GROUP = "fastmerge.methods"  # of entry points
F = TypeVar("F", bound=Callable[..., Any])
_FIRST = ("gram", "models", "entries", "tensors")


@dataclass(frozen=True)
class Option:
    """What a parameter's annotation may say besides its type: ``Annotated[float, Option("the
    exponent", low=0)]``.

    ``doc``: what it means, for `fastmerge methods`. ``low``, ``high``: the bounds of a number, None
    where there is none. ``open_low``: ``low`` itself is excluded. ``choices``: the words that a
    text may be.
    """

    doc: str = ""
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    choices: tuple[str, ...] = ()


def method(
    name: str | None = None,
    *,
    version: str,
    paper: str = "-",
    min_models: int = 1,
    max_models: int | None = None,
    torch: bool = False,
) -> Callable[[F], F]:
    """Registers the decorated function as a merge method. Its first argument says what it is:

    * gram: returns the coefficients of the models, from their inner products (float64, k x k);
      with ``base``, which is then its inner product with itself, those of the deltas to it;
    * models: how many there are; returns the `Terms` of a consensus of deltas;
    * entries: an `Entry` of each model, what stands for its entries; returns what they become;
    * tensors: the weights, float32 NumPy arrays (float64 in a merge in that), or torch tensors
      with ``torch``; returns the merged one. With ``rng`` it draws from a NumPy generator that
      follows from the seed.

    An argument called base as its second asks for a base model (None where its default is that and
    there is none). What follows are parameters: float, int, bool or str, a ``Sequence`` of them
    where each model has its own, in an `Option` what else there is to say. The docstring's first
    line is the summary.

    ``name``: of the method, default the function's own. ``version``: any text that changes with the
    code. ``paper``: what `fastmerge methods` cites. ``min_models``, ``max_models``: how many a
    recipe may give, None for any number. ``torch``: tensors are torch's and not NumPy's.

    Returns a decorator that gives the function back as it is. Raises FastmergeError for what cannot
    be made a method.
    """

    for what, said in {"name": name, "version": version, "paper": paper}.items():
        if not isinstance(said, str) and not (said is None and what == "name"):
            raise FastmergeError(f"method: {what} must be text, not {brief(said)}")
    if not isinstance(torch, bool):
        raise FastmergeError(f"method: torch must be True or False, not {brief(torch)}")

    def added(function: F) -> F:
        if not callable(function) or not hasattr(function, "__name__"):
            raise FastmergeError(f"method: must decorate a function, not {brief(function)}")
        register(
            _row(function, name or function.__name__, version, paper, min_models, max_models, torch)
        )
        return function

    return added


def _row(
    function: Callable[..., Any],
    name: str,
    version: str,
    paper: str,
    least: int,
    most: int | None,
    torch: bool,
) -> Method:
    def refuse(fault: str) -> FastmergeError:
        return FastmergeError(f"method {name!r}: {fault}")

    try:
        arguments = dict(inspect.signature(function).parameters)
        hints = get_type_hints(function, include_extras=True)
    except (ValueError, TypeError, NameError) as error:  # int; an annotation of no known name
        raise refuse(f"its arguments cannot be read ({error})") from None
    first = next(iter(arguments), None)
    if first not in _FIRST:
        raise refuse(f"its first argument must be called one of {', '.join(_FIRST)}")
    del arguments[first]
    takes_base, draws = arguments.pop("base", None), arguments.pop("rng", None)
    parameters = []
    for argument in arguments.values():
        try:
            parameters.append(_parameter(argument, hints.get(argument.name)))
        except ValueError as error:
            raise refuse(f"argument '{argument.name}': {error}") from None
    base: Base = "operand"
    if takes_base is not None or first == "models":
        optional = takes_base is not None and takes_base.default is None
        base = "optional" if optional else "required"
    per_model = [p.name for p in parameters if p.per_model]

    def call(what: Any, *base_if_any: Any, values: Values, operands: Sequence[Values]) -> Any:
        own = {n: tuple(each[n] for each in operands) for n in per_model}
        return called(name, lambda: function(what, *base_if_any, **{**values, **own}))

    common: dict[str, Any] = {
        "name": name,
        "summary": (inspect.getdoc(function) or name).splitlines()[0].rstrip("."),
        "paper": paper,
        "parameters": tuple(parameters),
        "base": base,
        "min_operands": least,
        "max_operands": most,
        "version": version,
        "random": draws is not None,
    }
    if first == "tensors":
        return Function(**common, function=_of_tensors(function, takes_base is not None, torch))
    if draws is not None or torch:
        raise refuse("only a function of tensors draws, or takes torch's")
    if first == "entries":
        return Elementwise(**common, function=_of_entries(function, takes_base is not None))
    if first == "models":
        return Consensus(**common, spec=_spec(name, call))
    return Combination(**common, rule=_rule(name, call, takes_base is not None))


def _parameter(argument: inspect.Parameter, hint: Any) -> Parameter:
    option = Option()
    if get_origin(hint) is Annotated:
        hint, *said = get_args(hint)
        for one in said:
            option = (
                Option(one) if isinstance(one, str) else one if isinstance(one, Option) else option
            )
    per_model = get_origin(hint) is not None and issubclass(get_origin(hint), Sequence)
    kind = get_args(hint)[0] if per_model else hint
    if kind not in (float, int, bool, str):
        raise ValueError("annotate it as float, int, bool or str, or a Sequence of one of them")
    default = REQUIRED if argument.default is inspect.Parameter.empty else argument.default
    return Parameter(
        argument.name, kind, default, option.doc, per_model,
        option.low, option.high, option.open_low, option.choices,
    )  # fmt: skip


def _of_tensors(
    function: Callable[..., Any], takes_base: bool, torch: bool
) -> Callable[[Any, Sequence[Any], Values], Any]:
    def run(base: Any, tensors: Sequence[Any], values: Values) -> Any:
        if torch:
            from torch import from_numpy

            # Of copies: torch has no tensors that cannot be written, and these may be files.
            tensors = [from_numpy(np.array(x)) for x in tensors]
            base = None if base is None else from_numpy(np.array(base))
        made = function(tensors, *([base] if takes_base else []), **values)
        return made.detach().to(tensors[0].dtype).cpu().numpy() if torch else made

    return run


def _of_entries(function: Callable[..., Any], takes_base: bool) -> Callable[..., Any]:
    def run(base: Any, entries: Sequence[Any], values: Values) -> Any:
        return function(entries, *([base] if takes_base else []), **values)

    return run


def _rule(name: str, call: Callable[..., Any], takes_base: bool) -> Any:
    def rule(
        gram: Float64 | None, values: Values, operands: Sequence[Values], has_base: bool
    ) -> Factors:
        assert gram is not None
        of = gram[1:, 1:] if has_base else gram
        given = [None if not has_base else gram[0, 0]] if takes_base else []
        made = call(of, *given, values=values, operands=operands)
        try:
            found = np.asarray(made, np.float64)
        except (TypeError, ValueError, RuntimeError):  # RuntimeError: torch's, with a gradient
            raise RecipeError(f"{name} returned {brief(made)}, not coefficients") from None
        if found.shape != (len(of),) or not np.isfinite(found).all():
            raise RecipeError(
                f"{name} returned {found.tolist()}, not {len(of)} finite coefficients"
            )
        if has_base:
            found = np.concatenate([[1.0 - found.sum()], found])
        return Factors(found)

    return rule


def _spec(name: str, call: Callable[..., Any]) -> Any:
    def spec(values: Values, operands: Sequence[Values]) -> Terms:
        terms = call(len(operands), values=values, operands=operands)
        count = len(operands)
        if not isinstance(terms, Terms) or not len(terms.keep) == len(terms.weights) == count:
            raise RecipeError(f"{name} must return Terms with a Keep and a weight for each model")
        return terms

    return spec


# What methods are called elsewhere, some of them like another method's name.
_OTHER_NAMES = {
    **dict.fromkeys(
        ("average", "weighted_average", "mean", "soup", "model_soup", "model_soups", "lerp"),
        "linear",
    ),
    **dict.fromkeys(("frankenmerge", "franken", "stack", "concat", "copy"), "passthrough"),
    "karcher_mean": "karcher",
    "ta": "task_arithmetic",
    "task_vector": "task_arithmetic",
}


def find(name: str, where: str = "merge_method") -> Method:
    """The row called ``name``; raises FastmergeError with the nearest known name."""
    row = known(name)
    if row is None:
        meant = _OTHER_NAMES.get(plain_word(name))
        hint = f"did you mean '{meant}'?" if meant else nearest(name, METHODS)
        raise RecipeError(f"{where}: unknown method '{name}'; {hint}")
    return row


def known(name: str) -> Method | None:
    """The row called ``name``, after a look at installed packages where there is none."""
    if name not in METHODS:
        load()
    return METHODS.get(name)


@lru_cache(maxsize=1)
def load() -> None:
    """Imports what installed packages offer as ``fastmerge.methods``, once; an entry point is a
    module or a function whose import registers methods, or a row.
    """
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP):
        package = entry.dist.name if entry.dist else entry.value
        try:
            offered = entry.load()
            if isinstance(offered, Method) and METHODS.get(offered.name) is not offered:
                register(offered)
        except FOREIGN as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise FastmergeError(
                f"{GROUP}: '{entry.name}' of {package} does not load ({said}); mend or remove it"
            ) from error
