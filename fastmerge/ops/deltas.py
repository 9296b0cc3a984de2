"""Sums of deltas: which of their entries stay, and whether a sign is elected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from fastmerge.arguments import one_of
from fastmerge.compute.arrays import T
from fastmerge.errors import in_words
from fastmerge.ops.calls import named
from fastmerge.ops.words import Divisor, EqualMagnitudes, Given, How, Numbers, Rescale, Votes


def task_arithmetic(
    base: T | None,
    tensors: Sequence[T],
    weights: Numbers,
    *,
    normalize: bool = False,
    divisor: Divisor = "weights",
    lambda_: float = 1.0,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """base + lambda * sum_i w_i d_i, d_i = x_i - base (Ilharco et al. 2022, arXiv:2212.04089).

    ``base``, ``tensors``: one and k of one shape, float32, float16 or bfloat16; ``base`` None:
    ``tensors`` are the deltas d_i = x_i - base already, and so is the result. ``weights``: k
    numbers w_i. ``divisor``: the sum of an entry's "weights" that took part, or their "count";
    ``normalize``: whether to divide by it. ``lambda_``: any number, the factor on the merged delta.
    ``out``: a tensor to write to, which may be an input. ``threads``: of the CPU's pool, default
    FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {
        "weight": weights,
        "normalize": normalize,
        "lambda": lambda_,
        "divisor": divisor,
    }
    return named("task_arithmetic", tensors, given, base=base, out=out, threads=threads)


