"""A plan's models as back ends want them, and one tensor to a sink."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fastmerge import _C
from fastmerge.compute.across import find_trims
from fastmerge.compute.cpu import CpuBackend
from fastmerge.compute.tensor import Computation, Outcome, Trim
from fastmerge.dtypes import DType
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.plan import spanning as spanning_module
from fastmerge.plan.inputs import TensorPlan
from fastmerge.plan.plan import Plan
from fastmerge.tree.nodes import Node, Source


class Inputs:
    """The plan's checkpoints as `Computation` wants them, with pages asked for ahead and dropped
    behind.
    """

    def __init__(self, models: Sequence[Checkpoint]) -> None:
        self._models = models

    def fetch(self, source: Source) -> _C.View:
        return self._models[source.model].view(source.name)

    def dtype(self, source: Source) -> DType:
        return self._models[source.model].tensors[source.name].dtype

    def nbytes(self, sources: Sequence[Source]) -> int:
        return sum(self._models[s.model].tensors[s.name].nbytes for s in sources)

    def prefetch(self, sources: Sequence[Source]) -> None:
        for source in sources:
            self._models[source.model].prefetch(source.name)

    def drop(self, sources: Sequence[Source]) -> None:
        for source in sources:
            self._models[source.model].drop(source.name)


def output_bytes(item: TensorPlan) -> int:
    """Bytes of one output tensor."""
    return item.dtype.bytes_for(math.prod(item.shape))


def trims_of(plan: Plan, backend: CpuBackend, inputs: Inputs) -> Mapping[Node, Trim]:
    """The trims that span all tensors, which are found before the first one is merged."""
    nodes = spanning_module.spanning((item.root, item.count) for item in plan.tensors)
    return find_trims(nodes, backend, inputs.fetch)


def write_tensor(
    backend: CpuBackend,
    inputs: Inputs,
    item: TensorPlan,
    sink: _C.Sink,
    spanning: Mapping[Node, Trim] | None = None,
) -> Outcome:
    """One output tensor into ``sink``: copied byte for byte when nothing is to be computed."""
    root = item.root
    if isinstance(root, Source) and inputs.dtype(root) == item.dtype:
        _C.copy(backend.pool, inputs.fetch(root), sink)
        return Outcome()
    return Computation(backend, inputs.fetch, item.name, item.shape, spanning).run(root, sink)
