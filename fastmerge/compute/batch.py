"""Whole models merged in a GPU's memory: the same trees as `compute.Computation`, many tensors to
a launch.

A walk or a sweep re-merges the same sources again and again, with other coefficients or values.
What does not change (checks, tables of addresses) is made once for a tree's form: what it reads and
in which order, and by which kernels. A run is then one Gram pass and one combine pass, or one
selection and one consensus, over all tensors, and the host waits for the device only where a number
must come back. Inputs with coefficient 0 are not read: each pattern of them has a table of its own,
made when it is first met. Adapted weights and codes are made numbers on the device for each run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastmerge.compute.on_device import OnDevice
from fastmerge.compute.tensor import (
    Computation,
    Outcome,
    consensus_terms,
    effective,
    factors_of,
    is_wide,
    requests,
)
from fastmerge.errors import FastmergeError, UnsupportedError
from fastmerge.methods import Combination, Consensus, Pointwise, find
from fastmerge.methods.types import Float64
from fastmerge.tree.collapse import Collapsed, collapse
from fastmerge.tree.nodes import Leaf, Merge, Node, Stored, walk
from fastmerge.tree.unread import without_unread

if TYPE_CHECKING:
    from torch import Tensor

    from fastmerge.kernels.consensus import ConsensusBatch
    from fastmerge.kernels.pointwise import PointwiseBatch
    from fastmerge.kernels.select import SelectBatch


class Job(NamedTuple):
    """One tensor to compute: its name in the result, its tree, and where it goes."""

    name: str
    root: Node
    out: Tensor


class Form(NamedTuple):
    """What of a tree decides how its merge is prepared: everything but its values."""

    kind: tuple[Any, ...]  # which kernels run, with what of their arguments is compiled in
    sources: tuple[Leaf, ...]  # in the order of their coefficients

    def holds(self, other: Form) -> bool:
        """Whether what is prepared for this form runs the other, too: the same one, or coefficients
        that need no weights, of some of a combination's sources in their order; the others' are 0.
        """
        if other.kind != _GIVEN or self.kind[0] not in ("given", "measured"):
            return self == other
        rest = iter(self.sources)
        return all(source in rest for source in other.sources)


_GIVEN, _ALONE = ("given",), ("alone",)


@dataclass(frozen=True)
class _Work:
    """One job's tree, with what follows from its values alone."""

    root: Merge
    form: Form
    tree: Collapsed | None = None  # of a combination of sources, one coefficient per tensor
    factors: tuple[Float64, float | None] | None = None  # and divisor, where no Gram matrix is read
    alike: Any = None  # where one is: equal for trees whose coefficients one call gives
    numbers: tuple[float, ...] = ()  # of a formula


class _Consensuses(NamedTuple):
    """Jobs that are a consensus of sources, alike in how they elect and normalise."""

    places: Sequence[int]
    select: SelectBatch
    merge: ConsensusBatch


