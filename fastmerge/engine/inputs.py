"""A plan's models as back ends want them, and one tensor to a sink."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from fastmerge import _C
from fastmerge.compute.across import find_trims
from fastmerge.compute.cpu import CpuBackend
from fastmerge.compute.leaves import gathered, scale_fault, view_of
from fastmerge.compute.tensor import Computation, Outcome, Trim
from fastmerge.errors import ModelError
from fastmerge.methods import find
from fastmerge.models.model import Model
from fastmerge.plan.inputs import TensorPlan
from fastmerge.plan.plan import Plan
from fastmerge.tree.nodes import (
    Dequantised,
    Leaf,
    LowRank,
    Merge,
    Node,
    Rows,
    Stored,
    gathers,
    walk,
)
from fastmerge.tree.unread import keeps_equal


class Inputs:
    """The models of a plan as `Computation` wants them: the one reader of their weights."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = models

    def fetch(self, source: Stored) -> _C.View:
        """The tensor's memory: elements, or RAW bytes of a type without kernels."""
        return self._models[source.model].view(source.name)

    def view(self, leaf: Leaf, backend: CpuBackend) -> _C.View:
        """The leaf's elements; ModelError where scales are no numbers above 0."""
        coded = leaf.base if isinstance(leaf, LowRank) else leaf
        if isinstance(coded, Dequantised):
            fault = scale_fault(coded, self.fetch)
            if fault is not None:
                label = self._models[coded.scales.model].label
                raise ModelError(f"{label}: {fault}; the model is damaged: get it again")
        return view_of(leaf, backend, self.fetch)

    @contextmanager
    def reading(self, sources: Sequence[Stored]) -> Iterator[None]:
        """Asks for the sources' pages ahead, and lets go of them behind."""
        for source in sources:
            self._models[source.model].prefetch(source.name)
        yield
        for source in sources:
            self._models[source.model].drop(source.name)

    def reduced(self, item: TensorPlan, pool: _C.Pool) -> TensorPlan:
        """The tensor made of one source where all are equal and its tree keeps that: what training
        left alone comes out as its bytes. Most tensors differ in the first 4 KiB.
        """
        root = item.root
        if not isinstance(root, Merge):
            return item
        view, first = None, None
        for leaf in walk(root):
            if isinstance(leaf, Merge):
                continue
            if not isinstance(leaf, Stored):
                return item
            if first is None or view is None:
                first, view = leaf, self.fetch(leaf)
            elif leaf.shape != first.shape or not _C.equal(pool, view, self.fetch(leaf)):
                return item
        if first is None or not keeps_equal(root):
            return item
        # Not a bare copy: what is NaN or infinite is counted.
        return replace(item, root=Merge(find("passthrough"), (first,), None, {}, ({},)))


def trims_of(plan: Plan, backend: CpuBackend, inputs: Inputs) -> Mapping[Node, Trim]:
    """The trims that span all tensors, which are found before the first one is merged."""
    return find_trims(plan.spanning, backend, lambda leaf: inputs.view(leaf, backend))


def on_host(root: Node) -> bool:
    """Whether the CPU makes a tensor that GPUs could, with the same bits: what is only copied, rows
    from several places (a merge has one or two such tensors), codes with scales, adapted weights.
    """
    return isinstance(root, Leaf) or gathers(root)


def write_tensor(
    backend: CpuBackend,
    inputs: Inputs,
    item: TensorPlan,
    sink: _C.Sink,
    spanning: Mapping[Node, Trim] | None = None,
) -> Outcome:
    """One output tensor into ``sink``: copied byte for byte when nothing is to be computed."""
    root = item.root

    def view(leaf: Leaf) -> _C.View:
        return inputs.view(leaf, backend)

    def gather(leaf: Rows, sources: Mapping[Node, _C.View]) -> _C.View:
        return gathered(leaf, backend, sources)

    if isinstance(root, Leaf) and not root.inputs and root.dtype == item.dtype:
        _C.copy(backend.pool, view(root), sink)
        return Outcome()
    computation = Computation(backend, view, item.name, item.shape, spanning, gather)
    return computation.run(root, sink)
