"""consensus: delta, mask, weigh, elect a sign, average what agrees, scale, add the base; one pass
in registers; a batch of tensors in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from fastmerge.errors import FastmergeError
from fastmerge.kernels.common import (
    CHUNK,
    HEAD,
    Groups,
    aligned,
    check,
    codes,
    fetch,
    lanes,
    launch,
    locate,
    partition,
    per_lane,
    put,
    register_limit,
    tally,
    upload,
)
from fastmerge.kernels.masks import KEEP_ALL, RULE, load_rule, rule_of, survives
from fastmerge.primitives import FREQUENCY, WEIGHTED
from fastmerge.selection import RANKED, Selection

BY_SIGNS = tl.constexpr(FREQUENCY)


@triton.jit
def _block(
    addresses, rules, factors, scale, divisor, start, end, origin,
    CODES: tl.constexpr, OUT: tl.constexpr, MODES: tl.constexpr, RESCALED: tl.constexpr,
    ELECT: tl.constexpr, NORMALIZE: tl.constexpr, EXACT: tl.constexpr, SCALED: tl.constexpr,
    WIDE: tl.constexpr, ALIGNED: tl.constexpr, RULE: tl.constexpr, VOTES: tl.constexpr,
    COUNTED: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One BLOCK of outputs; returns how many of them, lane by lane, are NaN or infinite."""
    K: tl.constexpr = len(MODES)
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < end
    index = origin + offsets
    base = fetch(addresses[0], offsets, mask, CODES[0], ALIGNED, MASKED)
    total = tl.zeros([BLOCK], tl.float32)
    deltas = ()
    for i in tl.static_range(K):
        x = fetch(addresses[1 + i], offsets, mask, CODES[1 + i], ALIGNED, MASKED)
        delta = x - base
        weight = 1.0 if ELECT and VOTES else factors[2 * i]
        rescale = factors[2 * i + 1]
        if MODES[i] != KEEP_ALL:
            kept = survives(
                delta, origin + start, index, rules[RULE * i], rules[RULE * i + 1],
                rules[RULE * i + 2], rules[RULE * i + 3], rules[RULE * i + 4], MODES[i], WIDE,
                BLOCK,
            )  # fmt: skip
            # The mask's 1 or 0 times the next factor: the product that follows rounds once more
            # and is exact here, so that it moves no bit.
            if RESCALED[i]:
                delta = delta * tl.where(kept, rescale, rescale * 0.0) * weight
            else:
                delta = delta * tl.where(kept, weight, weight * 0.0)
        elif RESCALED[i]:
            delta = delta * rescale * weight
        else:
            delta = delta * weight
        vote = delta
        if ELECT and VOTES == BY_SIGNS:
            vote = tl.where(delta > 0, 1.0, tl.where(delta < 0, -1.0, 0.0))
        # Where a sign is elected only total >= 0 counts, which is the same from -0.0 as from +0.0.
        total = vote if ELECT and i == 0 else total + vote
        deltas = deltas + (delta,)
    if ELECT:
        sign = tl.where(total >= 0, 1.0, -1.0)
        total = tl.zeros([BLOCK], tl.float32)
        agreed = total
        for i in tl.static_range(K):
            agrees = tl.where(deltas[i] * sign > 0, 1.0, 0.0)
            own = deltas[i] * factors[2 * i] if VOTES else deltas[i]
            total = total + own * agrees
            share = agrees if COUNTED else factors[2 * i] * agrees
            agreed = share if i == 0 else agreed + share  # only its zero is asked for, of any sign
        if NORMALIZE:
            agreed = tl.where(agreed == 0, 1.0, agreed)
            if EXACT:  # a power of two: to subtract exponents is to take the reciprocal
                bits = 0x7F000000 - agreed.to(tl.int32, bitcast=True)
                total = total * bits.to(tl.float32, bitcast=True)
            else:
                total = tl.div_rn(total, agreed)
    elif NORMALIZE:
        total = tl.div_rn(total, tl.zeros_like(total) + divisor)
    if SCALED:
        total = total * scale
    return put(addresses[1 + K], offsets, mask, base + total, OUT, ALIGNED, MASKED)