class Batch:
    """Merges prepared for sources that lie on one device. ``fetch`` gives a source's tensor;
    ``scratch`` memory that other batches may use between two runs (see `OnDevice`).
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        fetch: Callable[[Stored], Tensor],
        scratch: Tensor | None = None,
    ) -> None:
        """Raises FastmergeError where a job's tensors do not fit together, naming it."""
        from fastmerge.kernels.backend import TritonBackend

        self._jobs = jobs
        if not jobs:
            raise FastmergeError("no tensors to merge")
        self._backend = TritonBackend(jobs[0].out.device)
        self._works = [_work(job.name, job.root) for job in jobs]
        self._forms = [work.form for work in self._works]
        self._leaves = OnDevice(_sources(self._works), fetch, self._backend, scratch)
        self._sums = [i for i, work in enumerate(self._works) if work.tree is not None]
        self._measured = [i for i in self._sums if self._forms[i].kind != _GIVEN]
        try:
            self._prepare_combinations()
            self._consensus = self._prepare_consensuses()
            self._pointwise = self._prepare_pointwise()
        except FastmergeError as error:
            raise self._named(error) from error

    def _tensors(self, place: int) -> list[Tensor]:
        return [self._leaves[source] for source in self._forms[place].sources]

    def _prepare_combinations(self) -> None:
        from fastmerge.kernels.combine import CombineBatch
        from fastmerge.kernels.gram import GramBatch

        rows = {i: self._tensors(i) for i in self._sums}
        grams: list[list[Tensor]] = []
        bases: list[Tensor | None] = []
        for i in self._measured:
            _, r = self._forms[i].kind
            grams.append([x for j, x in enumerate(rows[i]) if j != r])
            bases.append(None if r is None else rows[i][r])
        self._grams = GramBatch(grams, bases)
        self._combine = CombineBatch(list(rows.values()), [self._jobs[i].out for i in rows])

    def _prepare_consensuses(self) -> list[_Consensuses]:
        from fastmerge.kernels.consensus import ConsensusBatch
        from fastmerge.kernels.select import SelectBatch

        alike: dict[tuple[Any, ...], list[int]] = {}
        for i, form in enumerate(self._forms):
            if form.kind[0] == "consensus":
                alike.setdefault(form.kind[1:], []).append(i)
        made = []
        for (elect, normalize, votes, counted), places in alike.items():
            rows = [self._tensors(i) for i in places]
            inputs, bases = [row[1:] for row in rows], [row[0] for row in rows]
            outs = [self._jobs[i].out for i in places]
            merge = ConsensusBatch(
                inputs, bases, outs,
                elect=elect, normalize=normalize, votes=votes, counted=counted,
            )  # fmt: skip
            made.append(_Consensuses(places, SelectBatch(inputs, bases), merge))
        return made

    def _prepare_pointwise(self) -> list[tuple[list[int], PointwiseBatch]]:
        """The places of the jobs of each formula, and their merge."""
        from fastmerge.kernels.pointwise import PointwiseBatch

        alike: dict[str, list[int]] = {}
        for i, form in enumerate(self._forms):
            if form.kind[0] == "pointwise":
                alike.setdefault(form.kind[1], []).append(i)
        made = []
        for formula, places in alike.items():
            rows = [self._tensors(i) for i in places]
            outs = [self._jobs[i].out for i in places]
            inputs, bases = [row[1:] for row in rows], [row[0] for row in rows]
            made.append((places, PointwiseBatch(formula, inputs, bases, outs)))
        return made

    def _named(self, error: FastmergeError) -> FastmergeError:
        """The error of the first job whose tensors do not fit, by its name."""
        from fastmerge.kernels.common import check

        for place, (name, _, out) in enumerate(self._jobs):
            try:
                check(self._tensors(place), None, out)
            except FastmergeError as own:
                return type(own)(f"{name}: {own}")
        return error

    def adopt(self, roots: Sequence[Node]) -> bool:
        """Takes other trees, parallel to the jobs, for the next runs: other coefficients or values.

        False, and nothing changes, where one is of another form than its job was prepared for.
        """
        works = [_work(job.name, root) for job, root in zip(self._jobs, roots, strict=True)]
        fits = all(f.holds(work.form) for f, work in zip(self._forms, works, strict=True))
        if fits:
            self._works = works
        return fits

    def run(self) -> list[Outcome]:
        """Computes every job into its ``out``; waits until the results are there."""
        self._leaves.make(_sources(self._works))
        outcomes = [Outcome()] * len(self._jobs)
        self._run_combinations(outcomes)
        self._run_consensuses(outcomes)
        self._run_pointwise(outcomes)
        for place, form in enumerate(self._forms):
            if form.kind == _ALONE:
                outcomes[place] = self._alone(place)
        return outcomes

    def _alone(self, place: int) -> Outcome:
        name, _, out = self._jobs[place]
        computation = Computation(self._backend, self._leaves.__getitem__, name, tuple(out.shape))
        return computation.run(self._works[place].root, out)

    def _run_combinations(self, outcomes: list[Outcome]) -> None:
        grams = dict(zip(self._measured, self._grams.run(), strict=True))
        found = self._measured_factors(grams)
        rows: list[Float64] = []
        divisors: list[float | None] = []
        trees: list[Collapsed] = []
        wide: list[bool] = []
        for place in self._sums:
            work, sources = self._works[place], self._forms[place].sources
            factors, divisor = found[place] = work.factors or found[place]
            assert work.tree is not None
            trees.append(work.tree)
            wide.append(is_wide(work.tree, factors, self._backend.is_fp32(self._jobs[place].out)))
            same = sources == work.form.sources
            rows.append(factors if same else _spread(factors, work.form.sources, sources))
            divisors.append(divisor)
        counts = self._combine.run(rows, divisors, wide)
        named = [effective(tree, *found[i]) for i, tree in zip(self._sums, trees, strict=True)]
        # Until here the host did not wait.
        for place, own, bad in zip(self._sums, named, counts.tolist(), strict=True):
            outcomes[place] = Outcome(bad, coefficients=own)

    def _measured_factors(
        self, grams: Mapping[int, Float64]
    ) -> dict[int, tuple[Float64, float | None]]:
        """The coefficients and divisor of every job whose tree now reads its Gram matrix."""
        groups: dict[Any, list[int]] = {}
        for place in self._measured:
            if self._works[place].factors is None:
                groups.setdefault(self._works[place].alike, []).append(place)
        found = {}
        for places in groups.values():
            tree = self._works[places[0]].tree
            assert tree is not None
            values, divisor = factors_of(tree, np.stack([grams[place] for place in places]))
            each = np.broadcast_to(values, (len(places), len(tree.parts)))
            found.update({place: (own, divisor) for place, own in zip(places, each, strict=True)})
        return found

    def _run_consensuses(self, outcomes: list[Outcome]) -> None:
        for places, select, merge in self._consensus:
            roots = [self._works[place].root for place in places]
            terms = [consensus_terms(root) for root in roots]
            jobs = [self._jobs[place] for place in places]
            wanted = [
                requests(root, own, job.name, tuple(job.out.shape))
                for root, own, job in zip(roots, terms, jobs, strict=True)
            ]
            chosen = select.run(wanted)
            selections = [own.settled(s) for own, s in zip(terms, chosen, strict=True)]
            scales = [own.agreement.scale for own in terms]
            counts = merge.run([own.weights for own in terms], selections, scales).tolist()
            for place, found, bad, own in zip(places, selections, counts, terms, strict=True):
                kept = tuple(s.kept for s in found) if own.is_counted else None
                outcomes[place] = Outcome(bad, kept=kept)

    def _run_pointwise(self, outcomes: list[Outcome]) -> None:
        for places, merge in self._pointwise:
            numbers = [self._works[place].numbers for place in places]
            for place, bad in zip(places, merge.run(numbers).tolist(), strict=True):
                outcomes[place] = Outcome(bad)


