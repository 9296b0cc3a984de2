"""The shapes of methods: what a row of the table is computed by.

* `Combination`: ``rule`` turns the operands' Gram matrix into coefficients; the weights are read by
  ``gram`` and ``combine`` only;
* `Consensus`: ``spec`` says which delta entries survive; ``select`` and ``consensus`` do the work;
* `Pointwise`: ``formula`` says what each entry becomes from those at its place;
* `Elementwise`: so does ``function``, in Python, of symbols: what others write;
* `Function`: a Python function of whole tensors, for what no kernel does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from fastmerge.errors import FOREIGN, FastmergeError
from fastmerge.methods.entries import Entry, Program, compiled, inputs
from fastmerge.methods.types import Float64, Method, Values
from fastmerge.primitives import Agreement
from fastmerge.selection import (
    ALL,
    EVERY,
    MAGNITUDE,
    MIXED,
    RANDOM,
    RANKED,
    Selection,
    Sparsify,
    band_counts,
    keep_below,
    keep_count,
)

R = TypeVar("R")


@dataclass(frozen=True)
class Factors:
    """out = (sum_i coefficients[i] * x_i) / divisor; coefficients float64, shape (m,) or (vectors,
    m). The divisor is the coefficients' own sum, as fp32's accumulation has it.

    The order of x is the base first, when the method has one, then the operands.
    """

    coefficients: Float64
    divisor: float | None = None

    @property
    def weights(self) -> Float64:
        """The coefficients, divided by their sum in float64."""
        if self.divisor is None:
            return self.coefficients
        return self.coefficients / float(np.cumsum(self.coefficients)[-1])


# (gram or None, globals, per-operand values, has_base) -> Factors. gram is float64 (m, m) or
# (vectors, m, m) over [x_1 ... x_k], or over [base, x_1 - base, ...] when there is a base.
Rule = Callable[["Float64 | None", Values, Sequence[Values], bool], Factors]


# The rule of one finite matrix of numbers in rows, without a base, to the numbers of its `Factors`,
# which has no divisor: Python takes a few microseconds less for those than for arrays.
RuleOfOne = Callable[[Sequence[Sequence[float]], Values], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Combination(Method):
    """A linear combination of the operands with coefficients from their Gram matrix."""

    rule: Rule
    of_one: RuleOfOne | None = None
    needs_gram: bool = True  # whether the rule reads the Gram matrix
    batched: bool = False  # whether it takes a stack of them: (vectors, m, m)
    axis: Callable[[Values], int | None] = lambda values: None  # 1: row by row, 0: column by column

    def factors(
        self, gram: Float64 | None, values: Values, operands: Sequence[Values], has_base: bool
    ) -> Factors:
        """The rule's answer for ``gram``, which is as `Rule` has it; of a stack one after another
        where it takes none.
        """
        if gram is None or gram.ndim == 2 or self.batched:
            return self.rule(gram, values, operands, has_base)
        each = [self.rule(own, values, operands, has_base).weights for own in gram]
        return Factors(np.stack(each))


class Keep(NamedTuple):
    """What shall survive of one delta, whatever its size.

    ``kind``: ALL, MAGNITUDE, RANDOM or RANKED of `fastmerge.selection`. ``density``: the fraction
    of entries that stays, in [0, 1]. ``tie_rule``: MIXED or INDEX, which of equal magnitudes stay.
    ``rescale``: restore the L1 norm from before. ``gamma``: of MAGNITUDE, the fraction that is
    larger than all that is kept, None for 0. ``epsilon``: of RANKED, by how much the chance lies
    under and over the density. ``factor``: on what is kept, where that follows from the density
    alone. ``every_tie``: of MAGNITUDE, entries as large as the smallest that is kept stay, too.
    """

    kind: int = ALL
    density: float = 1.0
    tie_rule: int = MIXED
    rescale: bool = False
    gamma: float | None = None
    epsilon: float = 0.0
    factor: float = 1.0
    every_tie: bool = False

    def of(self, shape: Sequence[int], key: int) -> Sparsify:
        """The request for one delta. ``shape``: of its tensor. ``key``: that it draws under.
        Returns a `Sparsify`.
        """
        count = math.prod(shape)
        if self.kind == MAGNITUDE:
            kept, skip = keep_count(self.density, count), 0
            if self.gamma is not None:
                kept, skip = band_counts(self.density, self.gamma, count)
            ties = EVERY if self.every_tie else self.tie_rule
            return Sparsify(MAGNITUDE, kept, ties, rescale=self.rescale, skip=skip)
        if self.kind == RANDOM or (self.kind == RANKED and not self.epsilon):
            below = keep_below(self.density)
            return Sparsify(RANDOM, keep_below=below, key=key, rescale=self.rescale)
        if self.kind == RANKED:
            # As mergekit 0.1.5 ranks: along the second axis, or all of a tensor that has none.
            return Sparsify(
                RANKED,
                keep_below=keep_below(self.density - self.epsilon),
                keep_below_top=keep_below(self.density + self.epsilon),
                key=key,
                rescale=self.rescale,
                length=shape[1] if len(shape) > 1 else count,
                stride=math.prod(shape[2:]),
            )
        return Sparsify(ALL)


@dataclass(frozen=True)
class Terms:
    """How a consensus method runs.

    ``keep``: what survives of each delta. ``weights``: one for each. ``agreement``: how one is made
    of several.
    """

    keep: tuple[Keep, ...]
    weights: tuple[float, ...]
    agreement: Agreement

    @property
    def is_counted(self) -> bool:
        """Whether ``select`` tells how many entries stay: not where ties may add some."""
        return not any(keep.every_tie for keep in self.keep)

    @property
    def is_settled(self) -> bool:
        """Whether what ``select`` answers stands as it is."""
        return all(keep.factor == 1 for keep in self.keep)

    def settled(self, selections: Sequence[Selection]) -> tuple[Selection, ...]:
        """What ``select`` answered, with the factors that follow from the densities.
        ``selections``: its answers, in order. Returns as many.
        """
        if self.is_settled:
            return tuple(selections)
        return tuple(
            own if keep.factor == 1 else own._replace(rescale=keep.factor)
            for keep, own in zip(self.keep, selections, strict=True)
        )


Spec = Callable[[Values, Sequence[Values]], Terms]  # (globals, per-operand values) -> Terms


class Spans(NamedTuple):
    """With ``parameter`` at ``value``, a model's tensors are trimmed as one: see
    `planning.spanning`. All tensors must then be ``alike`` in these parameters.
    """

    parameter: str
    value: Any
    alike: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.parameter}: {self.value}"


@dataclass(frozen=True, kw_only=True)
class Consensus(Method):
    """A merge of what survives of the operands' deltas."""

    spec: Spec
    spans: Spans | None = None

    @property
    def of_deltas(self) -> bool:
        return True

    def passes(self, values: Values, operands: Sequence[Values]) -> int:
        """How often the inputs are read, with these parameters and each operand's."""
        keep = self.spec(values, operands).keep
        first = any(k.kind in (MAGNITUDE, RANKED) or k.rescale for k in keep)
        # A trim that spans tensors: once to count the entries, once for those that tie.
        return 1 + first + (self.spanning(values, operands) is not None)

    def spanning(self, values: Values, operands: Sequence[Values]) -> Spans | None:
        """``spans`` where it is asked for and anything is trimmed, else None."""
        spans = self.spans
        if spans is None or values.get(spans.parameter) != spans.value:
            return None
        trims = any(keep.kind != ALL for keep in self.spec(values, operands).keep)
        return spans if trims else None


