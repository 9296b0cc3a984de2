"""Sums and inner products of tensors in memory: the primitives behind `fastmerge.ops`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fastmerge import _C
from fastmerge.arguments import a_list, plain
from fastmerge.compute.arrays import T, known, operands
from fastmerge.compute.recording import refuse_traces
from fastmerge.errors import FastmergeError, brief, nearest
from fastmerge.methods import REQUIRED, Parameter
from fastmerge.methods.types import Float64

_EACH = Parameter("coefficients", float, REQUIRED, "")


def gram(tensors: Sequence[Any], *, base: Any = None, threads: int | None = None) -> Float64:
    """`fastmerge.ops.gram`, at once."""
    tensors = a_list(tensors, "gram: tensors")
    if not tensors:
        raise FastmergeError("gram: no tensors")
    taken = operands("gram", [*tensors] if base is None else [base, *tensors])
    backend = taken.backend(threads)
    views = taken.views
    split = (views, None) if base is None else (views[1:], views[0])
    return backend.gram(*split)


def combine(
    tensors: Sequence[T],
    coefficients: Any,
    *,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """`fastmerge.ops.combine`, at once."""
    given: Sequence[T] = a_list(tensors, "combine: tensors")
    where = "combine: coefficients"
    coefficients = a_list(plain(coefficients, where), where)
    if len(coefficients) != len(given):
        raise FastmergeError(f"combine: {len(given)} tensors but {len(coefficients)} coefficients")
    factors = [_EACH.check(plain(value, where), "combine") for value in coefficients]
    return combined([*given], tuple(factors), out=out, threads=threads)


def combined(
    tensors: list[T],
    factors: tuple[float, ...],
    *,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """`combine` of any numbers: a gradient may be NaN."""
    like = known(tensors)
    if like is not None:
        made = like.run(_sum(factors), tensors, out, threads)
        if made is not None:
            return made
    taken = operands("combine", tensors)
    result, sink = taken.output(out)
    taken.backend(threads).combine(taken.views, np.array(factors), sink)
    return result


@lru_cache(maxsize=256)
def _sum(factors: tuple[float, ...]) -> _C.Program:
    return _C.Sum(range(len(factors)), factors)


def coefficient_gradients(
    grads: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any] | None = None,
    *,
    threads: int | None = None,
) -> dict[str, Float64]:
    """What a loss loses by each coefficient of a merge: d loss / d c_i = <grad, x_i> for ``merged =
    sum_i c_i x_i``, or <grad, x_i - base> for ``merged = base + sum_i c_i (x_i - base)`` (the chain
    rule).

    ``grads``: the loss's gradients by the merged tensors, by name; float32, float16 or bfloat16.
    ``models``: k mappings that hold tensors of those names and shapes; what they hold besides is
    left alone. ``base``: one more, or None. ``threads``: of the CPU's pool, default
    FASTMERGE_NUM_THREADS or every CPU. Each tensor is read once; products of fp32 are summed in
    float64.

    Returns float64 arrays of shape (k,) by name, in the order of ``grads``; their sum is the
    gradient by one coefficient for all tensors. Raises UnsupportedError for a type or within
    torch.jit.trace, FastmergeError for names, shapes or counts that do not fit.
    """
    refuse_traces("coefficient_gradients", "call it beside the recorded program")
    models = a_list(models, "coefficient_gradients: models")
    if not models:
        raise FastmergeError("coefficient_gradients: no models")
    named = [("grads", grads), *((f"models[{i}]", m) for i, m in enumerate(models))]
    named += [] if base is None else [("base", base)]
    for where, tensors in named:
        if not isinstance(tensors, Mapping):
            raise FastmergeError(
                f"coefficient_gradients: {where} must be a mapping of names to tensors, not "
                f"{brief(tensors)}"
            )
    sources = [tensors for _, tensors in named[1:]]
    found = {}
    for name, grad in grads.items():
        for where, tensors in named[1:]:
            if name not in tensors:
                raise FastmergeError(
                    f"coefficient_gradients: {where} has no tensor '{name}'; "
                    f"{nearest(str(name), tensors)}"
                )
        taken = operands(str(name), [grad, *(tensors[name] for tensors in sources)])
        products = taken.backend(threads).gram(taken.views, None)[0, 1:]
        found[name] = products if base is None else products[:-1] - products[-1]
    return found
