"""Merges of tensors in memory: torch tensors (CPU or CUDA) and NumPy arrays, without copies.

Every function takes contiguous tensors of one shape, in float32, float16 or bfloat16 in any mix;
NumPy arrays of uint16 are taken as bfloat16 bits (ml_dtypes' bfloat16 works too). The result has
the inputs' type, float32 when they differ, and goes to ``out`` when given, which may be one of the
inputs. Float8 tensors (but scales) are read as bfloat16, which has all their numbers, from a copy
that lives for the call; their result is bfloat16. What speaks DLPack, or NumPy's array protocols,
is taken too. Arithmetic is fp32 with one rounding; CUDA tensors use the Triton kernels. Bad
arguments raise FastmergeError. Definitions and defaults: ``fastmerge methods``.

torch.compile, torch.export and torch.jit.trace record a call as one operator of torch's. Results
carry no gradient, also where an input requires one: `fastmerge.integrations.torch_ops` has the
merges that gradients flow through, and `coefficient_gradients` those by all coefficients at once.

Where a method takes only what models differ by from their base, ``base`` None says that the tensors
are deltas already, and so is the result. The defaults are mergekit's definitions; PEFT's are
``votes="plain", divisor="count"`` for `ties`, and ``rescale="density"`` besides for `dare_ties`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from fastmerge.arguments import one_of
from fastmerge.compute.arrays import T
from fastmerge.compute.calls import combine, gram, merge
from fastmerge.compute.combining import coefficient_gradients

Numbers = Sequence[float] | NDArray[Any]
"""One number for each tensor, as a list or as an array of one axis."""

Votes = Literal["weighted", "plain", "frequency"]
"""What elects a sign: the sum of the weighted deltas, of the deltas, or of their signs."""

Divisor = Literal["weights", "count"]
"""What ``normalize`` divides by: the sum of the weights that took part, or how many did."""

Rescale = bool | Literal["l1", "density", "none"]
"""True is "l1": what stays is scaled to the L1 norm from before; "density": divided by the density;
False is "none"."""

EqualMagnitudes = Literal["mixed", "index", "all"]
"""Which of equal magnitudes stay at the threshold: some, spread evenly; those of lowest index; or
all of them."""

How = Literal["magnitude", "random", "rank"]
"""How `prune` picks entries."""

Given = dict[str, Any]

__all__ = [
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "coefficient_gradients",
    "combine",
    "consensus_ta",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "geometric_median",
    "gram",
    "karcher",
    "linear",
    "magmax",
    "merge",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "prune",
    "ram",
    "ramplus_tl",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
]


def linear(
    tensors: Sequence[T],
    weights: Numbers,
    *,
    normalize: bool = True,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """sum_i w_i x_i, divided by sum_i w_i when ``normalize`` (Wortsman et al. 2022)."""
    given: Given = {"weight": weights, "normalize": normalize}
    return merge("linear", tensors, given, out=out, threads=threads)


def slerp(a: T, b: T, t: float, *, out: T | None = None, threads: int | None = None) -> T:
    """Spherical interpolation: ``t`` = 0 gives ``a``, 1 gives ``b`` (Shoemake 1985)."""
    return merge("slerp", [a, b], {"t": t}, out=out, threads=threads)


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
    """SLERP at w_1 / (w_0 + w_1), of the tensors or of their deltas to ``base``: of each as one
    vector, or without ``flatten`` row by row (along the last axis), and with ``row_wise`` besides
    column by column (along the first), as mergekit's parameters of these names have it.
    """
    given: Given = {
        "weight": weights,
        "nuslerp_flatten": flatten,
        "nuslerp_row_wise": row_wise,
    }
    return merge("nuslerp", [a, b], given, base=base, out=out, threads=threads)


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
    """Barycentric SLERP of many tensors, or of their deltas to ``base``."""
    given: Given = {"weight": weights, "normalize_weights": normalize_weights, "eps": eps}
    return merge("multislerp", tensors, given, base=base, out=out, threads=threads)


def karcher(
    tensors: Sequence[T],
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """Riemannian mean on the sphere (Grove and Karcher 1973)."""
    given: Given = {"max_iter": max_iter, "tol": tol}
    return merge("karcher", tensors, given, out=out, threads=threads)


def model_stock(
    base: T,
    tensors: Sequence[T],
    *,
    filter_wise: bool = False,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """The mean of ``tensors`` pulled toward ``base`` by the angle between deltas (Jang et al.
    2024).
    """
    given: Given = {"filter_wise": filter_wise}
    return merge("model_stock", tensors, given, base=base, out=out, threads=threads)


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
    """base + lambda * sum_i w_i (x_i - base) (Ilharco et al. 2022)."""
    given: Given = {
        "weight": weights,
        "normalize": normalize,
        "lambda": lambda_,
        "divisor": divisor,
    }
    return merge("task_arithmetic", tensors, given, base=base, out=out, threads=threads)


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
    """Trim deltas to ``density``, elect signs, average what agrees (Yadav et al. 2023)."""
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
    return merge("ties", tensors, given, base=base, out=out, threads=threads)


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
    """Drop delta entries at random, rescale, add (Yu et al. 2023).

    ``seed`` and the tensor's ``name`` choose what is dropped: the same pair gives what a recipe
    gives.
    """
    given: Given = {
        "weight": weights,
        "density": density,
        "normalize": normalize,
        "lambda": lambda_,
        "rescale": rescale,
        "divisor": divisor,
    }
    return merge(
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
    """As `dare_linear`, with a sign election (Yu et al. 2023; Yadav et al. 2023)."""
    given: Given = {
        "weight": weights,
        "density": density,
        "normalize": normalize,
        "lambda": lambda_,
        "rescale": rescale,
        "divisor": divisor,
        "votes": votes,
    }
    return merge(
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
    """Drop the ``gamma`` largest delta entries, keep the next ``density``, add (Davari and
    Belilovsky 2023).
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
    return merge("breadcrumbs", tensors, given, base=base, out=out, threads=threads)


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
    """As `breadcrumbs`, with a sign election (Davari and Belilovsky 2023; Yadav et al. 2023)."""
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
    return merge("breadcrumbs_ties", tensors, given, base=base, out=out, threads=threads)


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
    """As `della_linear`, with a sign election (Deep et al. 2024; Yadav et al. 2023)."""
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
    return merge("della", tensors, given, base=base, seed=seed, name=name, out=out, threads=threads)


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
    """Drop delta entries at random, the smallest of a row with probability 1 - ``density`` +
    ``epsilon``, the largest with 1 - ``density`` - ``epsilon``; rescale, add (Deep et al. 2024).

    ``seed`` and the tensor's ``name`` choose what is dropped, as in `dare_linear`.
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
    return merge(
        "della_linear", tensors, given, base=base, seed=seed, name=name, out=out, threads=threads
    )


def sce(
    base: T | None,
    tensors: Sequence[T],
    *,
    select_topk: float = 1.0,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """Select entries by variance, weigh by squares, erase minority signs (Wan et al. 2024)."""
    given: Given = {"select_topk": select_topk}
    return merge("sce", tensors, given, base=base, out=out, threads=threads)


def ram(
    base: T | None,
    tensors: Sequence[T],
    *,
    epsilon: float = 1e-5,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """Sum what one tensor changed, average what several did (arXiv:2601.13572)."""
    given: Given = {"epsilon": epsilon}
    return merge("ram", tensors, given, base=base, out=out, threads=threads)


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
    """As `ram`, with what one tensor alone changed strengthened."""
    given: Given = {"r": r, "alpha": alpha, "epsilon": epsilon}
    return merge("ramplus_tl", tensors, given, base=base, out=out, threads=threads)


def nearswap(
    base: T,
    x: T,
    t: float,
    *,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """``base``, moved to ``x`` where they are within ``t`` and less the farther they are."""
    given: Given = {"t": t}
    return merge("nearswap", [x], given, base=base, out=out, threads=threads)


def arcee_fusion(
    base: T,
    x: T,
    *,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """``x`` where it matters most by its row's divergence, else ``base``."""
    return merge("arcee_fusion", [x], {}, base=base, out=out, threads=threads)


