"""consensus: delta, mask, weigh, elect a sign, average what agrees, scale, add the base; one pass
in registers.

The order of the fp32 operations is mergekit 0.1.5's (TIES: Yadav et al., arXiv:2306.01708; DARE: Yu
et al., arXiv:2311.03099). Masks multiply, so that NaN and Inf survive them; sums start from +0;
nothing is fused.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from fastmerge.errors import FastmergeError
from fastmerge.kernels.common import (
    CHUNK,
    HEAD,
    aligned,
    block,
    check,
    codes,
    fetch,
    group,
    launch,
    locate,
    magnitude_key,
    order_of,
    partition,
    put,
    random_words,
    register_limit,
    tally,
    upload,
)
from fastmerge.sparsity import INDEX, MAGNITUDE, RANDOM, Selection

# How one delta's entries are kept, a compile-time choice per delta.
KEEP_ALL: tl.constexpr = tl.constexpr(0)
KEEP_RANDOM: tl.constexpr = tl.constexpr(1)
KEEP_FROM: tl.constexpr = tl.constexpr(2)  # key >= threshold
KEEP_MIXED: tl.constexpr = tl.constexpr(3)  # key > threshold, or tied and mixed index <= last
KEEP_INDEX: tl.constexpr = tl.constexpr(4)  # key > threshold, or tied and flat index <= last
RULE = 3  # rule columns per delta: threshold; last (both rules) or keep_below; key


@triton.jit
def survives(
    delta, first, index, rule, MODE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Which of BLOCK entries from flat index ``first`` on are kept. rule: the delta's RULE int64
    numbers.
    """
    if MODE == KEEP_ALL:
        kept = tl.full([BLOCK], 1, tl.int1)
    elif MODE == KEEP_RANDOM:
        key = tl.load(rule + 2).to(tl.uint64, bitcast=True)
        kept = random_words(key, first, BLOCK).to(tl.int64) < tl.load(rule + 1)
    else:
        key, threshold = magnitude_key(delta), tl.load(rule).to(tl.uint32)
        if MODE == KEEP_FROM:
            kept = key >= threshold
        else:
            order = order_of(index, MODE == KEEP_INDEX, WIDE)
            last = tl.load(rule + 1).to(order.dtype)
            kept = (key > threshold) | ((key == threshold) & (order <= last))
    return kept


