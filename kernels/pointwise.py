"""pointwise: what an entry becomes from those of the base and the models at its place, in one pass;
a batch of tensors in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from fastmerge.kernels.common import (
    CHUNK,
    HEAD,
    MOST_REGISTERS,
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
    tally,
    upload,
)
from fastmerge.kernels.masks import KEEP_ALL, RULE, load_rule, rule_of, survives
from fastmerge.selection import Selection


class Formula(NamedTuple):
    """What a formula of ``_C.pointwise`` takes."""

    code: int
    numbers: int = 0
    per_input: int = 0  # numbers for each input
    inputs: int = 0  # 0: one or more
    by_row: bool = False  # whether it has factors
    is_mask: bool = False  # whether it is 0 or 1, which bf16 holds


ZERO: tl.constexpr = tl.constexpr(0)
NEAR_SWAP: tl.constexpr = tl.constexpr(1)
ACTIVE: tl.constexpr = tl.constexpr(2)
REINFORCED: tl.constexpr = tl.constexpr(3)
VARIANCE: tl.constexpr = tl.constexpr(4)
VARIED: tl.constexpr = tl.constexpr(5)
VARIED_DELTA: tl.constexpr = tl.constexpr(6)
SELECT_AND_ERASE: tl.constexpr = tl.constexpr(7)
IMPORTANCE: tl.constexpr = tl.constexpr(8)
FUSE: tl.constexpr = tl.constexpr(9)
LARGEST: tl.constexpr = tl.constexpr(10)
AGREED: tl.constexpr = tl.constexpr(11)
FORMULAS = {
    "zero": Formula(ZERO.value, is_mask=True),
    "near_swap": Formula(NEAR_SWAP.value, 1, inputs=1),
    "active": Formula(ACTIVE.value, 2, is_mask=True),
    "reinforced": Formula(REINFORCED.value, 1, 1),
    "variance": Formula(VARIANCE.value),
    "varied": Formula(VARIED.value, is_mask=True),
    "varied_delta": Formula(VARIED_DELTA.value, 1),
    "select_and_erase": Formula(SELECT_AND_ERASE.value, 0, 1),
    "importance": Formula(IMPORTANCE.value, inputs=1, by_row=True),
    "fuse": Formula(FUSE.value, 1, inputs=1, by_row=True),
    "largest": Formula(LARGEST.value, 1),
    "agreed": Formula(AGREED.value, 2, 2),
}


# --- on the device ------------------------------------------------------------------------------


@triton.jit
def _flag(condition):
    return tl.where(condition, 1.0, 0.0)


@triton.jit
def _near_swap(x, base, t):
    distance = tl.abs(base - x)
    distance = tl.where(distance < 1e-6, 1e-6, distance)
    # The reciprocal and the product are rounded one by one, as in torch's quotient.
    weight = tl.div_rn(tl.zeros_like(x) + 1.0, distance) * t
    weight = tl.where(weight < 0.0, 0.0, weight)
    weight = tl.where(weight > 1.0, 1.0, weight)
    return weight * x + (1.0 - weight) * base


@triton.jit
def _active(deltas, least):
    """How many deltas are above ``least`` in size."""
    count = tl.zeros_like(deltas[0])
    for i in tl.static_range(len(deltas)):
        count += _flag(tl.abs(deltas[i]) > least)
    return count


@triton.jit
def _reinforced(deltas, numbers):
    count = _active(deltas, numbers[0])
    only, several = _flag(count == 1), _flag(count > 1)
    among = tl.where(count > 1, count, 1.0)
    total = tl.zeros_like(count)
    for i in tl.static_range(len(deltas)):
        own = deltas[i] * _flag(tl.abs(deltas[i]) > numbers[0])
        total += own * only * numbers[1 + i] + tl.div_rn(own * several, among)
    return total


@triton.jit
def _variance(deltas):
    """fp64 by Welford's updates, rounded to fp32."""
    mean = tl.zeros_like(deltas[0]).to(tl.float64)
    squares = mean
    for i in tl.static_range(len(deltas)):
        value = deltas[i].to(tl.float64)
        off = value - mean
        mean += off / (i + 1.0)
        squares += off * (value - mean)
    return (squares / (len(deltas) * 1.0)).to(tl.float32)


