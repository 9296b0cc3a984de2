"""Specs: which delta entries survive and how the survivors are merged.

The arithmetic itself (mask, weigh, elect, average, add) is one fused kernel, ``consensus``; see
csrc/ and kernels/.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastmerge.methods.types import Consensus, Values
from fastmerge.selection import (
    ALL,
    INDEX,
    MAGNITUDE,
    MIXED,
    RANDOM,
    Sparsify,
    keep_below,
    keep_count,
)


def _spec(
    values: Values,
    operands: Sequence[Values],
    sparsify: Sequence[Sparsify],
    *,
    elect: bool,
    across: bool = False,
) -> Consensus:
    return Consensus(
        sparsify=tuple(sparsify),
        weights=tuple(float(operand["weight"]) for operand in operands),
        elect=elect,
        normalize=bool(values["normalize"]),
        scale=float(values["lambda"]),
        across=across,
    )


def _trim(values: Values, operands: Sequence[Values], count: int) -> list[Sparsify]:
    """Keep the int(density * count) largest of each delta (Yadav et al. 2023, section 4.1)."""
    rescale = bool(values["rescale"])
    tie_rule = INDEX if values.get("ties") == "index" else MIXED
    return [
        Sparsify(ALL)
        if operand["density"] >= 1
        else Sparsify(MAGNITUDE, keep_count(operand["density"], count), tie_rule, rescale=rescale)
        for operand in operands
    ]


def _drop(values: Values, operands: Sequence[Values], keys: Sequence[int]) -> list[Sparsify]:
    """Keep each entry with probability ``density`` (Yu et al. 2023, section 3.2; L1 rescale as
    mergekit).
    """
    rescale = bool(values["rescale"])
    return [
        Sparsify(ALL)
        if operand["density"] >= 1
        else Sparsify(RANDOM, keep_below=keep_below(operand["density"]), key=key, rescale=rescale)
        for operand, key in zip(operands, keys, strict=True)
    ]


def task_arithmetic(
    values: Values, operands: Sequence[Values], count: int, keys: Sequence[int]
) -> Consensus:
    """out = base + lambda * sum_i w_i (x_i - base) (Ilharco et al. 2022)."""
    return _spec(values, operands, [Sparsify(ALL)] * len(operands), elect=False)


def ties(values: Values, operands: Sequence[Values], count: int, keys: Sequence[int]) -> Consensus:
    """Trim, elect the sign of the weighted sum, average the entries that agree."""
    kept = _trim(values, operands, count)
    across = values.get("trim") == "model" and any(spec.kind != ALL for spec in kept)
    return _spec(values, operands, kept, elect=True, across=across)


def dare_linear(
    values: Values, operands: Sequence[Values], count: int, keys: Sequence[int]
) -> Consensus:
    """Drop at random, rescale, add."""
    return _spec(values, operands, _drop(values, operands, keys), elect=False)


def dare_ties(
    values: Values, operands: Sequence[Values], count: int, keys: Sequence[int]
) -> Consensus:
    """Drop at random, rescale, elect a sign, merge what agrees."""
    return _spec(values, operands, _drop(values, operands, keys), elect=True)
