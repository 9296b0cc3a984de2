"""Means and arcs: sums whose coefficients follow from weights or from inner products."""

from __future__ import annotations

from collections.abc import Sequence

from fastmerge.compute.arrays import T
from fastmerge.ops.calls import named
from fastmerge.ops.words import Given, Numbers


def linear(
    tensors: Sequence[T],
    weights: Numbers,
    *,
    normalize: bool = True,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """sum_i w_i x_i, over sum_i w_i where ``normalize`` (Wortsman et al. 2022, arXiv:2203.05482).

    ``tensors``: k of one shape, float32, float16 or bfloat16. ``weights``: k numbers w_i.
    ``normalize``: whether to divide; weights that sum to 0 are refused. ``out``: a tensor to write
    to, which may be an input. ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or
    every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {"weight": weights, "normalize": normalize}
    return named("linear", tensors, given, out=out, threads=threads)


def slerp(a: T, b: T, t: float, *, out: T | None = None, threads: int | None = None) -> T:
    """sin((1 - t) v) / sin v a + sin(t v) / sin v b, v the angle between a and b (Shoemake 1985,
    doi:10.1145/325165.325242); linear where |cos v| > 0.9995, as in mergekit 0.1.5.

    ``a``, ``b``: of one shape, float32, float16 or bfloat16. ``t``: in [-1, 2]; 0 gives ``a``, 1
    gives ``b``, and the other is not read. ``out``: a tensor to write to, which may be an input.
    ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    return named("slerp", [a, b], {"t": t}, out=out, threads=threads)


def nuslerp(
    a: T,
    b: T,
    weights: Numbers,
    *,
    base: T | None = None,
    flatten: bool = True,
    row_wise: bool = False,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """SLERP (Shoemake 1985, doi:10.1145/325165.325242) at t = w_1 / (w_0 + w_1), of the tensors or
    of their deltas to ``base``, as mergekit 0.1.5 has it.

    ``a``, ``b``: of one shape, float32, float16 or bfloat16. ``weights``: two numbers whose t lies
    in [-1, 2]. ``base``: of that shape, or None for the tensors themselves. ``flatten``: each is
    one vector; without, each row (along the last axis) or, ``row_wise``: each column (along the
    first). ``out``: a tensor to write to, which may be an input. ``threads``: of the CPU's pool,
    default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {
        "weight": weights,
        "nuslerp_flatten": flatten,
        "nuslerp_row_wise": row_wise,
    }
    return named("nuslerp", [a, b], given, base=base, out=out, threads=threads)


def multislerp(
    tensors: Sequence[T],
    weights: Numbers,
    *,
    base: T | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """The weighted mean in the tangent space at the normalised mean direction, times the weighted
    mean of the norms; of the tensors or of their deltas to ``base``. The definition is mergekit
    0.1.5's: u_i = x_i / |x_i|, m = sum w_i u_i / |sum w_i u_i|, tau = sum w_i (u_i - <u_i, m> m),
    (m cos |tau| + tau sin |tau| / |tau|) sum w_i |x_i|.

    ``tensors``: k of one shape, float32, float16 or bfloat16. ``weights``: k numbers w_i. ``base``:
    of that shape, or None. ``normalize_weights``: divide the w_i by their sum, which must not be 0.
    ``eps``: a norm below it counts as 0, at least 0. ``out``: a tensor to write to, which may be an
    input. ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {"weight": weights, "normalize_weights": normalize_weights, "eps": eps}
    return named("multislerp", tensors, given, base=base, out=out, threads=threads)


def karcher(
    tensors: Sequence[T],
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """The Riemannian mean on the sphere, times the mean norm: u <- exp_u(mean of log_u(x_i /
    |x_i|)) from the normalised mean on (Grove and Karcher 1973, doi:10.1007/BF01214303).

    ``tensors``: k of one shape, float32, float16 or bfloat16. ``max_iter``: most steps, at least 1.
    ``tol``: the length of a step, in radians, that ends them, at least 0; a tensor no longer than
    it has no direction. ``out``: a tensor to write to, which may be an input. ``threads``: of the
    CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {"max_iter": max_iter, "tol": tol}
    return named("karcher", tensors, given, out=out, threads=threads)


def geometric_median(
    tensors: Sequence[T],
    weights: float | Numbers = 1.0,
    *,
    max_iter: int = 100,
    tol: float = 1e-6,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """The point with the least weighted sum of distances to the tensors, by Weiszfeld's steps y <-
    sum c_i x_i, c_i = w_i / |x_i - y| over their sum, from the mean on (Weiszfeld 1937; smoothed as
    by Pillutla et al. 2022, arXiv:1912.13445).

    ``tensors``: k of one shape, float32, float16 or bfloat16. ``weights``: none negative, one or k.
    ``max_iter``: most steps, at least 1. ``tol``: the length of a step, as a share of the tensors'
    spread, that ends them, at least 0. ``out``: a tensor to write to, which may be an input.
    ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {"weight": weights, "max_iter": max_iter, "tol": tol}
    return named("geometric_median", tensors, given, out=out, threads=threads)


def model_stock(
    base: T,
    tensors: Sequence[T],
    *,
    filter_wise: bool = False,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """r mean(x) + (1 - r) base, r = k c / (1 + (k - 1) c), c the mean cosine between the deltas
    (Jang et al. 2024, arXiv:2403.19522, equation 2).

    ``base``, ``tensors``: one and k, 2 or more, of one shape, float32, float16 or bfloat16.
    ``filter_wise``: an r for each row (along the last axis) in place of one for all. ``out``: a
    tensor to write to, which may be an input. ``threads``: of the CPU's pool, default
    FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {"filter_wise": filter_wise}
    return named("model_stock", tensors, given, base=base, out=out, threads=threads)


def passthrough(
    tensor: T, *, scale: float | None = None, out: T | None = None, threads: int | None = None
) -> T:
    """scale * tensor, mergekit's method of this name.

    ``tensor``: float32, float16 or bfloat16, of any shape. ``scale``: any number; None copies.
    ``out``: a tensor to write to, which may be the input. ``threads``: of the CPU's pool, default
    FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of its shape and type. Raises RecipeError for a value, UnsupportedError for a
    type, FastmergeError for an ``out`` that does not fit.
    """
    return named("passthrough", [tensor], {"scale": scale}, out=out, threads=threads)
