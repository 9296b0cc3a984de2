"""What a row of the method table holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from fastmerge.errors import RecipeError
from fastmerge.selection import Sparsify

_LARGEST = float(np.finfo(np.float64).max)  # an int may be larger than any float

REQUIRED: Final = object()  # the default of a parameter that a recipe must give

Values = Mapping[str, Any]  # one tensor's resolved parameters, by name


@dataclass(frozen=True)
class Parameter:
    """One parameter, by mergekit's name. ``per_model`` ones are given for each operand."""

    name: str
    kind: type  # float, int, bool or str
    default: Any
    doc: str
    per_model: bool = False
    low: float | None = None
    high: float | None = None
    open_low: bool = False  # the bound itself is excluded
    choices: tuple[str, ...] = ()  # of a word

    def check(self, value: Any, where: str) -> Any:
        """``value`` as ``kind``, within bounds; raises FastmergeError naming ``where``."""
        if self.kind is str:
            if value not in self.choices:
                raise RecipeError(f"{where}: '{self.name}' must be {self.bounds()}, not {value!r}")
            return value
        if self.kind is bool:
            if isinstance(value, bool):
                return value
            if value in (0, 1):
                return bool(value)
            raise RecipeError(f"{where}: '{self.name}' must be true or false, not {value!r}")
        if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
            raise RecipeError(f"{where}: '{self.name}' must be a number, not {value!r}")
        if abs(value) > _LARGEST or value != value:
            raise RecipeError(f"{where}: '{self.name}' must be finite")
        if self.kind is int and value != int(value):
            raise RecipeError(f"{where}: '{self.name}' must be a whole number, not {value!r}")
        too_low = self.low is not None and (
            value <= self.low if self.open_low else value < self.low
        )
        if too_low or (self.high is not None and value > self.high):
            raise RecipeError(f"{where}: '{self.name}' must be {self.bounds()}, not {value!r}")
        return self.kind(value)

    def bounds(self) -> str:
        """The allowed range in words, for messages and the method list."""
        if self.choices:
            return " or ".join(self.choices)
        low, high = self.low, self.high
        if low is not None and high is not None:
            return f"in {'(' if self.open_low else '['}{low:g}, {high:g}]"
        if low is not None:
            return f"{'above' if self.open_low else 'at least'} {low:g}"
        return f"at most {high:g}" if high is not None else "any number"


@dataclass(frozen=True)
class Combination:
    """out = (sum_i coefficients[i] * x_i) / divisor; coefficients float64, shape (m,) or (vectors,
    m).

    The order of x is the base first, when the method has one, then the operands.
    """

    coefficients: NDArray[np.float64]
    divisor: float | None = None


# (gram or None, globals, per-operand values, has_base) -> Combination. gram is float64 (m, m) or
# (vectors, m, m) over [x_1 ... x_k], or over [base, x_1 - base, ...] when there is a base.
Rule = Callable[["NDArray[np.float64] | None", Values, Sequence[Values], bool], Combination]


@dataclass(frozen=True)
class Consensus:
    """How a consensus method runs for one tensor: arguments of ``select`` and ``consensus``."""

    sparsify: tuple[Sparsify, ...]
    weights: tuple[float, ...]
    elect: bool
    normalize: bool
    scale: float
    across: bool = False  # `sparsify` is for all tensors of the model as one: see plan.spanning


# (globals, per-operand values, element count, random keys per operand) -> Consensus
Spec = Callable[[Values, Sequence[Values], int, Sequence[int]], Consensus]


@dataclass(frozen=True)
class Method:
    """One row of the table. ``base``: 'required', 'optional', 'none' (refused), or 'operand': one
    of the operands must be named base_model and comes first (slerp), or is just another input
    (linear, karcher).
    """

    name: str
    summary: str
    paper: str
    parameters: tuple[Parameter, ...]
    base: Literal["required", "optional", "none", "first", "operand"]
    min_operands: int  # base not counted
    max_operands: int | None
    rule: Rule | None = None
    spec: Spec | None = None
    needs_gram: bool = True  # combinations only: whether the rule reads the Gram matrix
    axis: Callable[[Values], int | None] = lambda values: None  # combinations only
    random: bool = False  # draws from the recipe's seed

    def __post_init__(self) -> None:
        if (self.rule is None) == (self.spec is None):
            raise ValueError(f"method {self.name}: exactly one of rule and spec")

    def parameter(self, name: str) -> Parameter | None:
        """The parameter called ``name``, or None."""
        return next((p for p in self.parameters if p.name == name), None)

    @property
    def is_combination(self) -> bool:
        """Whether the result is a linear combination with coefficients from a Gram matrix."""
        return self.rule is not None


Float64 = NDArray[np.float64]
