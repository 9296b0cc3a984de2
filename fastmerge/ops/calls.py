"""Merges by name, sums, inner products: at once, or written down where torch records a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.compute import combining, of_tensors
from fastmerge.compute.arrays import T
from fastmerge.compute.recording import is_recorded
from fastmerge.errors import FastmergeError, in_words
from fastmerge.methods.types import Float64
from fastmerge.ops.words import Numbers


def merge(
    method: str,
    tensors: Sequence[T],
    parameters: Mapping[str, Any] | None = None,
    *,
    base: T | None = None,
    seed: int | None = None,
    name: str = "",
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """``tensors`` merged by any method of `fastmerge methods`, one that was registered, too.

    ``method``: its name. ``tensors``: k of one shape, float32, float16 or bfloat16. ``parameters``:
    values by their names in recipes, within the bounds that `fastmerge methods` has; of those given
    for each model, one number or k. ``base``: of that shape, where the method has one; None where
    it merges deltas says that ``tensors`` are these. ``seed``, ``name``: a whole number in [0,
    2^64), which methods that draw need, and the tensor's name, which decide what they draw.
    ``out``: a tensor to write to, which may be an input. ``threads``: of the CPU's pool, default
    FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    method that is not known or a value, UnsupportedError for a type or a device without kernels,
    FastmergeError for counts, shapes or an ``out`` that do not fit.
    """
    if is_recorded():
        made: T = _operators().merge(
            method, tensors, parameters, base=base, seed=seed, name=name, out=out, threads=threads
        )
        return made
    return of_tensors.merge(
        method, tensors, parameters, base=base, seed=seed, name=name, out=out, threads=threads
    )


# What parameters are called where a method is a function of its own.
_ARGUMENTS = {
    "weight": "weights", "lambda": "lambda_", "nuslerp_flatten": "flatten",
    "nuslerp_row_wise": "row_wise",
}  # fmt: skip
_OWN_WORDS = {f"'{name}'": f"'{argument}'" for name, argument in _ARGUMENTS.items()} | {
    rf"^(\w+): {name}:": rf"\1: {argument}:" for name, argument in _ARGUMENTS.items()
}


def named(method: str, tensors: Sequence[T], parameters: Mapping[str, Any], **options: Any) -> T:
    """`merge`, with its ``options``, for the function of a method, whose errors are in that
    function's words.
    """
    try:
        made: T = merge(method, tensors, parameters, **options)
    except FastmergeError:
        # Here alone: around every call it would cost 2 us of the few that one has.
        with in_words(_OWN_WORDS):
            raise
    return made


def combine(
    tensors: Sequence[T],
    coefficients: Numbers,
    *,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """sum_i c_i x_i in order, by fused multiply-adds of fp32, rounded once.

    ``tensors``: k of one shape, float32, float16 or bfloat16. ``coefficients``: k numbers c_i; a
    tensor whose own is 0 is not read. ``out``: a tensor to write to, which may be an input.
    ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    coefficient, UnsupportedError for a type, FastmergeError for counts, shapes or an ``out`` that
    do not fit.
    """
    if is_recorded():
        made: T = _operators().combine(tensors, coefficients, out=out, threads=threads)
        return made
    return combining.combine(tensors, coefficients, out=out, threads=threads)


def gram(tensors: Sequence[Any], *, base: Any = None, threads: int | None = None) -> Float64:
    """Inner products <x_i, x_j>: products of fp32, summed in float64.

    ``tensors``: k of one shape, float32, float16 or bfloat16. ``base``: of that shape, or None.
    ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a float64 array of shape (k, k); with ``base`` that of [base, x_1 - base, ...], of shape
    (k + 1, k + 1). Raises UnsupportedError for a type, FastmergeError for shapes that differ.
    """
    if is_recorded():
        made: Float64 = _operators().gram(tensors, base=base, threads=threads)
        return made
    return combining.gram(tensors, base=base, threads=threads)


def _operators() -> Any:
    """The same calls as operators of torch's, whose module imports torch."""
    from fastmerge.compute import torch_library

    return torch_library
