"""Gram matrices of a plan's sources, in one pass over the weights."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastmerge import _C
from fastmerge.compute.cpu import cpu, thread_count
from fastmerge.engine.inputs import Inputs
from fastmerge.engine.window import in_order, window_size
from fastmerge.methods.types import Float64
from fastmerge.models.memory import view_of
from fastmerge.models.model import Model
from fastmerge.progress import Progress, Told
from fastmerge.tree.nodes import Leaf, leaves

T = TypeVar("T")


def grams(
    models: Sequence[Model],
    tensors: Mapping[str, Sequence[Leaf]],
    *,
    in_float64: Container[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Float64]:
    """The Gram matrix of each tensor's sources, in one pass over the weights.

    ``tensors`` maps a name to sources of one shape. The result is float64, shape (n, n), over
    [x_0, x_1 - x_0, ..., x_{n-1} - x_0]: what `tree.collapse.coefficients` takes with
    ``reference`` = 0. ``in_float64``: tensors whose deltas are float64's, which all others with
    sources in float64 must have rounded (`tree.rewrite.narrowed`).
    """
    count = thread_count(threads)
    backend = cpu(count)
    inputs = Inputs(models)
    told = Told(progress, sum(leaf.nbytes for sources in tensors.values() for leaf in sources))

    def one(entry: tuple[str, Sequence[Leaf]]) -> Float64:
        name, sources = entry
        with inputs.reading(leaves(sources)):
            if name not in in_float64:
                return backend.gram(*_parted([inputs.view(leaf, backend) for leaf in sources]))
            from fastmerge.compute.doubles import DoubleBackend  # 6 ms that few need
            from fastmerge.engine.doubles import numbers

            of = [numbers(leaf, backend, inputs) for leaf in sources]
            return DoubleBackend(backend).gram(*_parted(of))

    found: dict[str, Float64] = {}
    with closing(in_order(one, list(tensors.items()), window_size(count))) as finished:
        for (name, sources), gram in finished:
            found[name] = gram
            told.add(sum(leaf.nbytes for leaf in sources), name)
    return found


def _parted(tensors: Sequence[T]) -> tuple[Sequence[T], T | None]:
    """What `gram` takes: all but the first, and that as the base."""
    first, *others = tensors
    return (others, first) if others else ([first], None)


def gram_with(models: Sequence[Model], sources: Sequence[Leaf], array: NDArray[Any]) -> Float64:
    """The Gram matrix of one tensor's sources and of ``array``, another tensor of their shape as
    `materialise_plan` gives it: float64, shape (n + 1, n + 1), as in `grams`, the array last.
    """
    backend, inputs = cpu(1), Inputs(models)
    first, *others = [inputs.view(leaf, backend) for leaf in sources]
    if array.dtype == np.float64:
        state = _C.narrowed(_C.View(array.ctypes.data, array.nbytes, "RAW", array))
    else:
        state = view_of(array, "a state")
    return backend.gram([*others, state], first)
