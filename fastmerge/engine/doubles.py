"""Tensors that no kernel writes: those merged in float64, or written in it."""

from __future__ import annotations

from collections.abc import Mapping

from fastmerge.compute.cpu import CpuBackend
from fastmerge.compute.double_leaves import gathered, numbers_of
from fastmerge.compute.doubles import DoubleBackend, Numbers, output, parts, widened
from fastmerge.compute.lane import Place
from fastmerge.compute.tensor import Computation, Outcome, Trim
from fastmerge.engine.inputs import Inputs, computation_of
from fastmerge.planning.inputs import TensorPlan
from fastmerge.tree.nodes import Leaf, Node


def write_double(
    backend: CpuBackend,
    inputs: Inputs,
    item: TensorPlan,
    place: Place,
    spanning: Mapping[Node, Trim] | None = None,
) -> Outcome:
    """One output tensor of those that `engine.inputs.is_double`, part by part."""
    out = output(place, item.count, backend.pool)
    if item.in_float64:
        return Computation(
            DoubleBackend(backend), lambda leaf: numbers(leaf, backend, inputs), item.name,
            item.shape, spanning, gathered,
        ).run(item.root, out)  # fmt: skip
    narrow, to = backend.scratch(item.count)
    outcome = computation_of(backend, inputs, item, spanning).run(item.root, to)
    wide = widened(narrow, backend)
    for begin, end in parts(item.count):
        out.write(begin, wide.read(begin, end))
    return outcome


def numbers(leaf: Leaf, backend: CpuBackend, inputs: Inputs) -> Numbers:
    """The leaf's elements; ModelError as `Inputs.check`."""
    inputs.check(leaf)
    return numbers_of(leaf, backend, inputs.fetch)
