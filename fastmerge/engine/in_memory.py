"""A plan to arrays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge import _C
from fastmerge.compute.cpu import cpu, thread_count
from fastmerge.engine.inputs import Inputs, trims_of, write_tensor
from fastmerge.engine.window import in_order, window_size
from fastmerge.plan.inputs import TensorPlan
from fastmerge.plan.plan import Plan
from fastmerge.tree.nodes import leaves


def materialise_plan(
    plan: Plan, *, threads: int | None = None
) -> Iterator[tuple[TensorPlan, NDArray[Any]]]:
    """Every output tensor of ``plan`` in memory, in plan order; nothing is written.

    The arrays have the output's shape: float32, float16, or uint16 holding bfloat16 bits; tensors
    of types that are only copied come as their raw bytes (uint8, one axis).
    """
    count = thread_count(threads)
    backend = cpu(count)
    inputs = Inputs(plan.models)
    spanning = trims_of(plan, backend, inputs)

    def compute_one(item: TensorPlan) -> NDArray[Any]:
        sources = leaves([item.root])
        inputs.prefetch(sources)
        array, sink = array_sink(item)
        write_tensor(backend, inputs, item, sink, spanning)
        inputs.drop(sources)
        return array

    with closing(in_order(compute_one, plan.tensors, window_size(count))) as finished:
        yield from finished
    for model in plan.models:
        model.check_unchanged()


_STORAGE: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def array_sink(item: TensorPlan) -> tuple[NDArray[Any], _C.Sink]:
    """A new array for one output tensor, and the sink that fills it."""
    storage = _STORAGE.get(item.dtype.code)
    array: NDArray[Any]
    if storage is None:
        array = np.empty(item.nbytes, np.uint8)
        view = _C.View(array.ctypes.data, array.nbytes, "RAW", array)
    else:
        array = np.empty(item.shape, storage)
        view = _C.View(array.ctypes.data, array.size, item.dtype.code, array)
    return array, _C.MemorySink(view)
