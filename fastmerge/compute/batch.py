"""Whole models merged in a GPU's memory: the same trees as `compute.Computation`, many tensors to
a launch.

A walk or a sweep re-merges the same sources again and again. What does not change (checks, tables
of addresses, collapsed trees) is made once; a run is then one Gram pass and one combine pass, or
one selection and one consensus, over all tensors, and the host waits for the device only where a
number must come back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastmerge.compute.tensor import (
    Computation,
    Outcome,
    cancels,
    consensus_terms,
    effective,
    factors_of,
    requests,
)
from fastmerge.errors import FastmergeError, UnsupportedError
from fastmerge.methods import Combination, Consensus, find
from fastmerge.methods.types import Float64
from fastmerge.tree.collapse import Collapsed, collapse
from fastmerge.tree.nodes import Merge, Node, Stored, leaves, walk
from fastmerge.tree.unread import without_unread

if TYPE_CHECKING:
    from torch import Tensor

    from fastmerge.kernels.consensus import ConsensusBatch
    from fastmerge.kernels.select import SelectBatch
    from fastmerge.methods.shapes import Terms
    from fastmerge.selection import Sparsify


class Job(NamedTuple):
    """One tensor to compute: its name in the result, its tree, and where it goes."""

    name: str
    root: Node
    out: Tensor


@dataclass
class _Combinations:
    """Jobs whose trees are combinations of sources with one coefficient per tensor, of one form."""

    trees: list[Collapsed]
    places: list[int]

    @property
    def needs_gram(self) -> bool:
        return self.trees[0].needs_gram


@dataclass
class _Consensuses:
    """Jobs that are a consensus of sources, alike in how they elect and normalise."""

    places: Sequence[int]
    terms: Sequence[Terms]
    requests: Sequence[Sequence[Sparsify]]
    select: SelectBatch
    consensus: ConsensusBatch


class Batch:
    """Merges prepared for sources that lie on one device. ``fetch`` gives a source's tensor."""

    def __init__(self, jobs: Sequence[Job], fetch: Callable[[Stored], Tensor]) -> None:
        """Raises FastmergeError where a job's tensors do not fit together, naming it."""
        from fastmerge.kernels.backend import TritonBackend

        self._jobs, self._fetch = jobs, fetch
        if not jobs:
            raise FastmergeError("no tensors to merge")
        self._backend = TritonBackend(jobs[0].out.device)
        self._forms: dict[Any, _Combinations] = {}
        self._sparse: dict[tuple[bool, bool], list[tuple[int, Merge, Terms]]] = {}
        self._others: list[int] = []
        for place, job in enumerate(jobs):
            self._sort(place, job)
        try:
            self._consensus = [self._prepared(*form) for form in self._sparse.items()]
            self._prepare_combinations()
        except FastmergeError as error:
            raise self._named(error) from error

    def _prepare_combinations(self) -> None:
        from fastmerge.kernels.combine import CombineBatch
        from fastmerge.kernels.gram import GramBatch

        rows: list[list[Tensor]] = []
        outs: list[Tensor] = []
        grams: list[list[Tensor]] = []
        bases: list[Tensor | None] = []
        for form in self._forms.values():
            for place, tree in zip(form.places, form.trees, strict=True):
                tensors = [self._tensor(part) for part in tree.parts]
                rows.append(tensors)
                outs.append(self._jobs[place].out)
                if tree.needs_gram:
                    r = tree.reference
                    grams.append([x for i, x in enumerate(tensors) if i != r])
                    bases.append(None if r is None else tensors[r])
        self._grams = GramBatch(grams, bases)
        self._combine = CombineBatch(rows, outs)

    def _named(self, error: FastmergeError) -> FastmergeError:
        """The error of the first job whose tensors do not fit, by its name."""
        from fastmerge.kernels.common import check

        for name, root, out in self._jobs:
            try:
                check([self._fetch(source) for source in leaves([root])], None, out)
            except FastmergeError as own:
                return type(own)(f"{name}: {own}")
        return error

    def _sort(self, place: int, job: Job) -> None:
        root = without_unread(job.root)
        if not isinstance(root, Merge):
            root = Merge(find("passthrough"), (root,), None, {}, ({},))
        if isinstance(root.method, Combination):
            tree = collapse(root)
            if tree.axis is not None or not tree.is_complete:
                self._others.append(place)
                return
            form = self._forms.setdefault(_form(tree), _Combinations([], []))
            form.trees.append(tree)
            form.places.append(place)
        elif isinstance(root.method, Consensus) and all(
            isinstance(node, Stored) for node in root.inputs
        ):
            spans = root.method.spanning(root.values, root.operand_values)
            if spans is not None:
                raise UnsupportedError(
                    f"{job.name}: {spans} is not for models on a GPU; merge to a folder, or "
                    "into a model on the CPU"
                )
            terms = consensus_terms(root)
            alike = self._sparse.setdefault((terms.agreement.elect, terms.agreement.normalize), [])
            alike.append((place, root, terms))
        else:
            self._others.append(place)

    def _prepared(
        self, form: tuple[bool, bool], chosen: Sequence[tuple[int, Merge, Terms]]
    ) -> _Consensuses:
        from fastmerge.kernels.consensus import ConsensusBatch
        from fastmerge.kernels.select import SelectBatch

        places, roots, terms = zip(*chosen, strict=True)
        inputs = [[self._tensor(node) for node in root.operands] for root in roots]
        bases = [self._tensor(root.base) for root in roots]
        outs = [self._jobs[place].out for place in places]
        elect, normalize = form
        merged = ConsensusBatch(inputs, bases, outs, elect=elect, normalize=normalize)
        jobs = [self._jobs[place] for place in places]
        wanted = [
            requests(root, own, job.name, math.prod(job.out.shape))
            for root, own, job in zip(roots, terms, jobs, strict=True)
        ]
        return _Consensuses(places, terms, wanted, SelectBatch(inputs, bases), merged)

    def run(self) -> list[Outcome]:
        """Computes every job into its ``out``; waits until the results are there."""
        outcomes = [Outcome()] * len(self._jobs)
        self._run_combinations(outcomes)
        self._run_consensuses(outcomes)
        for place in self._others:
            outcomes[place] = self._alone(place)
        return outcomes

    def _alone(self, place: int) -> Outcome:
        name, root, out = self._jobs[place]
        return Computation(self._backend, self._fetch, name, tuple(out.shape)).run(root, out)

    def combine(self, coefficients: Sequence[Float64]) -> list[int]:
        """out = sum_i c_i x_i for every job with the caller's coefficients, over the sources of its
        tree in order of first use; returns the NaN/Inf counts. All jobs must be combinations.
        """
        if self._consensus or self._others or len(coefficients) != len(self._jobs):
            raise FastmergeError("coefficients: one array for each job, and only combinations")
        places = [place for form in self._forms.values() for place in form.places]
        counts = self._combine.run([coefficients[place] for place in places]).tolist()
        return [count for _, count in sorted(zip(places, counts, strict=True))]

    def _run_combinations(self, outcomes: list[Outcome]) -> None:
        grams = iter(self._grams.run())
        factors: list[Float64] = []
        divisors: list[float | None] = []
        for form in self._forms.values():
            values, divisor = _factors(form, [next(grams) for _ in form.trees if form.needs_gram])
            factors += values
            divisors += [divisor] * len(form.trees)
        counts = self._combine.run(factors, divisors)
        forms = self._forms.values()
        trees = [tree for form in forms for tree in form.trees]
        places = [place for form in forms for place in form.places]
        # While the device works.
        chosen = [effective(*given) for given in zip(trees, factors, divisors, strict=True)]
        for place, own, bad in zip(places, chosen, counts.tolist(), strict=True):
            outcomes[place] = Outcome(bad, coefficients=own)
        for place, tree, own_factors in zip(places, trees, factors, strict=True):
            if cancels(tree, own_factors):
                outcomes[place] = self._alone(place)

    def _run_consensuses(self, outcomes: list[Outcome]) -> None:
        for group in self._consensus:
            selections = group.select.run(group.requests)
            weights = [terms.weights for terms in group.terms]
            scales = [terms.agreement.scale for terms in group.terms]
            counts = group.consensus.run(weights, selections, scales).tolist()
            for place, chosen, bad in zip(group.places, selections, counts, strict=True):
                outcomes[place] = Outcome(bad, kept=tuple(s.kept for s in chosen))

    def _tensor(self, node: Node | None) -> Tensor:
        assert isinstance(node, Stored)
        return self._fetch(node)


def _factors(form: _Combinations, grams: list[Float64]) -> tuple[list[Float64], float | None]:
    """The coefficients of each tree of one form, and their divisor."""
    first = form.trees[0]
    values, divisor = factors_of(first, np.stack(grams) if grams else None)
    return list(np.broadcast_to(values, (len(form.trees), len(first.parts)))), divisor


def _form(tree: Collapsed) -> Any:
    """Equal for trees that differ in their sources only, whose coefficients one call then gives."""
    numbers: dict[Node, int] = {part: i for i, part in enumerate(tree.parts)}
    lines: list[Any] = [tree.reference]
    for node in walk(tree.root, stop=numbers):
        if isinstance(node, Merge) and node not in numbers:
            numbers[node] = len(numbers)
            lines.append(
                (
                    node.method.name,
                    node.base is not None,
                    tuple(numbers[child] for child in node.inputs),
                    _frozen(node.values),
                    tuple(_frozen(values) for values in node.operand_values),
                )
            )
    return tuple(lines)


def _frozen(values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(values.items()))
