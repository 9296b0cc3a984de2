"""Computes one tensor's merge tree on a back end: the primitives in order.

The engine, the in-memory API and the GPU pipeline come through here, so a method means the same
everywhere. What does it again for speed is tested to give the same bits: `compute.batch`, for many
tensors to a launch, and `compute.programs`, for small tensors in C++ alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Generic, NamedTuple, cast

import numpy as np

from fastmerge.compute.backend import Backend, O, T
from fastmerge.errors import FastmergeError, UnsupportedError
from fastmerge.methods import Combination, Consensus, Elementwise, Function, Pointwise
from fastmerge.methods.shapes import Given, Primitives, Spans, Terms
from fastmerge.methods.types import Float64
from fastmerge.once import cached_property
from fastmerge.primitives import Vectors
from fastmerge.records import record
from fastmerge.selection import Selection, Sparsify, random_key
from fastmerge.tree.collapse import Collapsed, apply_rule, coefficients, collapse
from fastmerge.tree.nodes import Leaf, Merge, Node, Rows, Stored

_ONE = np.ones(1)
_LARGE = 16.0  # of fp32's 24 bits, four would go
_FP32 = 2.0**-24


_vectors = lru_cache(maxsize=64)(Vectors.of)


class Trim(NamedTuple):
    """What survives of one tensor's deltas, whose first entry has the flat index ``origin``."""

    selections: tuple[Selection, ...]
    origin: int


@record()
class Outcome:
    """What one tensor's merge came to."""

    nonfinite: int = 0  # NaN or Inf among the outputs
    coefficients: Mapping[Stored, float] | None = None  # effective, when one per tensor
    kept: tuple[int, ...] | None = None  # entries kept of each delta, for a consensus
    gram: Float64 | None = None  # the inner products that the coefficients followed from
    # Of numbers rounded to codes: the sums of (code * scale - x)^2 and of x^2.
    rounding: tuple[float, float] | None = None


_UNSAID = Outcome()  # 1 us of a call of `fastmerge.ops`, which does not ask


def gram_of(
    backend: Backend[T, Any], tree: Collapsed, tensors: Sequence[T], shape: Sequence[int]
) -> Float64:
    """What `tree.collapse.coefficients` takes for ``tree``: the inner products of the ``tensors``,
    which are its parts', of this shape; float64 (n, n), or with an axis (vectors, n, n).
    """
    vectors = _vectors(tuple(shape), tree.axis)
    r = tree.reference
    if r is None:
        return backend.gram(tensors, None, vectors)
    others = [tensor for i, tensor in enumerate(tensors) if i != r]
    return backend.gram(others, tensors[r], vectors)


def factors_of(tree: Collapsed, gram: Float64 | None) -> tuple[Float64, float | None]:
    """The coefficients of the parts and the divisor, float64; of many trees of one form at once
    where ``gram`` is (trees, n, n).
    """
    if gram is None and tree.parts == tree.root.inputs:
        # One linear merge keeps mergekit's order: accumulate the raw weights, divide once at the
        # end.
        rule = apply_rule(tree.root, None)
        return rule.coefficients, rule.divisor
    return coefficients(tree, gram), None


def named(error: FastmergeError, name: str) -> FastmergeError:
    """An error of the tensor ``name``."""
    return type(error)(f"{name}: {error}" if name else str(error))


def is_wide(tree: Collapsed, factors: Float64, to_fp32: bool) -> bool:
    """Whether the parts are summed in float64. Where no Gram matrix was read mergekit's order and
    bits are kept; elsewhere fp32's rounding must not show: not in an output of fp32, where it moves
    a quarter of all entries, nor where the sum may cancel. It does for two models that count the
    same, where their entries are opposite, and for large coefficients: multislerp gives a delta of
    a thousandth of the others' length a thousandfold weight, which the base's takes back.
    """
    if factors.ndim == 1:
        return sums_wide(tree, factors.tolist(), to_fp32)
    if not tree.is_measured or len(tree.parts) == 1 or to_fp32:
        return tree.is_measured and len(tree.parts) > 1
    first, last = factors[..., 0], factors[..., -1]
    alike = len(tree.parts) == 2 and bool(np.any(abs(first - last) <= _FP32 * abs(first)))
    return alike or bool(np.abs(factors).max(initial=0.0) > _LARGE)