@triton.jit
def _select_and_erase(deltas, keep, numbers):
    total = tl.zeros_like(keep)
    for i in tl.static_range(len(deltas)):
        total += deltas[i] * keep
    merged = tl.zeros_like(keep)
    share = tl.zeros_like(keep)
    for i in tl.static_range(len(deltas)):
        own = deltas[i] * keep
        used = tl.where(tl.where(total >= 0, own, -own) > 0, numbers[i], 0.0)
        merged += own * used
        share += used
    return tl.div_rn(merged, tl.where(share < 1e-6, 1e-6, share))


@triton.jit
def _largest(deltas, scale):
    best = deltas[0]
    for i in tl.static_range(1, len(deltas)):
        best = tl.where(tl.abs(deltas[i]) > tl.abs(best), deltas[i], best)
    return best * scale


@triton.jit
def _agreed(deltas, numbers):
    total = tl.zeros_like(deltas[0])
    for i in tl.static_range(len(deltas)):
        total += deltas[i] * numbers[2 + 2 * i]
    votes = tl.zeros_like(total)
    for i in tl.static_range(len(deltas)):
        votes += _flag(tl.abs(deltas[i]) >= tl.abs(total - deltas[i]) * numbers[3 + 2 * i])
    return total * _flag(votes >= numbers[0]) * numbers[1]


@triton.jit
def _picked(deltas, place):
    """The delta of that number, which no kernel is compiled for."""
    chosen = deltas[0]
    for i in tl.static_range(1, len(deltas)):
        chosen = tl.where(place == i, deltas[i], chosen)
    return chosen