@triton.jit
def consensus_kernel(
    table, owners, rules, numbers, origins, bad_counts,
    CODES: tl.constexpr, OUT: tl.constexpr, MODES: tl.constexpr, RESCALED: tl.constexpr,
    ELECT: tl.constexpr, NORMALIZE: tl.constexpr, EXACT: tl.constexpr, SCALED: tl.constexpr,
    WIDE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    HEAD: tl.constexpr, RULE: tl.constexpr, VOTES: tl.constexpr = 0, COUNTED: tl.constexpr = False,
):  # fmt: skip
    """CODES: the base, then k inputs. rules: int64 (segments, k, RULE). numbers: fp32 (segments, 2
    + 2 k): scale, divisor, then weight and rescale of each delta. origins: int64 (segments,), the
    flat index of element 0. EXACT: every sum of weights that agree is a power of two.
    """
    K: tl.constexpr = len(MODES)
    TAIL: tl.constexpr = BLOCK // 8
    segment, row, begin, end = locate(table, owners, HEAD + K + 2, CHUNK)
    rules += segment * (K * RULE)
    numbers += segment * (2 + 2 * K)
    origin = tl.load(origins + segment)
    scale, divisor = tl.load(numbers), tl.load(numbers + 1)
    addresses = (tl.load(row + HEAD),)
    limits = ()
    factors = ()
    for i in tl.static_range(K):
        addresses = addresses + (tl.load(row + HEAD + 1 + i),)
        limits = limits + load_rule(rules + RULE * i, MODES[i], WIDE)
        factors = factors + (tl.load(numbers + 2 + 2 * i), tl.load(numbers + 3 + 2 * i))
    addresses = addresses + (tl.load(row + HEAD + 1 + K),)
    whole = begin + (end - begin) // BLOCK * BLOCK
    bad = tl.zeros([BLOCK], tl.int32)
    for step in range(0, whole - begin, BLOCK):
        start = begin + step
        bad += _block(
            addresses, limits, factors, scale, divisor, start, end, origin, CODES, OUT, MODES,
            RESCALED, ELECT, NORMALIZE, EXACT, SCALED, WIDE, ALIGNED, RULE, VOTES, COUNTED, BLOCK,
            False,
        )  # fmt: skip
    tail_bad = tl.zeros([TAIL], tl.int32)  # in narrow steps, as in combine_kernel
    for step in range(0, end - whole, TAIL):
        start = whole + step
        tail_bad += _block(
            addresses, limits, factors, scale, divisor, start, end, origin, CODES, OUT, MODES,
            RESCALED, ELECT, NORMALIZE, EXACT, SCALED, WIDE, ALIGNED, RULE, VOTES, COUNTED, TAIL,
            True,
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
    votes: int = WEIGHTED,
    counted: bool = False,
) -> int:
    """`_C.consensus` on the device, whose origin need only be a multiple of 4; waits for it."""
    return int(
        consensus_many(
            [inputs], [base], [weights], [selections], [out],
            elect=elect, normalize=normalize, scales=[scale], origins=[origin], votes=votes,
            counted=counted,
        )[0]
    )  # fmt: skip