@triton.jit
def _block(
    row, rules, numbers, start, end, origin,
    CODES: tl.constexpr, OUT: tl.constexpr, MODES: tl.constexpr, RESCALED: tl.constexpr,
    ELECT: tl.constexpr, NORMALIZE: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr, RULE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One BLOCK of outputs; returns how many of them, lane by lane, are NaN or infinite."""
    K: tl.constexpr = len(MODES)
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < end
    index = origin + offsets
    base = fetch(tl.load(row + HEAD), offsets, mask, CODES[0], ALIGNED, MASKED)
    total = tl.zeros([BLOCK], tl.float32)
    deltas = ()
    for i in tl.static_range(K):
        x = fetch(tl.load(row + HEAD + 1 + i), offsets, mask, CODES[1 + i], ALIGNED, MASKED)
        delta = x - base
        if MODES[i] != KEEP_ALL:
            kept = survives(delta, origin + start, index, rules + RULE * i, MODES[i], WIDE, BLOCK)
            delta = delta * tl.where(kept, 1.0, 0.0)
        if RESCALED[i]:
            delta = delta * tl.load(numbers + 2 + 2 * i + 1)
        delta = delta * tl.load(numbers + 2 + 2 * i)
        total = total + delta
        deltas = deltas + (delta,)
    if ELECT:
        sign = tl.where(total >= 0, 1.0, -1.0)
        total = tl.zeros([BLOCK], tl.float32)
        weight = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(K):
            agrees = tl.where(deltas[i] * sign > 0, 1.0, 0.0)
            total = total + deltas[i] * agrees
            weight = weight + tl.load(numbers + 2 + 2 * i) * agrees
        if NORMALIZE:
            total = tl.div_rn(total, tl.where(weight == 0, 1.0, weight))
    elif NORMALIZE:
        total = tl.div_rn(total, tl.zeros_like(total) + tl.load(numbers + 1))
    if SCALED:
        total = total * tl.load(numbers)
    return put(tl.load(row + HEAD + 1 + K), offsets, mask, base + total, OUT, ALIGNED, MASKED)


@triton.jit
def consensus_kernel(
    table, owners, rules, numbers, origins, bad_counts,
    CODES: tl.constexpr, OUT: tl.constexpr, MODES: tl.constexpr, RESCALED: tl.constexpr,
    ELECT: tl.constexpr, NORMALIZE: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr,
    RULE: tl.constexpr,
):  # fmt: skip
    """CODES: the base, then k inputs. rules: int64 (segments, k, RULE). numbers: fp32 (segments, 2
    + 2 k): scale, divisor, then weight and rescale of each delta. origins: int64 (segments,), the
    flat index of element 0.
    """
    K: tl.constexpr = len(MODES)
    TAIL: tl.constexpr = BLOCK // 8
    segment, row, begin, end = locate(table, owners, HEAD + K + 2, CHUNK)
    rules += segment * (K * RULE)
    numbers += segment * (2 + 2 * K)
    origin = tl.load(origins + segment)
    whole = begin + (end - begin) // BLOCK * BLOCK
    bad = tl.zeros([BLOCK], tl.int32)
    for step in range(0, whole - begin, BLOCK):
        start = begin + step
        bad += _block(
            row, rules, numbers, start, end, origin, CODES, OUT, MODES, RESCALED, ELECT, NORMALIZE,
            SCALED, WIDE, ALIGNED, BLOCK, HEAD, RULE, False,
        )  # fmt: skip
    tail_bad = tl.zeros([TAIL], tl.int32)  # in narrow steps, as in combine_kernel
    for step in range(0, end - whole, TAIL):
        start = whole + step
        tail_bad += _block(
            row, rules, numbers, start, end, origin, CODES, OUT, MODES, RESCALED, ELECT, NORMALIZE,
            SCALED, WIDE, ALIGNED, TAIL, HEAD, RULE, True,
        )  # fmt: skip
    count = tl.sum(bad, 0) + tl.sum(tail_bad, 0)
    tally(bad_counts + segment, count)


def consensus(
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor,
    weights: Sequence[float],
    selections: Sequence[Selection],
    out: torch.Tensor,
    *,
    elect: bool,
    normalize: bool,
    scale: float = 1.0,
    origin: int = 0,
) -> int:
    """out = base + scale * merge(mask_i * rescale_i * (x_i - base) * w_i), fp32 without FMA, one
    rounding.

    inputs, base: contiguous tensors of any mix of types; out: float32, float16 or bfloat16, may be
    one of them. weights, selections: one per input. origin: flat index of the first element where
    the tensors are a piece of larger ones (a multiple of 4). Returns the number of NaN/Inf outputs;
    waits for the device.
    """
    return int(
        consensus_many(
            [inputs], [base], [weights], [selections], [out],
            elect=elect, normalize=normalize, scales=[scale], origins=[origin],
        )[0]
    )  # fmt: skip


def consensus_many(
    inputs: Sequence[Sequence[torch.Tensor]],
    bases: Sequence[torch.Tensor],
    weights: Sequence[Sequence[float]],
    selections: Sequence[Sequence[Selection]],
    outs: Sequence[torch.Tensor],
    *,
    elect: bool,
    normalize: bool,
    scales: Sequence[float] | None = None,
    origins: Sequence[int] | None = None,
) -> torch.Tensor:
    """`consensus` of many tensors, one launch per mix of dtypes and rules; the NaN/Inf counts, on
    the device.
    """
    scales = [1.0] * len(outs) if scales is None else scales
    origins = [0] * len(outs) if origins is None else origins
    bad = torch.zeros(len(outs), dtype=torch.int64, device=outs[0].device if outs else None)
    rows: list[list[torch.Tensor]] = []
    keys: list[tuple[object, ...] | None] = []
    for n, (xs, base, out) in enumerate(zip(inputs, bases, outs, strict=True)):
        check(xs, base, out)
        if not len(xs) == len(weights[n]) == len(selections[n]):
            raise FastmergeError(
                f"{len(xs)} inputs, {len(weights[n])} weights and {len(selections[n])} "
                "selections; give one each"
            )
        if origins[n] % 4:
            raise FastmergeError(f"origin {origins[n]}: a piece must start at a multiple of 4")
        row = [base, *xs, out]
        rows.append(row)
        wide = origins[n] + out.numel() > 1 << 32
        key = (
            codes(row[:-1]),
            codes([out])[0],
            tuple(rule_of(s, wide)[0] for s in selections[n]),
            tuple(s[6] != 1.0 for s in selections[n]),
            np.float32(scales[n]) != 1,
            wide,
            aligned(row),
        )
        keys.append(key if out.numel() else None)
    for key, members in partition(keys).items():
        if key is None:
            continue
        batch = group(members, [rows[i] for i in members])
        device = batch.table.device
        counts = torch.zeros(len(members), dtype=torch.int64, device=device)
        numbers = [_numbers(weights[i], selections[i], scales[i]) for i in members]
        rules = [[rule_of(s, bool(key[5]))[1] for s in selections[i]] for i in members]
        launch(
            consensus_kernel,
            batch.chunks,
            device,
            batch.table,
            batch.owners,
            upload(np.array(rules, dtype=np.int64), device),
            upload(np.array(numbers, dtype=np.float32), device),
            upload(np.array([origins[i] for i in members], dtype=np.int64), device),
            counts,
            CODES=key[0],
            OUT=key[1],
            MODES=key[2],
            RESCALED=key[3],
            ELECT=elect,
            NORMALIZE=normalize,
            SCALED=bool(key[4]),
            WIDE=key[5],
            ALIGNED=key[6],
            CHUNK=CHUNK,
            BLOCK=block_size(len(key[2])),
            HEAD=HEAD,
            RULE=RULE,
            registers=register_limit(2 * len(key[2])),
        )
        bad[torch.tensor(members, device=device)] = counts
    return bad


def block_size(inputs: int) -> int:
    """Elements of one step: an entry takes twice the registers that it takes in combine."""
    return block(inputs) // 2


def rule_of(selection: Selection, wide: bool) -> tuple[int, list[int]]:
    """A Selection as the kernels' mode and its RULE signed 64-bit numbers."""
    chosen = Selection(*selection)
    if chosen.kind == RANDOM:
        return 1, [0, chosen.keep_below, _signed(chosen.key)]
    if chosen.kind != MAGNITUDE:
        return 0, [0, 0, 0]
    if chosen.tie_bound == 0:  # no tied entry survives: keep from the next key on
        return 2, [chosen.threshold_bits + 1, 0, 0]
    if chosen.tie_bound >= 1 << 64:
        return 2, [chosen.threshold_bits, 0, 0]
    last = chosen.tie_bound - 1  # the last order that survives
    if chosen.tie_rule == INDEX:
        last = last if wide else min(last, (1 << 32) - 1)
        return 4, [chosen.threshold_bits, _signed(last), 0]
    return 3, [chosen.threshold_bits, _signed(last if wide else last >> 32), 0]


def _signed(value: int) -> int:
    """The signed 64-bit integer of the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _numbers(
    weights: Sequence[float], selections: Sequence[Selection], scale: float
) -> list[float]:
    """scale, divisor of a merge without election (1 where the weights' fp32 sum is below 1e-8),
    weight, rescale.
    """
    total = np.float32(0)
    for weight in weights:
        total = np.float32(total + np.float32(weight))
    divisor = float(total) if abs(total) >= np.float32(1e-8) else 1.0
    pairs = [
        number
        for w, s in zip(weights, selections, strict=True)
        for number in (w, Selection(*s).rescale)
    ]
    return [scale, divisor, *pairs]
