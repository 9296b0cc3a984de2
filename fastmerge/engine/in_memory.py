"""A plan to arrays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.engine.executor import Local
from fastmerge.errors import ResourceError
from fastmerge.models.memory import as_torch
from fastmerge.output.sink import Arrays
from fastmerge.planning.inputs import TensorPlan
from fastmerge.planning.plan import Plan


def materialise_plan(
    plan: Plan, *, threads: int | None = None
) -> Iterator[tuple[TensorPlan, NDArray[Any]]]:
    """Every output tensor of ``plan`` in memory, in plan order; nothing is written.

    The arrays have the output's shape: floats, or uint16 holding bfloat16 bits; tensors of types
    that are only copied come as their raw bytes (uint8, one axis). What a folder would hold as
    codes comes as numbers.
    """
    plan = plan.as_numbers
    arrays = Arrays()
    with closing(Local(plan, threads=threads).run(arrays)) as finished:
        for item, _ in finished:
            yield item, arrays.take(item)
    plan.check_unchanged()


def as_numbers(item: TensorPlan, array: NDArray[Any], kind: str) -> Any:
    """An array of `materialise_plan` as numbers: of NumPy's own types (bfloat16 widened to
    float32), of ml_dtypes', or a torch tensor; shares its memory but where it is widened. What
    ``kind`` has no type for stays its raw bytes (uint8, one axis).
    """
    if kind == "torch":
        return _as_torch(item, array)
    dtype: Any = array.dtype if item.dtype.mergeable else item.dtype.numpy
    if item.dtype.name == "bool":
        dtype = np.bool_
    if kind == "ml_dtypes":
        dtype = _of_ml_dtypes(item.dtype.name) or dtype
    elif item.dtype.name == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array if dtype is None else array.reshape(-1).view(dtype).reshape(item.shape)


def _as_torch(item: TensorPlan, array: NDArray[Any]) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ResourceError(f"as_: torch cannot be imported ({error}); install it") from error
    if not hasattr(torch, item.dtype.name):
        return torch.from_numpy(array)
    return as_torch(array, item.dtype, item.shape)


def _of_ml_dtypes(name: str) -> Any:
    try:
        import ml_dtypes
    except ImportError as error:
        raise ResourceError(
            f"as_: ml_dtypes cannot be imported ({error}); install it, or use 'numpy'"
        ) from error
    return getattr(ml_dtypes, name, None) if name.startswith(("bfloat", "float8")) else None
