"""A plan to arrays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from numpy.typing import NDArray

from fastmerge.engine.executor import Local
from fastmerge.output.sink import Arrays
from fastmerge.plan.inputs import TensorPlan
from fastmerge.plan.plan import Plan


def materialise_plan(
    plan: Plan, *, threads: int | None = None
) -> Iterator[tuple[TensorPlan, NDArray[Any]]]:
    """Every output tensor of ``plan`` in memory, in plan order; nothing is written.

    The arrays have the output's shape: float32, float16, or uint16 holding bfloat16 bits; tensors
    of types that are only copied come as their raw bytes (uint8, one axis). What a folder would
    hold as codes comes as numbers.
    """
    plan = plan.as_numbers
    arrays = Arrays()
    with closing(Local(plan, threads=threads).run(arrays)) as finished:
        for item, _ in finished:
            yield item, arrays.take(item)
    plan.check_unchanged()