def sums_wide(tree: Collapsed, numbers: Sequence[float], to_fp32: bool) -> bool:
    """`is_wide` of one tensor's coefficients: NumPy's functions take 6 us of a call."""
    if not tree.is_measured or len(numbers) == 1:
        return False
    alike = len(numbers) == 2 and abs(numbers[0] - numbers[1]) <= _FP32 * abs(numbers[0])
    return to_fp32 or alike or max(map(abs, numbers)) > _LARGE


def effective(
    tree: Collapsed, factors: Float64, divisor: float | None
) -> Mapping[Stored, float] | None:
    """What each source counts for in the end, where that is one number per tensor."""
    if factors.ndim > 1 or not tree.is_complete:
        return None
    values: list[float] = (factors if divisor is None else factors / divisor).tolist()
    found: dict[Stored, float] = {}
    for part, value in zip(tree.parts, values, strict=True):
        own = part.own if isinstance(part, Leaf) else None
        if own is not None:
            found[own] = found.get(own, 0.0) + value
    return found


def consensus_terms(root: Merge) -> Terms:
    """What a consensus asks of `select` and `consensus`, whatever the tensor's size."""
    if not isinstance(root.method, Consensus) or root.base is None:
        raise ValueError(f"{root.method.name}: a consensus has a spec and a base")
    return root.method.spec(root.values, root.operand_values)


def key_of(root: Merge, name: str, operand: int) -> int:
    """What an operand of a merge draws under for the tensor ``name``."""
    return random_key(root.seed or 0, root.name or name, operand)


def requests(root: Merge, terms: Terms, name: str, shape: Sequence[int]) -> list[Sparsify]:
    """What shall survive of each delta of the tensor ``name`` of this shape."""
    return [
        keep.of(shape, key_of(root, name, i))
        for i, keep in zip(root.numbers or range(len(terms.keep)), terms.keep, strict=True)
    ]


@record(eq=False)
class Step:
    """A merge to be computed, and the tensors it reads: of a combination what it collapses to.

    What follows from its parameters alone is worked out once: calls of `fastmerge.ops` keep it.
    """

    node: Merge
    tree: Collapsed | None
    parts: Sequence[Node]

    @cached_property
    def fixed(self) -> tuple[Float64, float | None] | None:
        """The factors of a combination that asks for no inner products."""
        if self.tree is None or self.tree.needs_gram:
            return None
        return factors_of(self.tree, None)

    @cached_property
    def terms(self) -> Terms:
        """Of a consensus."""
        return consensus_terms(self.node)

    @cached_property
    def spans(self) -> Spans | None:
        """Why a consensus cannot be computed tensor by tensor."""
        assert isinstance(self.node.method, Consensus)
        return self.node.method.spanning(self.node.values, self.node.operand_values)

    @cached_property
    def asked(self) -> dict[tuple[str, tuple[int, ...]], list[Sparsify]]:
        """The last `requests`, by the tensor's name and shape."""
        return {}

    def requests(self, name: str, shape: tuple[int, ...]) -> list[Sparsify]:
        """What shall survive of each delta of a consensus."""
        found = self.asked.get((name, shape))
        if found is None:
            found = requests(self.node, self.terms, name, shape)
            self.asked.clear()
            self.asked[name, shape] = found
        return found

    @property
    def taken(self) -> Sequence[Node]:
        """The parts that one kernel takes at once, a base apart; a function's go one by one."""
        if isinstance(self.node.method, Function):
            return self.parts[:1]
        return self.node.operands if self.tree is None else self.parts