def magmax(
    base: T | None,
    tensors: Sequence[T],
    *,
    lambda_: float = 1.0,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """``base`` plus the delta of largest magnitude, entry by entry (Marczak et al. 2024)."""
    given: Given = {"lambda": lambda_}
    return merge("magmax", tensors, given, base=base, out=out, threads=threads)


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
    """Task arithmetic where at least ``agree`` masks hold (Wang et al. 2024)."""
    given: Given = {
        "weight": weights,
        "mask_lambda": mask_lambda,
        "agree": agree,
        "lambda": lambda_,
    }
    return merge("consensus_ta", tensors, given, base=base, out=out, threads=threads)


def geometric_median(
    tensors: Sequence[T],
    weights: float | Numbers = 1.0,
    *,
    max_iter: int = 100,
    tol: float = 1e-6,
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """The point with the least weighted sum of distances to the tensors (Weiszfeld 1937)."""
    given: Given = {"weight": weights, "max_iter": max_iter, "tol": tol}
    return merge("geometric_median", tensors, given, out=out, threads=threads)


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
    """The delta ``tensor`` with a fraction ``density`` of its entries, the others 0.

    ``how``: 'magnitude' keeps the largest, those after the ``gamma`` very largest (`breadcrumbs`);
    'random' any (`dare_linear`); 'rank' the larger the likelier, by ``epsilon`` (`della_linear`).
    The latter two draw by ``seed`` and ``name``. ``rescale``: True or 'l1' restores the L1 norm,
    'density' divides by the density.
    """
    given: Given = {"weight": 1.0, "density": density, "rescale": rescale}
    one_of(how, get_args(How), "prune: how")
    if how == "magnitude":
        return merge("breadcrumbs", [tensor], given | {"gamma": gamma}, out=out, threads=threads)
    method = "dare_linear" if how == "random" else "della_linear"
    given |= {"normalize": False} | ({"epsilon": epsilon} if how == "rank" else {})
    return merge(method, [tensor], given, seed=seed, name=name, out=out, threads=threads)


def passthrough(
    tensor: T, *, scale: float | None = None, out: T | None = None, threads: int | None = None
) -> T:
    """The tensor, times ``scale``."""
    return merge("passthrough", [tensor], {"scale": scale}, out=out, threads=threads)
