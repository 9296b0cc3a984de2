"""Adapters alone, merged: one target's factors from several, in float64.

The combination types of PEFT's ``add_weighted_adapter`` (peft 0.21, tuners/lora/model.py and
utils/merge_utils.py; the formulas are those of TIES, Yadav et al. 2023, arXiv:2306.01708, and DARE,
Yu et al. 2023, arXiv:2311.03099), over one of three things:

* the factors: A and B each merged entry by entry, every adapter's weighted by ``sqrt(|w s|)``, A
  with the sign of ``w s`` too; cheap, and not the sum of the products;
* their sum ``sum_i w_i s_i B_i A_i``, which keeps low rank: its factors side by side, or its SVD at
  a rank from them (`fastmerge.compute.factors.spectrum_of_sum`);
* the whole products ``s_i B_i A_i``, merged entry by entry, of which the SVD at a rank is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastmerge.compute.factors import Spectrum, spectrum_of, spectrum_of_sum
from fastmerge.compute.reference import philox_words
from fastmerge.methods.adapters import AdapterMethod
from fastmerge.methods.types import Float64
from fastmerge.selection import keep_below, random_key


class Given(NamedTuple):
    """One adapter's part in a target: the delta is ``weight * scale * b @ a``."""

    b: Float64  # (rows, r)
    a: Float64  # (r, cols)
    scale: float
    weight: float
    density: float = 1.0
    number: int = 0  # its place among the adapters: what it draws under


class Asked(NamedTuple):
    """How the given ones are merged. ``rank``: of an SVD. ``clamp``: the quantile of the SVD's
    entries that bounds them. ``frequency``: signs are counted, not summed.
    """

    method: AdapterMethod
    rank: int | None = None
    clamp: float | None = None
    frequency: bool = False
    seed: int = 0


def merged(given: Sequence[Given], asked: Asked, name: str) -> tuple[Float64, Float64]:
    """The factors b (rows, r) and a (r, cols), to be applied with scale 1, of the target ``name``.

    For "factors" all must have one r. An SVD puts the singular values into b, as PEFT does, and has
    as many of ``asked.rank`` as there are.
    """
    kind = asked.method
    if kind.over == "sum" and not kind.cuts(asked.rank):
        bs = [own.b for own in given]
        return np.concatenate(bs, axis=1), np.concatenate([*map(_weighted_a, given)], axis=0)
    if kind.over == "factors":
        roots = [math.sqrt(abs(own.weight * own.scale)) for own in given]
        signed = [
            root if own.weight * own.scale >= 0 else -root
            for root, own in zip(roots, given, strict=True)
        ]
        b = _arithmetic([own.b for own in given], roots, given, asked, f"{name} B")
        return b, _arithmetic([own.a for own in given], signed, given, asked, f"{name} A")
    if kind.over == "sum":
        found = spectrum_of_sum([own.b for own in given], [*map(_weighted_a, given)])
    else:
        products = [own.scale * own.b @ own.a for own in given]
        weights = [own.weight for own in given]
        found = spectrum_of(_arithmetic(products, weights, given, asked, name))
    return _of_spectrum(found.cut(asked.rank or len(found.s)), asked.clamp)


def _weighted_a(own: Given) -> Float64:
    return own.a * (own.weight * own.scale)


def _of_spectrum(found: Spectrum, clamp: float | None) -> tuple[Float64, Float64]:
    b, a = found.u * found.s, found.vt
    if clamp is not None:
        bound = float(np.quantile(np.concatenate([b.ravel(), a.ravel()]), clamp))
        b, a = np.clip(b, -bound, bound), np.clip(a, -bound, bound)
    return b, a


def _arithmetic(
    tensors: Sequence[Float64],
    weights: Sequence[float],
    given: Sequence[Given],
    asked: Asked,
    name: str,
) -> Float64:
    """Entry by entry: what survives of each tensor, weighted and added, or, with an election, the
    mean of those that have the elected sign.
    """
    kind = asked.method
    kept = [
        tensor if not kind.prune or own.density >= 1
        else _largest(tensor, own.density) if kind.prune == "magnitude"
        else _drawn(tensor, own.density, random_key(asked.seed, name, own.number))
        for tensor, own in zip(tensors, given, strict=True)
    ]  # fmt: skip
    if not kind.elect:
        return _sum([weight * tensor for weight, tensor in zip(weights, kept, strict=True)])
    votes = [np.sign(tensor) for tensor in kept] if asked.frequency else kept
    elected = np.where(_sum(votes) >= 0, 1.0, -1.0)
    agree = [np.sign(tensor) == elected for tensor in kept]  # a zero has no sign
    parts = zip(weights, kept, agree, strict=True)
    total = _sum([weight * tensor * own for weight, tensor, own in parts])
    count = _sum([own.astype(np.float64) for own in agree])
    mean: Float64 = total / np.maximum(count, 1.0)
    return mean


def _sum(terms: Sequence[Float64]) -> Float64:
    total = terms[0].copy()
    for term in terms[1:]:
        total += term
    return total


def _largest(tensor: Float64, density: float) -> Float64:
    """The int(density * entries) entries of largest magnitude; of equals those of lowest index."""
    keep = int(density * tensor.size)
    if not keep:
        return np.zeros_like(tensor)
    size = np.abs(tensor.ravel())
    bound = np.partition(size, -keep)[-keep]
    kept = size > bound
    ties = np.flatnonzero(size == bound)
    kept[ties[: keep - int(kept.sum())]] = True
    largest: Float64 = tensor * kept.reshape(tensor.shape)
    return largest


def _drawn(tensor: Float64, density: float, key: int) -> Float64:
    """Each entry with the chance ``density``, over ``density``; nothing at density 0."""
    if not density:
        return np.zeros_like(tensor)
    kept = philox_words(tensor.size, key).astype(np.uint64) < keep_below(density)
    return tensor * kept.reshape(tensor.shape) / density