@triton.jit
def _block(
    addresses, numbers, rule, factors, cols, start, end, origin,
    FORMULA: tl.constexpr, CODES: tl.constexpr, OUT: tl.constexpr, MODE: tl.constexpr,
    WIDE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One BLOCK of outputs; returns how many of them, lane by lane, are NaN or infinite."""
    K: tl.constexpr = len(CODES) - 1
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < end
    index = origin + offsets
    if FORMULA == ZERO:
        made = tl.zeros([BLOCK], tl.float32)
    else:
        base = fetch(addresses[0], offsets, mask, CODES[0], ALIGNED, MASKED)
        deltas = ()
        for i in tl.static_range(K):
            x = fetch(addresses[1 + i], offsets, mask, CODES[1 + i], ALIGNED, MASKED)
            deltas = deltas + (x - base,)
        if FORMULA == NEAR_SWAP:
            made = _near_swap(x, base, numbers[0])
        elif FORMULA == ACTIVE:
            made = _flag(_active(deltas, numbers[0]) == numbers[1])
        elif FORMULA == REINFORCED:
            made = base + _reinforced(deltas, numbers)
        elif FORMULA == LARGEST:
            made = base + _largest(deltas, numbers[0])
        elif FORMULA == AGREED:
            made = base + _agreed(deltas, numbers)
        elif FORMULA == IMPORTANCE or FORMULA == FUSE:
            if WIDE:
                row = index // cols
            else:
                row = (index.to(tl.uint32) // cols.to(tl.uint32)).to(tl.int64)
            factor = tl.load(factors + row, mask=mask, other=0.0)
            made = tl.abs(deltas[0]) * factor
            if FORMULA == FUSE:
                made = base + deltas[0] * _flag(made >= numbers[0])
        elif FORMULA == VARIANCE:
            made = _variance(deltas)
        else:
            keep = tl.full([BLOCK], 1.0, tl.float32)
            if MODE != KEEP_ALL:
                keep = _flag(
                    survives(
                        _variance(deltas), origin + start, index, rule[0], rule[1], rule[2],
                        rule[3], rule[4], MODE, WIDE, BLOCK,
                    )
                )  # fmt: skip
            if FORMULA == VARIED:
                made = keep
            elif FORMULA == VARIED_DELTA:
                made = _picked(deltas, numbers[0]) * keep
            else:
                made = base + _select_and_erase(deltas, keep, numbers)
    return put(addresses[1 + K], offsets, mask, made, OUT, ALIGNED, MASKED)


@triton.jit
def pointwise_kernel(
    table, owners, numbers, rules, factors, origins, bad_counts, cols,
    FORMULA: tl.constexpr, NUMBERS: tl.constexpr, CODES: tl.constexpr, OUT: tl.constexpr,
    MODE: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, HEAD: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """CODES: the base, then k inputs. numbers: fp32 (segments, NUMBERS). rules: int64 (segments,
    RULE). factors: fp32, one for each ``cols`` elements from flat index 0 on. origins: int64
    (segments,), the flat index of element 0.
    """
    K: tl.constexpr = len(CODES) - 1
    TAIL: tl.constexpr = BLOCK // 4
    segment, row, begin, end = locate(table, owners, HEAD + K + 2, CHUNK)
    origin = tl.load(origins + segment)
    addresses = ()
    for i in tl.static_range(K + 2):
        addresses = addresses + (tl.load(row + HEAD + i),)
    given = ()
    for i in tl.static_range(NUMBERS):
        given = given + (tl.load(numbers + segment * NUMBERS + i),)
    rule = load_rule(rules + segment * RULE, MODE, WIDE)
    whole = begin + (end - begin) // BLOCK * BLOCK
    bad = tl.zeros([BLOCK], tl.int32)
    for step in range(0, whole - begin, BLOCK):
        start = begin + step
        bad += _block(
            addresses, given, rule, factors, cols, start, end, origin, FORMULA, CODES, OUT, MODE,
            WIDE, ALIGNED, BLOCK, False,
        )  # fmt: skip
    tail_bad = tl.zeros([TAIL], tl.int32)  # in narrow steps, as in combine_kernel
    for step in range(0, end - whole, TAIL):
        start = whole + step
        tail_bad += _block(
            addresses, given, rule, factors, cols, start, end, origin, FORMULA, CODES, OUT, MODE,
            WIDE, ALIGNED, TAIL, True,
        )  # fmt: skip
    count = tl.sum(bad, 0) + tl.sum(tail_bad, 0)
    tally(bad_counts + segment, count)


# --- on the host --------------------------------------------------------------------------------


def block(inputs: int, lanes: int) -> int:
    """Elements of one step: all deltas of an entry are held at a time, sce with fp64 numbers."""
    return (per_lane(inputs) // 2 if inputs <= 4 else 2) * lanes


class PointwiseBatch:
    """`pointwise` of many tensors by one formula, one launch per mix of dtypes, as often as numbers
    are given.

    Checks and tables are made once; the tensors must keep their memory.
    """

    def __init__(
        self,
        formula: str,
        inputs: Sequence[Sequence[torch.Tensor]],
        bases: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        *,
        origins: Sequence[int] | None = None,
    ) -> None:
        if formula not in FORMULAS:
            raise ValueError(f"no formula '{formula}'")
        self._shape = FORMULAS[formula]
        self._origins = [0] * len(outs) if origins is None else list(origins)
        self._rows: list[list[torch.Tensor]] = []
        self._keys: list[tuple[tuple[int, ...], int, bool, bool]] = []
        for xs, base, out, origin in zip(inputs, bases, outs, self._origins, strict=True):
            check(xs, base, out)
            if self._shape.inputs and len(xs) != self._shape.inputs:
                raise ValueError("another number of inputs than the formula has")
            row = [base, *xs, out]
            wide = origin + out.numel() > 1 << 32
            self._rows.append(row)
            self._keys.append((codes(row[:-1]), codes(row[-1:])[0], wide, aligned(row)))
        self._groups = Groups(self._rows)

    def run(
        self,
        numbers: Sequence[Sequence[float]],
        *,
        selection: Selection | None = None,
        factors: NDArray[np.float32] | None = None,
        cols: int = 1,
    ) -> torch.Tensor:
        """Launches, does not wait; returns the NaN/Inf counts, int64 on the device.

        ``factors``: one for each ``cols`` elements of the whole tensor. They and ``selection`` are
        of one tensor, and so must the batch be.
        """
        rows = self._rows
        bad = torch.zeros(len(rows), dtype=torch.int64, device=rows[0][0].device if rows else None)
        for row, given in zip(rows, numbers, strict=True):
            if len(given) != self._shape.numbers + (len(row) - 2) * self._shape.per_input:
                raise ValueError("other numbers than the formula has")
        if self._shape.by_row != (factors is not None):
            raise ValueError("one factor for each row is needed, where the formula has any")
        keys = [key if row[0].numel() else None for key, row in zip(self._keys, rows, strict=True)]
        for key, members in partition(keys).items():
            if key is None:
                continue
            kinds, kind, wide, straight = key
            batch = self._groups.of(members)
            device = batch.table.device
            mode, rule = rule_of(selection or Selection(), wide)
            # Never empty: the kernel gets an address.
            own = np.array([[*numbers[i], 0.0] for i in members], np.float32)
            by_row = np.zeros(1, np.float32) if factors is None else factors.astype(np.float32)
            counts = torch.zeros(len(members), dtype=torch.int64, device=device)
            launch(
                pointwise_kernel,
                batch.chunks,
                device,
                batch.table,
                batch.owners,
                upload(own, device),
                upload(np.array([rule] * len(members), dtype=np.int64), device),
                upload(by_row, device),
                upload(np.array([self._origins[i] for i in members], dtype=np.int64), device),
                counts,
                cols,
                FORMULA=self._shape.code,
                NUMBERS=own.shape[1],
                CODES=kinds,
                OUT=kind,
                MODE=mode,
                WIDE=wide,
                ALIGNED=straight,
                CHUNK=CHUNK,
                BLOCK=block(len(kinds) - 1, lanes()),
                HEAD=HEAD,
                RULE=RULE,
                registers=MOST_REGISTERS,
            )
            bad.index_copy_(0, batch.members, counts)
        return bad


@dataclass(frozen=True)
class Computed:
    """What `_C.pointwise` gives: a tensor that is computed where it is wanted, once for each call.

    ``origin``: the flat index of the first element, of a piece of a tensor; ``cols``: how many
    elements have one factor.
    """

    formula: str
    inputs: Sequence[torch.Tensor]
    base: torch.Tensor
    numbers: Sequence[float] = ()
    selection: Selection | None = None
    factors: NDArray[Any] | None = None
    origin: int = 0
    cols: int = 1

    def into(self, out: torch.Tensor) -> int:
        """Writes it with one rounding, waits; returns how many outputs are NaN or infinite."""
        batch = PointwiseBatch(
            self.formula, [self.inputs], [self.base], [out], origins=[self.origin]
        )
        made = batch.run(
            [self.numbers], selection=self.selection, factors=self.factors, cols=self.cols
        )
        return int(made[0])

    def tensor(self) -> torch.Tensor:
        """In device memory of its own, exactly: fp32, or bf16 where all are 0 or 1."""
        is_mask = FORMULAS[self.formula].is_mask
        dtype = torch.bfloat16 if is_mask else torch.float32
        out = torch.empty(self.base.numel(), dtype=dtype, device=self.base.device)
        self.into(out)
        return out


def held(tensor: torch.Tensor | Computed) -> torch.Tensor:
    return tensor.tensor() if isinstance(tensor, Computed) else tensor