class Primitives(Protocol):
    """What a `Pointwise` method's formula is written in: a back end, whose tensors these are.

    ``gram``, ``select`` and ``divergences`` are those of ``_C.pyi``, shapes and types included, and
    ``expression`` its formula of that name with a program's operations. ``pointwise`` gives a
    tensor that is computed where it is read, in fp32, by one of the formulas that ``_C.pyi`` names;
    ``factors`` are one for each row. ``kind``: NumPy's type of its numbers, float32 or float64.
    """

    kind: Any

    def gram(self, inputs: Sequence[Any], base: Any = None) -> Float64: ...

    def select(
        self, inputs: Sequence[Any], base: Any, specs: Sequence[Sparsify]
    ) -> list[Selection]: ...

    def pointwise(
        self,
        formula: str,
        inputs: Sequence[Any],
        base: Any,
        numbers: Sequence[float] = (),
        *,
        selection: Selection | None = None,
        factors: Float64 | None = None,
    ) -> Any: ...

    def divergences(self, x: Any, base: Any, cols: int) -> Float64: ...

    def expression(self, program: Program, inputs: Sequence[Any], base: Any) -> Any: ...


class Given(NamedTuple):
    """What a formula is of: a back end's tensors, of one shape, and the parameters."""

    base: Any
    tensors: Sequence[Any]
    values: Values
    operands: Sequence[Values]  # of each tensor
    shape: Sequence[int]