def form_of(name: str, root: Node) -> Form:
    """How the merge of the tensor ``name`` is prepared; FastmergeError where it cannot be."""
    return _work(name, root).form


def _work(name: str, root: Node) -> _Work:
    root = without_unread(root)
    if not isinstance(root, Merge):
        root = Merge(find("passthrough"), (root,), None, {}, ({},))
    if isinstance(root.method, Combination):
        tree = collapse(root)
        sources = _all_leaves(tree.parts)
        if tree.axis is None and sources is not None:
            if not tree.needs_gram:
                return _Work(root, Form(_GIVEN, sources), tree, factors_of(tree, None))
            measured = Form(("measured", tree.reference), sources)
            return _Work(root, measured, tree, alike=_values_of(tree))
    elif isinstance(root.method, Consensus):
        spans = root.method.spanning(root.values, root.operand_values)
        if spans is not None:
            raise UnsupportedError(
                f"{name}: {spans} is not for models on a GPU; merge to a folder, or "
                "into a model on the CPU"
            )
        sources = _all_leaves(root.inputs)
        if sources is not None:
            asked = consensus_terms(root).agreement
            how = (asked.elect, asked.normalize, asked.votes, asked.counted)
            return _Work(root, Form(("consensus", *how), sources))
    elif isinstance(root.method, Pointwise):
        made = root.method.asked(root.values, root.operand_values)
        sources = _all_leaves(root.inputs)
        if made is not None and sources is not None:
            formula, numbers = made
            return _Work(root, Form(("pointwise", formula), sources), numbers=numbers)
    return _Work(root, Form(_ALONE, tuple(n for n in walk(root) if isinstance(n, Leaf))))


def _all_leaves(parts: Sequence[Node]) -> tuple[Leaf, ...] | None:
    sources = tuple(part for part in parts if isinstance(part, Leaf))
    return sources if len(sources) == len(parts) else None


def _sources(works: Sequence[_Work]) -> dict[Leaf, None]:
    """What the works read, each once."""
    return dict.fromkeys(source for work in works for source in work.form.sources)


def _spread(factors: Float64, own: Sequence[Leaf], sources: Sequence[Leaf]) -> Float64:
    """Coefficients of some of the ``sources`` over all of them."""
    row = np.zeros(len(sources))
    row[[sources.index(source) for source in own]] = factors
    return row


def _values_of(tree: Collapsed) -> Any:
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
