"""Formulas: what each entry becomes, and the numbers that it takes from passes before it.

Tensors are a back end's; what its ``pointwise`` computes by each name is said in ``_C.pyi``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastmerge.methods.shapes import Given, Primitives
from fastmerge.methods.types import Float64, Values
from fastmerge.selection import EVERY, MAGNITUDE, Selection, Sparsify


def nearswap(on: Primitives, given: Given) -> Any:
    """out = w x + (1 - w) base, w = t / |base - x| within [0, 1]: what is near is swapped."""
    return on.pointwise("near_swap", given.tensors, given.base, [given.values["t"]])


def ram(on: Primitives, given: Given) -> Any:
    """out = base + sum of the active deltas over their number; active: |delta| > epsilon."""
    numbers = [given.values["epsilon"], *[1.0] * len(given.tensors)]
    return on.pointwise("reinforced", given.tensors, given.base, numbers)


def ramplus_tl(on: Primitives, given: Given) -> Any:
    """As RAM, entries that one model alone moved times 1 + r min(shared / unique, alpha), which
    counts how many entries that model shares with others and has for itself in the tensor.
    """
    epsilon = float(given.values["epsilon"])
    active = [on.pointwise("active", [x], given.base, [epsilon, 1]) for x in given.tensors]
    if len(active) == 2:  # what both moved is their product, and half of the reading spared
        counts = on.gram(active)
        every, unique = np.diagonal(counts), np.diagonal(counts) - counts[0, 1]
    else:
        alone = on.pointwise("active", given.tensors, given.base, [epsilon, 1])
        counts = on.gram([*active, alone])
        every, unique = np.diagonal(counts)[:-1], counts[-1, :-1]
    kind = on.kind  # fp32 for fp32, as in mergekit 0.1.5
    every, unique = every.astype(kind), unique.astype(kind)
    shared = every - unique
    with np.errstate(divide="ignore", invalid="ignore"):  # epsilon 0, and nothing moved alone
        share = shared / np.maximum(unique, kind(epsilon))
    share = np.minimum(share, kind(given.values["alpha"]))
    gains = kind(1) + kind(given.values["r"]) * share
    return on.pointwise("reinforced", given.tensors, given.base, [epsilon, *gains.tolist()])


def sce(on: Primitives, given: Given) -> Any:
    """Select the entries of largest variance, weigh models by their squares there, erase the
    minority's signs: out = base + sum_i w_i D_i [agrees] / sum_i w_i [agrees].
    """
    kept = _widest(on, given, float(given.values["select_topk"]))
    chosen: Sequence[Any] = given.tensors
    if kept is not None:
        chosen = [
            on.pointwise("varied_delta", given.tensors, given.base, [i], selection=kept)
            for i in range(len(given.tensors))
        ]
    squares = np.diagonal(on.gram(chosen) if kept else on.gram(chosen, given.base)[1:, 1:])
    weights = _shares(squares / max(1, int(np.prod(given.shape))))
    return on.pointwise(
        "select_and_erase", given.tensors, given.base, weights.tolist(), selection=kept
    )


def sce_passes(values: Values) -> int:
    """How often sce reads its inputs: squares, then the merge, and variances where some go."""
    return 2 if values["select_topk"] >= 1 else 4


def _widest(on: Primitives, given: Given, fraction: float) -> Selection | None:
    """The entries whose variance over the models is in the top ``fraction`` of those that have
    any; None where all stay.
    """
    if fraction >= 1:
        return None
    variance = on.pointwise("variance", given.tensors, given.base)
    zero = on.pointwise("zero", given.tensors, given.base)
    every = Sparsify(MAGNITUDE, 0)
    if fraction > 0:
        largest = int(np.iinfo(f"i{np.dtype(on.kind).itemsize}").max)
        above = Selection(MAGNITUDE, threshold_bits=0, tie_bound=0, ceiling_bits=largest)
        moved = on.gram([on.pointwise("varied", given.tensors, given.base, selection=above)])
        every = Sparsify(MAGNITUDE, int(float(moved[0, 0]) * fraction))
    return on.select([variance], zero, [every])[0]


def _shares(squares: Float64) -> Float64:
    """Mean squares over their sum; equal where that is below 1e-6, as in mergekit 0.1.5."""
    total = float(squares.sum())
    if abs(total) < 1e-6:
        return np.full(len(squares), 1.0 / len(squares))
    return np.asarray(squares / total)


def arcee_fusion(on: Primitives, given: Given) -> Any:
    """The entries of x whose importance is at least median + 1.5 (Q3 - Q1) of the tensor's, the
    base's elsewhere; importance: |x - base| times its row's divergence of softmax(x) from
    softmax(base).
    """
    count, cols = int(np.prod(given.shape)), given.shape[-1] if given.shape else 1
    if not count:
        return given.base
    # Rounding leaves of a row that did not move 1e-17 of either sign.
    factors = np.maximum(on.divergences(given.tensors[0], given.base, cols), 0.0)
    importance = on.pointwise("importance", given.tensors, given.base, factors=factors)
    zero = on.pointwise("zero", given.tensors, given.base)
    # The entry of rank int(q (n - 1)) from below is the n - rank largest.
    ranks = [Sparsify(MAGNITUDE, count - int(q * (count - 1)), EVERY) for q in (0.25, 0.5, 0.75)]
    found = on.select([importance] * 3, zero, ranks)
    bits = np.array([s.threshold_bits for s in found], f"u{np.dtype(on.kind).itemsize}")
    first, median, third = bits.view(on.kind)
    least = median + on.kind(1.5) * (third - first)
    return on.pointwise("fuse", given.tensors, given.base, [float(least)], factors=factors)


def magmax(on: Primitives, given: Given) -> Any:
    """out = base + lambda d, d the delta of largest magnitude, entry by entry."""
    return on.pointwise("largest", given.tensors, given.base, [given.values["lambda"]])


def consensus_ta(on: Primitives, given: Given) -> Any:
    """out = base + lambda S where at least ``agree`` of the models' masks |d_i| >= |S - d_i| l_i
    hold, S = sum_i w_i d_i. A model of weight 0 claims nothing.
    """
    numbers = [float(given.values["agree"]), float(given.values["lambda"])]
    for own in given.operands:
        numbers += [own["weight"], own["mask_lambda"]]
    return on.pointwise("agreed", given.tensors, given.base, numbers)
