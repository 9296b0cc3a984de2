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

from fastmerge.compute.combining import coefficient_gradients
from fastmerge.ops.averages import (
    geometric_median,
    karcher,
    linear,
    model_stock,
    multislerp,
    nuslerp,
    passthrough,
    slerp,
)
from fastmerge.ops.calls import combine, gram, merge
from fastmerge.ops.deltas import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    prune,
    task_arithmetic,
    ties,
)
from fastmerge.ops.entries import (
    arcee_fusion,
    consensus_ta,
    magmax,
    nearswap,
    ram,
    ramplus_tl,
    sce,
)
from fastmerge.ops.words import Divisor, EqualMagnitudes, How, Numbers, Rescale, Votes

__all__ = [
    "Divisor",
    "EqualMagnitudes",
    "How",
    "Numbers",
    "Rescale",
    "Votes",
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