def steps(root: Merge) -> list[Step]:
    """The merges that are computed for ``root``, each after those it reads."""
    if root.is_flat:
        return [_step(root)]
    made: dict[Node, Step] = {}
    order: list[Step] = []
    stack: list[tuple[Merge, bool]] = [(root, False)]
    while stack:  # not recursive: a chain of a thousand documents is a thousand deep
        node, ready = stack.pop()
        if ready:
            order.append(made[node])
        elif node not in made:
            made[node] = _step(node)
            stack.append((node, True))
            stack.extend((part, False) for part in made[node].parts if isinstance(part, Merge))
    return order


def _step(node: Merge) -> Step:
    tree = collapse(node) if isinstance(node.method, Combination) else None
    return Step(node, tree, node.inputs if tree is None else tree.parts)


class Computation(Generic[T, O]):
    """One tensor: ``fetch`` gives a source's weights, results go to ``out``."""

    def __init__(
        self,
        backend: Backend[T, O],
        fetch: Callable[[Any], T],  # of a leaf
        name: str,
        shape: Sequence[int],
        trims: Mapping[Node, Trim] | None = None,
        gather: Callable[[Rows, Mapping[Node, T]], T] | None = None,
        *,
        reported: bool = True,
    ) -> None:
        """``trims``: those that span all tensors, by their merge. ``gather``: the rows of a leaf
        that is made from merges, of all its sources' tensors; without it there must be none.
        ``reported``: whether the outcome shall say anything.
        """
        self._backend = backend
        self._gather = gather
        self._trims = trims or {}
        self._reported = reported
        self._fetch = fetch
        self._name = name
        self._shape = tuple(shape)
        self._made: dict[Node, T] = {}  # intermediate results that a later step reads

    def run(self, root: Node, out: O) -> Outcome:
        """Writes the tree's value to ``out`` with one rounding."""
        if not isinstance(root, Merge):
            return self._pass(self._tensor(root), out)
        return self.take(steps(root), out)

    def take(self, order: Sequence[Step], out: O) -> Outcome:
        """`run` of the tree that these are the steps of."""
        if len(order) == 1:
            return self._take(order[0], out)
        *intermediates, last = order
        if intermediates:
            uses = Counter(part for step in (*intermediates, last) for part in set(step.parts))
            for step in intermediates:
                self._made[step.node], to = self._backend.scratch(math.prod(self._shape))
                self._take(step, to)
                self._let_go(step.parts, uses)
        return self._take(last, out)

    def _let_go(self, parts: Sequence[Node], uses: Counter[Node]) -> None:
        """Frees the intermediates that no later step reads."""
        for part in set(parts):
            uses[part] -= 1
            if not uses[part]:
                self._made.pop(part, None)

    def _take(self, step: Step, out: O) -> Outcome:
        if step.tree is not None:
            return self._combination(step, step.tree, out)
        if isinstance(step.node.method, Function):
            return self._function(step.node, step.node.method, out)
        if isinstance(step.node.method, Pointwise):
            return self._pointwise(step.node, step.node.method, out)
        if isinstance(step.node.method, Elementwise):
            return self._elementwise(step.node, step.node.method, out)
        return self._consensus(step, out)

    def _tensor(self, node: Node) -> T:
        if type(node) is Stored:
            return self._fetch(node)
        made = self._made.get(node)
        if made is None:
            assert isinstance(node, Leaf)  # merges are made before what reads them
            made = self._made[node] = self._leaf(node)
        return made

    def _leaf(self, leaf: Leaf) -> T:
        if not (isinstance(leaf, Rows) and leaf.inputs):
            return self._fetch(leaf)
        assert self._gather is not None  # engine.executor computes such trees on the host
        sources: dict[Node, T] = {}
        for source, height in zip(leaf.sources, leaf.heights, strict=True):
            if isinstance(source, Merge):
                # Of other rows than the output's, so a computation of its own.
                shape = (height, *leaf.shape[1:])
                sources[source], to = self._backend.scratch(math.prod(shape))
                name = source.name or self._name
                inner = Computation(
                    self._backend, self._fetch, name, shape, self._trims, self._gather
                )
                inner.run(source, to)
            else:
                assert isinstance(source, Leaf)
                sources[source] = self._fetch(source)
        return self._gather(leaf, sources)

    def _combination(self, step: Step, tree: Collapsed, out: O) -> Outcome:
        tensors = [self._tensor(part) for part in tree.parts]
        gram = gram_of(self._backend, tree, tensors, self._shape) if tree.needs_gram else None
        try:
            factors, divisor = step.fixed or factors_of(tree, gram)
        except FastmergeError as error:
            raise named(error, self._name) from None
        vectors = _vectors(self._shape, tree.axis if factors.ndim > 1 else None)
        wide = is_wide(tree, factors, self._backend.is_fp32(out))
        bad = self._backend.combine(
            tensors, factors, out, divisor=divisor, vectors=vectors, wide=wide
        )
        if not self._reported:
            return _UNSAID
        return Outcome(bad, coefficients=effective(tree, factors, divisor), gram=gram)

    def _pass(self, tensor: T, out: O) -> Outcome:
        """The tensor as it is, rounded."""
        vectors = _vectors(self._shape, None)
        return Outcome(self._backend.combine([tensor], _ONE, out, vectors=vectors))

    def _consensus(self, step: Step, out: O) -> Outcome:
        root, terms = step.node, step.terms
        assert root.base is not None
        base = self._tensor(root.base)
        tensors = [self._tensor(node) for node in root.operands]
        trim = self._trims.get(root)
        if trim is None:
            if step.spans is not None:
                raise UnsupportedError(
                    f"{self._name}: {step.spans} needs every tensor of the models; merge to a "
                    "folder, or on the CPU"
                )
            wanted = step.requests(self._name, self._shape)
            trim = Trim(terms.settled(self._backend.select(tensors, base, wanted)), 0)
        used = [i for i, weight in enumerate(terms.weights) if weight]  # 0 NaN would be NaN
        if not used:
            return self._pass(base, out)
        agreement = terms.agreement
        if trim.origin != agreement.origin:
            agreement = replace(agreement, origin=trim.origin)
        nonfinite = self._backend.consensus(
            [tensors[i] for i in used], base, [terms.weights[i] for i in used],
            [trim.selections[i] for i in used], out, agreement,
        )  # fmt: skip
        if not self._reported:
            return _UNSAID
        # How many of them are this tensor's is not known where the trim spans others.
        known = terms.is_counted and root not in self._trims
        kept = tuple(s.kept for s in trim.selections) if known else None
        return Outcome(nonfinite, kept=kept)

    def _pointwise(self, root: Merge, method: Pointwise, out: O) -> Outcome:
        assert root.base is not None
        base, tensors = self._tensor(root.base), [self._tensor(node) for node in root.operands]
        self._refuse_untaken(root)
        given = Given(base, tensors, root.values, root.operand_values, self._shape)
        made = method.formula(cast(Primitives, self._backend), given)
        return self._pass(made, out)

    def _elementwise(self, root: Merge, method: Elementwise, out: O) -> Outcome:
        base = None if root.base is None else self._tensor(root.base)
        tensors = [self._tensor(node) for node in root.operands]
        self._refuse_untaken(root)
        program = method.program(root.values, root.operand_values, base is not None)
        made = cast(Primitives, self._backend).expression(program, tensors, base)
        return self._pass(made, out)

    def _refuse_untaken(self, root: Merge) -> None:
        refusal = self._backend.takes(root, root.operands)
        if refusal:
            raise UnsupportedError(f"{self._name or root.method.name} {refusal}; use the CPU")

    def _function(self, root: Merge, method: Function, out: O) -> Outcome:
        inputs = [self._backend.array(self._tensor(node)) for node in root.inputs]
        arrays = [array.reshape(self._shape) for array in inputs]
        base = None if root.base is None else arrays.pop(0)
        key = key_of(root, self._name, 0)
        try:
            made = method.of(base, arrays, root.values, root.operand_values, key)
        except FastmergeError as error:
            raise named(error, self._name) from error
        return self._pass(self._backend.tensor(made), out)