def ties(
    base: T | None,
    tensors: Sequence[T],
    weights: Numbers,
    *,
    density: float | Numbers = 1.0,
    normalize: bool = True,
    divisor: Divisor = "weights",
    votes: Votes = "weighted",
    lambda_: float = 1.0,
    rescale: Rescale = False,
    ties: EqualMagnitudes = "mixed",
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """base + lambda * sum_i w_i t_i over the entries that agree, t_i the ``density`` largest of d_i
    = x_i - base: trim, elect a sign, merge (Yadav et al. 2023, arXiv:2306.01708).

    ``base``, ``tensors``: one and k of one shape, float32, float16 or bfloat16; ``base`` None:
    ``tensors`` are the deltas d_i = x_i - base already, and so is the result. ``weights``: k
    numbers w_i. ``density``: the fraction of a delta's entries that stays, in [0, 1], one or k.
    ``divisor``: the sum of an entry's "weights" that took part, or their "count"; ``normalize``:
    whether to divide by it. ``votes``: an entry's sign is that of the sum of the deltas, "weighted"
    or "plain", or of their signs, "frequency"; what has another takes no part. ``lambda_``: any
    number, the factor on the merged delta. ``rescale``: of what stays, to the L1 norm from before
    (True, "l1") or by 1 / ``density`` ("density"), or not at all (False, "none"). ``ties``: of
    equal magnitudes at the threshold stay some, spread evenly ("mixed"), those of lowest index
    ("index") or "all". ``out``: a tensor to write to, which may be an input. ``threads``: of the
    CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {
        "weight": weights,
        "density": density,
        "normalize": normalize,
        "lambda": lambda_,
        "rescale": rescale,
        "divisor": divisor,
        "votes": votes,
        "ties": ties,
    }
    return named("ties", tensors, given, base=base, out=out, threads=threads)


def dare_linear(
    base: T | None,
    tensors: Sequence[T],
    weights: Numbers,
    *,
    density: float | Numbers,
    seed: int,
    name: str = "",
    normalize: bool = False,
    divisor: Divisor = "weights",
    lambda_: float = 1.0,
    rescale: Rescale = True,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """base + lambda * sum_i w_i m_i d_i / density, m_i drawn, 1 with chance ``density`` (Yu et al.
    2023, arXiv:2311.03099); as in mergekit the L1 norm is restored in place of the division.

    ``base``, ``tensors``: one and k of one shape, float32, float16 or bfloat16; ``base`` None:
    ``tensors`` are the deltas d_i = x_i - base already, and so is the result. ``weights``: k
    numbers w_i. ``density``: the fraction of a delta's entries that stays, in [0, 1], one or k.
    ``seed``, ``name``: a whole number in [0, 2^64) and the tensor's name, which decide what is
    dropped, as in a recipe. ``divisor``: the sum of an entry's "weights" that took part, or their
    "count"; ``normalize``: whether to divide by it. ``lambda_``: any number, the factor on the
    merged delta. ``rescale``: of what stays, to the L1 norm from before (True, "l1") or by 1 /
    ``density`` ("density"), or not at all (False, "none"). ``out``: a tensor to write to, which may
    be an input. ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {
        "weight": weights,
        "density": density,
        "normalize": normalize,
        "lambda": lambda_,
        "rescale": rescale,
        "divisor": divisor,
    }
    return named(
        "dare_linear", tensors, given, base=base, seed=seed, name=name, out=out, threads=threads
    )


def dare_ties(
    base: T | None,
    tensors: Sequence[T],
    weights: Numbers,
    *,
    density: float | Numbers,
    seed: int,
    name: str = "",
    normalize: bool = False,
    divisor: Divisor = "weights",
    votes: Votes = "weighted",
    lambda_: float = 1.0,
    rescale: Rescale = True,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """base + lambda * sum_i w_i m_i d_i over the entries that agree, m_i drawn, 1 with chance
    ``density`` (Yu et al. 2023, arXiv:2311.03099), a sign elected (Yadav et al. 2023,
    arXiv:2306.01708).

    ``base``, ``tensors``: one and k of one shape, float32, float16 or bfloat16; ``base`` None:
    ``tensors`` are the deltas d_i = x_i - base already, and so is the result. ``weights``: k
    numbers w_i. ``density``: the fraction of a delta's entries that stays, in [0, 1], one or k.
    ``seed``, ``name``: a whole number in [0, 2^64) and the tensor's name, which decide what is
    dropped, as in a recipe. ``divisor``: the sum of an entry's "weights" that took part, or their
    "count"; ``normalize``: whether to divide by it. ``votes``: an entry's sign is that of the sum
    of the deltas, "weighted" or "plain", or of their signs, "frequency"; what has another takes no
    part. ``lambda_``: any number, the factor on the merged delta. ``rescale``: of what stays, to
    the L1 norm from before (True, "l1") or by 1 / ``density`` ("density"), or not at all (False,
    "none"). ``out``: a tensor to write to, which may be an input. ``threads``: of the CPU's pool,
    default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {
        "weight": weights,
        "density": density,
        "normalize": normalize,
        "lambda": lambda_,
        "rescale": rescale,
        "divisor": divisor,
        "votes": votes,
    }
    return named(
        "dare_ties", tensors, given, base=base, seed=seed, name=name, out=out, threads=threads
    )


def breadcrumbs(
    base: T | None,
    tensors: Sequence[T],
    weights: Numbers,
    *,
    density: float | Numbers = 1.0,
    gamma: float | Numbers = 0.01,
    normalize: bool = False,
    divisor: Divisor = "weights",
    lambda_: float = 1.0,
    rescale: Rescale = False,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """base + lambda * sum_i w_i t_i, t_i = d_i without its ``gamma`` largest entries and all but
    the next ``density`` of them (Davari and Belilovsky 2023, arXiv:2312.06795).

    ``base``, ``tensors``: one and k of one shape, float32, float16 or bfloat16; ``base`` None:
    ``tensors`` are the deltas d_i = x_i - base already, and so is the result. ``weights``: k
    numbers w_i. ``density``: the fraction of a delta's entries that stays, in [0, 1], one or k.
    ``gamma``: the fraction of entries, the largest, that is dropped first, in [0, 1], one or k.
    ``divisor``: the sum of an entry's "weights" that took part, or their "count"; ``normalize``:
    whether to divide by it. ``lambda_``: any number, the factor on the merged delta. ``rescale``:
    of what stays, to the L1 norm from before (True, "l1") or by 1 / ``density`` ("density"), or not
    at all (False, "none"). ``out``: a tensor to write to, which may be an input. ``threads``: of
    the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {
        "weight": weights,
        "density": density,
        "gamma": gamma,
        "rescale": rescale,
        "normalize": normalize,
        "lambda": lambda_,
        "divisor": divisor,
    }
    return named("breadcrumbs", tensors, given, base=base, out=out, threads=threads)


def breadcrumbs_ties(
    base: T | None,
    tensors: Sequence[T],
    weights: Numbers,
    *,
    density: float | Numbers = 1.0,
    gamma: float | Numbers = 0.01,
    normalize: bool = False,
    divisor: Divisor = "weights",
    votes: Votes = "weighted",
    lambda_: float = 1.0,
    rescale: Rescale = False,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """base + lambda * sum_i w_i t_i over the entries that agree, t_i = d_i without its ``gamma``
    largest entries and all but the next ``density`` of them (Davari and Belilovsky 2023,
    arXiv:2312.06795), a sign elected (Yadav et al. 2023, arXiv:2306.01708).

    ``base``, ``tensors``: one and k of one shape, float32, float16 or bfloat16; ``base`` None:
    ``tensors`` are the deltas d_i = x_i - base already, and so is the result. ``weights``: k
    numbers w_i. ``density``: the fraction of a delta's entries that stays, in [0, 1], one or k.
    ``gamma``: the fraction of entries, the largest, that is dropped first, in [0, 1], one or k.
    ``divisor``: the sum of an entry's "weights" that took part, or their "count"; ``normalize``:
    whether to divide by it. ``votes``: an entry's sign is that of the sum of the deltas, "weighted"
    or "plain", or of their signs, "frequency"; what has another takes no part. ``lambda_``: any
    number, the factor on the merged delta. ``rescale``: of what stays, to the L1 norm from before
    (True, "l1") or by 1 / ``density`` ("density"), or not at all (False, "none"). ``out``: a tensor
    to write to, which may be an input. ``threads``: of the CPU's pool, default
    FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {
        "weight": weights,
        "density": density,
        "gamma": gamma,
        "rescale": rescale,
        "normalize": normalize,
        "lambda": lambda_,
        "divisor": divisor,
        "votes": votes,
    }
    return named("breadcrumbs_ties", tensors, given, base=base, out=out, threads=threads)


def della(
    base: T | None,
    tensors: Sequence[T],
    weights: Numbers,
    *,
    density: float | Numbers,
    seed: int,
    name: str = "",
    epsilon: float | Numbers = 0.15,
    normalize: bool = True,
    divisor: Divisor = "weights",
    votes: Votes = "weighted",
    lambda_: float = 1.0,
    rescale: Rescale = True,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """base + lambda * sum_i w_i m_i d_i over the entries that agree, m_i drawn, 1 with a chance
    that rises with the entry's rank in its row from density - epsilon to density + epsilon (Deep et
    al. 2024, arXiv:2406.11617), a sign elected (Yadav et al. 2023, arXiv:2306.01708).

    ``base``, ``tensors``: one and k of one shape, float32, float16 or bfloat16; ``base`` None:
    ``tensors`` are the deltas d_i = x_i - base already, and so is the result. ``weights``: k
    numbers w_i. ``density``: the fraction of a delta's entries that stays, in [0, 1], one or k.
    ``seed``, ``name``: a whole number in [0, 2^64) and the tensor's name, which decide what is
    dropped, as in a recipe. ``epsilon``: at least 0, one or k; ``density`` - epsilon and + epsilon
    must lie between 0 and 1. ``divisor``: the sum of an entry's "weights" that took part, or their
    "count"; ``normalize``: whether to divide by it. ``votes``: an entry's sign is that of the sum
    of the deltas, "weighted" or "plain", or of their signs, "frequency"; what has another takes no
    part. ``lambda_``: any number, the factor on the merged delta. ``rescale``: of what stays, to
    the L1 norm from before (True, "l1") or by 1 / ``density`` ("density"), or not at all (False,
    "none"). ``out``: a tensor to write to, which may be an input. ``threads``: of the CPU's pool,
    default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {
        "weight": weights,
        "density": density,
        "epsilon": epsilon,
        "rescale": rescale,
        "normalize": normalize,
        "lambda": lambda_,
        "divisor": divisor,
        "votes": votes,
    }
    return named("della", tensors, given, base=base, seed=seed, name=name, out=out, threads=threads)


def della_linear(
    base: T | None,
    tensors: Sequence[T],
    weights: Numbers,
    *,
    density: float | Numbers,
    seed: int,
    name: str = "",
    epsilon: float | Numbers = 0.15,
    normalize: bool = False,
    divisor: Divisor = "weights",
    lambda_: float = 1.0,
    rescale: Rescale = True,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """base + lambda * sum_i w_i m_i d_i, m_i drawn, 1 with a chance that rises with the entry's
    rank in its row from density - epsilon to density + epsilon (Deep et al. 2024,
    arXiv:2406.11617).

    ``base``, ``tensors``: one and k of one shape, float32, float16 or bfloat16; ``base`` None:
    ``tensors`` are the deltas d_i = x_i - base already, and so is the result. ``weights``: k
    numbers w_i. ``density``: the fraction of a delta's entries that stays, in [0, 1], one or k.
    ``seed``, ``name``: a whole number in [0, 2^64) and the tensor's name, which decide what is
    dropped, as in a recipe. ``epsilon``: at least 0, one or k; ``density`` - epsilon and + epsilon
    must lie between 0 and 1. ``divisor``: the sum of an entry's "weights" that took part, or their
    "count"; ``normalize``: whether to divide by it. ``lambda_``: any number, the factor on the
    merged delta. ``rescale``: of what stays, to the L1 norm from before (True, "l1") or by 1 /
    ``density`` ("density"), or not at all (False, "none"). ``out``: a tensor to write to, which may
    be an input. ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of their shape and type (float32 where types differ). Raises RecipeError for a
    value, UnsupportedError for a type, FastmergeError for shapes or an ``out`` that do not fit.
    """
    given: Given = {
        "weight": weights,
        "density": density,
        "epsilon": epsilon,
        "rescale": rescale,
        "normalize": normalize,
        "lambda": lambda_,
        "divisor": divisor,
    }
    return named(
        "della_linear", tensors, given, base=base, seed=seed, name=name, out=out, threads=threads
    )


def prune(
    tensor: T,
    density: float,
    how: How = "magnitude",
    *,
    rescale: Rescale = False,
    epsilon: float = 0.15,
    gamma: float = 0.0,
    seed: int | None = None,
    name: str = "",
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """The delta ``tensor`` with a fraction of its entries, the others 0: what one model has in the
    sums above.

    ``tensor``: float32, float16 or bfloat16, of any shape. ``density``: the fraction that stays, in
    [0, 1]. ``how``: "magnitude", the largest (`breadcrumbs`); "random", any (`dare_linear`);
    "rank", the larger the likelier (`della_linear`). ``gamma``: of "magnitude", the fraction of
    entries, the largest, that is dropped first, in [0, 1]. ``epsilon``: of "rank", at least 0;
    ``density`` - epsilon and + epsilon must lie between 0 and 1. ``seed``, ``name``: of the latter
    two, a whole number in [0, 2^64) and the tensor's name, which decide what stays, as in a recipe.
    ``rescale``: of what stays, to the L1 norm from before (True, "l1") or by 1 / ``density``
    ("density"), or not at all (False, "none"). ``out``: a tensor to write to, which may be the
    input. ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns a tensor of its shape and type. Raises RecipeError for a value, UnsupportedError for a
    type, FastmergeError for ``how``, a seed that is missing or an ``out`` that does not fit.
    """
    given: Given = {"weight": 1.0, "density": density, "rescale": rescale}
    one_of(how, get_args(How), "prune: how")
    with in_words({"^(breadcrumbs|dare_linear|della_linear): ": "prune: "}):
        if how == "magnitude":
            given |= {"gamma": gamma}
            return named("breadcrumbs", [tensor], given, out=out, threads=threads)
        method = "dare_linear" if how == "random" else "della_linear"
        given |= {"normalize": False} | ({"epsilon": epsilon} if how == "rank" else {})
        return named(method, [tensor], given, seed=seed, name=name, out=out, threads=threads)
