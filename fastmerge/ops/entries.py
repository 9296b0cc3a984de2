"""Merges that decide entry by entry, from what all models have there."""

from __future__ import annotations

from collections.abc import Sequence

from fastmerge.compute.arrays import T
from fastmerge.ops.calls import named
from fastmerge.ops.words import Given, Numbers


def sce(
    base: T | None,
    tensors: Sequence[T],
    *,
    select_topk: float = 1.0,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """base + sum_i s_i d_i [agrees] / sum_i s_i [agrees]: entries by variance over the tensors, s_i
    their mean squares there, the minority's signs erased (Wan et al. 2024, arXiv:2408.07990).

    ``base``, ``tensors``: one and k of one shape, float32, float16 or bfloat16; ``base`` None:
    ``tensors`` are the deltas d_i = x_i - base already, and so is the result. ``select_topk``: the
    fraction of the entries that vary that is kept, in [0, 1]. ``out``: a tensor to write to, which
    may be an input. ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {"select_topk": select_topk}
    return named("sce", tensors, given, base=base, out=out, threads=threads)


def ram(
    base: T | None,
    tensors: Sequence[T],
    *,
    epsilon: float = 1e-5,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """base + the mean of those d_i that changed the entry, |d_i| > epsilon: what one tensor changed
    is taken whole (RAM, arXiv:2601.13572).

    ``base``, ``tensors``: one and k of one shape, float32, float16 or bfloat16; ``base`` None:
    ``tensors`` are the deltas d_i = x_i - base already, and so is the result. ``epsilon``: the
    largest delta that is no change, at least 0. ``out``: a tensor to write to, which may be an
    input. ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {"epsilon": epsilon}
    return named("ram", tensors, given, base=base, out=out, threads=threads)


def ramplus_tl(
    base: T | None,
    tensors: Sequence[T],
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """As `ram`, but what one tensor alone changed counts 1 + r min(shared / unique, alpha), of how
    many entries it changed with others and alone (RAM+, arXiv:2601.13572).

    ``base``, ``tensors``: one and k of one shape, float32, float16 or bfloat16; ``base`` None:
    ``tensors`` are the deltas d_i = x_i - base already, and so is the result. ``r``: any number,
    how much what is unique is strengthened. ``alpha``: the most of that ratio, at least 0.
    ``epsilon``: the largest delta that is no change, at least 0. ``out``: a tensor to write to,
    which may be an input. ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every
    CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {"r": r, "alpha": alpha, "epsilon": epsilon}
    return named("ramplus_tl", tensors, given, base=base, out=out, threads=threads)


def nearswap(
    base: T,
    x: T,
    t: float,
    *,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """g x + (1 - g) base, g = t / |base - x| and at most 1, entry by entry: what is near is swapped
    (mergekit 0.1.5's definition).

    ``base``, ``x``: of one shape, float32, float16 or bfloat16. ``t``: the distance up to which
    entries are swapped, at least 0. ``out``: a tensor to write to, which may be an input.
    ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {"t": t}
    return named("nearswap", [x], given, base=base, out=out, threads=threads)


def arcee_fusion(
    base: T,
    x: T,
    *,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """``x`` where its importance is at least median + 1.5 (Q3 - Q1) of the tensor's, else ``base``;
    importance is |x - base| times the divergence of its row's softmax from the base's (mergekit
    0.1.5's definition, quantiles of all entries).

    ``base``, ``x``: of one shape, float32, float16 or bfloat16; rows lie along the last axis.
    ``out``: a tensor to write to, which may be an input. ``threads``: of the CPU's pool, default
    FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises UnsupportedError
    for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    return named("arcee_fusion", [x], {}, base=base, out=out, threads=threads)


def magmax(
    base: T | None,
    tensors: Sequence[T],
    *,
    lambda_: float = 1.0,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """base + lambda d, d the delta of largest magnitude, entry by entry (Marczak et al. 2024,
    arXiv:2407.06322).

    ``base``, ``tensors``: one and k of one shape, float32, float16 or bfloat16; ``base`` None:
    ``tensors`` are the deltas d_i = x_i - base already, and so is the result. ``lambda_``: any
    number, the factor on the merged delta. ``out``: a tensor to write to, which may be an input.
    ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {"lambda": lambda_}
    return named("magmax", tensors, given, base=base, out=out, threads=threads)


def consensus_ta(
    base: T | None,
    tensors: Sequence[T],
    weights: float | Numbers = 1.0,
    *,
    mask_lambda: float | Numbers = 0.4,
    agree: int = 2,
    lambda_: float = 1.0,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """base + lambda S where at least ``agree`` of the masks |d_i| >= mask_lambda |S - d_i| hold, S
    = sum_i w_i d_i (Wang et al. 2024, arXiv:2405.07813).

    ``base``, ``tensors``: one and k of one shape, float32, float16 or bfloat16; ``base`` None:
    ``tensors`` are the deltas d_i = x_i - base already, and so is the result. ``weights``: w_i, one
    number or k. ``mask_lambda``: at least 0, one or k; the larger, the fewer entries a tensor
    claims. ``agree``: how many must claim an entry, at least 1. ``lambda_``: any number, the factor
    on the merged delta. ``out``: a tensor to write to, which may be an input. ``threads``: of the
    CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {
        "weight": weights,
        "mask_lambda": mask_lambda,
        "agree": agree,
        "lambda": lambda_,
    }
    return named("consensus_ta", tensors, given, base=base, out=out, threads=threads)
