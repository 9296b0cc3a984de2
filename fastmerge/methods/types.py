"""What a row of the method table holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from fastmerge.errors import RecipeError, brief
from fastmerge.once import cached_property

_LARGEST = float(np.finfo(np.float64).max)  # an int may be larger than any float
_LARGEST_F32 = float(np.finfo(np.float32).max)  # what tensors are computed in

REQUIRED: Final = object()  # the default of a parameter that a recipe must give

Base = Literal["required", "optional", "none", "first", "operand"]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Values = Mapping[str, Any]  # one tensor's resolved parameters, by name

# Papers behind rows of more than one table.
TASK_ARITHMETIC = "Ilharco et al. 2022, arXiv:2212.04089"
TIES = "Yadav et al. 2023, arXiv:2306.01708"
DARE = "Yu et al. 2023, arXiv:2311.03099"


# What mergekit reads as a truth value where it stands in quotes; YAML reads it without.
_WORDS = {
    **dict.fromkeys(("true", "yes", "on", "t", "y"), True),
    **dict.fromkeys(("false", "no", "off", "f", "n"), False),
}


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
    words: tuple[tuple[str, bool], ...] = ()  # what true and false are called, too
    # The way from the first operand (0) to the second (1): at either end the other is not read, and
    # outside is extrapolation, which [-1, 2] keeps from being another unit's number.
    fraction: bool = False

    @property
    def argument(self) -> str:
        """Its name as a function's argument: ``lambda`` is Python's own word."""
        return "lambda_" if self.name == "lambda" else self.name

    def check(self, value: Any, where: str) -> Any:
        """``value`` as ``kind``, within bounds; raises FastmergeError naming ``where``."""
        if self.kind is str:
            if value not in self.choices:
                raise RecipeError(
                    f"{where}: '{self.name}' must be {self.bounds()}, not {brief(value)}"
                )
            return value
        if self.kind is bool:
            if isinstance(value, str) and value in (*dict(self.words), *self.choices):
                return dict(self.words).get(value, value)
            if isinstance(value, bool):
                return value
            if value in (0, 1):
                return bool(value)
            if isinstance(value, str) and value.lower() in _WORDS:
                return _WORDS[value.lower()]
            raise RecipeError(f"{where}: '{self.name}' must be {self.bounds()}, not {brief(value)}")
        if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
            text = value.strip() if isinstance(value, str) else ""
            comma = re.fullmatch(r"[+-]?\d*,\d+", text)
            hint = f"; write {text.replace(',', '.')}" if comma else ""
            if re.fullmatch(r"\d+(\.\d+)? ?%", text):
                hint = f"; write {float(text.rstrip(' %')) / 100:g}"
            raise RecipeError(f"{where}: '{self.name}' must be a number, not {brief(value)}{hint}")
        if abs(value) > _LARGEST or value != value:
            raise RecipeError(f"{where}: '{self.name}' must be finite")
        if self.kind is int and value != int(value):
            raise RecipeError(f"{where}: '{self.name}' must be a whole number, not {brief(value)}")
        too_low = self.low is not None and (
            value <= self.low if self.open_low else value < self.low
        )
        if too_low or (self.high is not None and value > self.high):
            percent = self.fraction and 5 <= value <= 100
            hint = f"; for {value:g} % write {value / 100:g}" if percent else ""
            raise RecipeError(
                f"{where}: '{self.name}' must be {self.bounds()}, not {brief(value)}{hint}"
            )
        if abs(value) > _LARGEST_F32:
            raise RecipeError(
                f"{where}: '{self.name}' must fit into float32 (up to {_LARGEST_F32:.2g}), not "
                f"{brief(value)}"
            )
        return self.kind(value)

    def bounds(self) -> str:
        """The allowed range in words, for messages and the method list."""
        if self.kind is bool:
            return " or ".join(("true", "false", *dict(self.words), *self.choices))
        if self.choices:
            return " or ".join(self.choices)
        low, high = self.low, self.high
        if low is not None and high is not None:
            return f"in {'(' if self.open_low else '['}{low:g}, {high:g}]"
        if low is not None:
            return f"{'above' if self.open_low else 'at least'} {low:g}"
        return f"at most {high:g}" if high is not None else "any number"


@dataclass(frozen=True)
class Method:
    """One row of the table; how it is computed is its class, see `fastmerge.methods.shapes`.

    ``base``: 'required', 'optional', 'none' (refused), or 'operand': one of the operands must be
    named base_model and comes first (slerp), or is just another input (linear, karcher).
    """

    on_gpu: ClassVar[bool] = True  # whether the GPU has kernels for methods of this shape

    name: str
    summary: str
    paper: str
    parameters: tuple[Parameter, ...]
    base: Base
    min_operands: int  # base not counted
    max_operands: int | None
    random: bool = False  # draws from the recipe's seed
    version: str = ""  # of a row that is not fastmerge's own: of its code

    @property
    def of_deltas(self) -> bool:
        """Whether it takes of its models only what they differ by from the base: without a base,
        deltas are merged to a delta.
        """
        return False

    @property
    def beside(self) -> int:
        """How many tensors some kernel takes together with one for each operand."""
        return 0

    @property
    def identity(self) -> str:
        """Name and version: what a result is known by that another merge may take up."""
        return f"{self.name} {self.version}" if self.version else self.name

    def meaning(self, _values: Values, _operands: Sequence[Values], _has_base: bool, /) -> str:
        """What decides the result besides the values: its identity, and what it is computed by
        where that is not said there.
        """
        return self.identity

    def parameter(self, name: str) -> Parameter | None:
        """The parameter called ``name``, or None."""
        return self._by_name.get(name)

    @cached_property
    def _by_name(self) -> dict[str, Parameter]:
        return {parameter.name: parameter for parameter in self.parameters}