class ConsensusBatch:
    """`consensus` of many tensors, one launch per mix of dtypes and rules, as often as weights and
    selections are given.

    Checks and tables are made once; the tensors must keep their memory.
    """

    def __init__(
        self,
        inputs: Sequence[Sequence[torch.Tensor]],
        bases: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        *,
        elect: bool,
        normalize: bool,
        origins: Sequence[int] | None = None,
        votes: int = WEIGHTED,
        counted: bool = False,
    ) -> None:
        self._elect, self._normalize = elect, normalize
        self._votes, self._counted = votes, counted
        self._origins = [0] * len(outs) if origins is None else origins
        self._rows: list[list[torch.Tensor]] = []
        self._keys: list[tuple[tuple[int, ...], int, bool, bool]] = []
        for xs, base, out, origin in zip(inputs, bases, outs, self._origins, strict=True):
            check(xs, base, out)
            if origin % 4:
                raise FastmergeError(f"origin {origin}: a piece must start at a multiple of 4")
            row = [base, *xs, out]
            wide = origin + out.numel() > 1 << 32
            self._rows.append(row)
            self._keys.append((codes(row[:-1]), codes(row[-1:])[0], wide, aligned(row)))
        self._groups = Groups(self._rows)

    def run(
        self,
        weights: Sequence[Sequence[float]],
        selections: Sequence[Sequence[Selection]],
        scales: Sequence[float] | None = None,
    ) -> torch.Tensor:
        """Launches, does not wait; returns the NaN/Inf counts, int64 on the device."""
        rows = self._rows
        scales = [1.0] * len(rows) if scales is None else scales
        bad = torch.zeros(len(rows), dtype=torch.int64, device=rows[0][0].device if rows else None)
        rules: list[list[tuple[int, list[int]]]] = []
        keys: list[Any] = []
        for n, row in enumerate(rows):
            if not len(row) - 2 == len(weights[n]) == len(selections[n]):
                raise FastmergeError(
                    f"{len(row) - 2} inputs, {len(weights[n])} weights and {len(selections[n])} "
                    "selections; give one each"
                )
            origin = self._origins[n]
            if any(s.kind == RANKED for s in selections[n]) and origin % 32:
                raise FastmergeError(f"origin {origin}: a mask's piece starts at a multiple of 32")
            rules.append([rule_of(s, self._keys[n][2], origin) for s in selections[n]])
            key = (
                *self._keys[n],
                tuple(mode for mode, _ in rules[n]),
                tuple(s.rescale != 1.0 for s in selections[n]),
                bool(np.float32(scales[n]) != 1),
                self._elect and self._normalize and _exact(self._shares(weights[n])),
            )
            keys.append(key if row[0].numel() else None)
        for key, members in partition(keys).items():
            if key is None:
                continue
            kinds, kind, wide, straight, modes, rescaled, scaled, exact = key
            batch = self._groups.of(members)
            device = batch.table.device
            columns = [[column for _, column in rules[i]] for i in members]
            numbers = [
                _numbers(weights[i], self._shares(weights[i]), selections[i], scales[i])
                for i in members
            ]
            origins = [self._origins[i] for i in members]
            counts = torch.zeros(len(members), dtype=torch.int64, device=device)
            launch(
                consensus_kernel,
                batch.chunks,
                device,
                batch.table,
                batch.owners,
                upload(np.array(columns, dtype=np.int64), device),
                upload(np.array(numbers, dtype=np.float32), device),
                upload(np.array(origins, dtype=np.int64), device),
                counts,
                CODES=kinds,
                OUT=kind,
                MODES=modes,
                RESCALED=rescaled,
                ELECT=self._elect,
                NORMALIZE=self._normalize,
                EXACT=exact,
                SCALED=scaled,
                WIDE=wide,
                ALIGNED=straight,
                CHUNK=CHUNK,
                BLOCK=block(len(modes), lanes()),
                HEAD=HEAD,
                RULE=RULE,
                VOTES=self._votes,
                COUNTED=self._counted,
                registers=register_limit(2 * len(modes)),
            )
            bad.index_copy_(0, batch.members, counts)
        return bad

    def _shares(self, weights: Sequence[float]) -> tuple[float, ...]:
        """What each delta that takes part adds to the divisor."""
        return (1.0,) * len(weights) if self._counted else tuple(weights)


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
    votes: int = WEIGHTED,
    counted: bool = False,
) -> torch.Tensor:
    """`consensus` of many tensors at once. See `ConsensusBatch`."""
    batch = ConsensusBatch(
        inputs, bases, outs,
        elect=elect, normalize=normalize, origins=origins, votes=votes, counted=counted,
    )  # fmt: skip
    return batch.run(weights, selections, scales)


def block(inputs: int, lanes: int) -> int:
    """Elements of one step: an entry takes twice the registers that it takes in combine."""
    return per_lane(inputs) // 2 * lanes


@lru_cache(maxsize=1024)
def _exact(weights: tuple[float, ...]) -> bool:
    """Whether the weights that agree always sum to 0 or a power of two of which fp32 has the
    reciprocal, as 1, 1 or 0.5, 0.5 do: a product then rounds as the quotient.
    """
    if len(weights) > 8:  # 256 sums
        return False
    sums = np.zeros(1, dtype=np.float32)
    for weight in weights:
        sums = np.concatenate([sums, sums + np.float32(weight)])
    mantissas, exponents = np.frexp(sums[sums != 0])
    return bool(np.all(mantissas == 0.5) and np.all(np.abs(exponents) < 126))


def _numbers(
    weights: Sequence[float],
    shares: Sequence[float],
    selections: Sequence[Selection],
    scale: float,
) -> list[float]:
    """scale, divisor of a merge without election (1 where the shares' fp32 sum is below 1e-8),
    weight, rescale.
    """
    total = np.float32(0)
    for share in shares:
        total = np.float32(total + np.float32(share))
    divisor = float(total) if abs(total) >= np.float32(1e-8) else 1.0
    pairs = [number for w, s in zip(weights, selections, strict=True) for number in (w, s.rescale)]
    return [scale, divisor, *pairs]