Formula = Callable[[Primitives, Given], Any]  # -> the merged tensor


def per_model(method: Method, values: Values, operands: Sequence[Values]) -> dict[str, Any]:
    """The parameters by name, one that each model has as a tuple."""
    given = dict(values)
    for parameter in method.parameters:
        if parameter.per_model:
            given[parameter.name] = tuple(own[parameter.name] for own in operands)
    return given


def called(name: str, function: Callable[[], R]) -> R:
    """What foreign code of the method ``name`` returns; raises FastmergeError where it fails."""
    try:
        return function()
    except FastmergeError:
        raise
    except FOREIGN as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FastmergeError(f"method {name} failed: {said}") from error


@dataclass(frozen=True, kw_only=True)
class Pointwise(Method):
    """Entry by entry, by a formula of kernels, from numbers that passes before it found. ``gain``:
    the parameter that leaves the base as it is where it is 0.
    """

    formula: Formula
    passes: Callable[[Values], int] = lambda values: 1  # how often the inputs are read
    of_deltas: bool = False
    beside: int = 0
    gain: str | None = None

    def asked(
        self, values: Values, operands: Sequence[Values]
    ) -> tuple[str, tuple[float, ...]] | None:
        """The kernels' formula and its numbers, where they follow from the parameters alone: no
        pass over the weights comes before.
        """
        if self.passes(values) != 1:
            return None
        given = Given(None, [None] * len(operands), values, operands, ())
        formula, numbers = self.formula(cast(Primitives, _Asked()), given)
        return formula, tuple(float(number) for number in numbers)


class _Asked:
    """`Primitives` that note what is asked of them, for a formula that asks once."""

    @staticmethod
    def pointwise(
        formula: str, _inputs: Any, _base: Any, numbers: Sequence[float]
    ) -> tuple[str, Sequence[float]]:
        return formula, numbers


@dataclass(frozen=True, kw_only=True)
class Elementwise(Method):
    """Entry by entry, by a Python function of symbols: see `fastmerge.methods.entries`.

    ``function(base, entries, values)``: as a `Function`'s, but of an `Entry` for each model and for
    the base, and it returns one. Called once for each set of values; the kernels do the rest.
    """

    on_gpu: ClassVar[bool] = False

    function: Callable[[Entry | None, Sequence[Entry], Values], Any]

    def program(self, values: Values, operands: Sequence[Values], has_base: bool) -> Program:
        """Raises FastmergeError where the function fails or returns no entry."""
        each, base = inputs(len(operands))
        given = per_model(self, values, operands)
        return called(
            self.name,
            lambda: compiled(self.function(base if has_base else None, each, given), len(each)),
        )

    def meaning(self, values: Values, operands: Sequence[Values], has_base: bool) -> str:
        return f"{self.identity} {self.program(values, operands, has_base)}"


@dataclass(frozen=True, kw_only=True)
class Function(Method):
    """A Python function of whole tensors: the fallback for what no kernel does.

    ``function(base, tensors, values)`` gets the operands as read-only float32 NumPy arrays of the
    tensor's shape (base None without one) and the parameters by name, a per-model one as a tuple
    parallel to ``tensors``; for a random method also ``rng``, a NumPy generator that follows from
    the recipe's seed and the tensor. It returns an array of that shape, which is rounded to float32
    and then to the output's type. In a merge in float64 all of that is float64. Several tensors are
    merged at a time, each in a thread; what the function allocates is beyond ``memory_limit``.
    """

    function: Callable[[NDArray[Any] | None, Sequence[NDArray[Any]], Values], Any]

    def of(
        self,
        base: NDArray[Any] | None,
        tensors: Sequence[NDArray[Any]],
        values: Values,
        operands: Sequence[Values],
        key: int,
    ) -> NDArray[Any]:
        """The result, contiguous; raises FastmergeError where the function fails or returns
        anything else. ``key``: what it draws under.
        """
        given = per_model(self, values, operands)
        if self.random:
            given["rng"] = np.random.default_rng(key)
        made = called(self.name, lambda: np.asarray(self.function(base, tensors, given)))
        if made.shape != tensors[0].shape or made.dtype.kind not in "fiub":
            raise FastmergeError(
                f"method {self.name} returned {made.dtype} {list(made.shape)} for tensors of "
                f"{list(tensors[0].shape)}; return real numbers in that shape"
            )
        return np.ascontiguousarray(made, dtype=tensors[0].dtype).reshape(made.shape)
