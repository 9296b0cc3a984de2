"""The primitives, the numbers of codes and the checksum of ``_C.pyi`` in NumPy, readable, slow.

Names and arguments follow fastmerge._C without the pool and the sink. Tensors are NumPy arrays:
float32, float16, or uint16 for the bits of bfloat16. What decides bits (deltas, masks, thresholds,
elections, random words) is computed exactly as the kernels do, in float32 and integers; everything
else is float64, or with ``arithmetic=np.float32`` the kernels' own operations in their order, so
that only the rounding to the output type is left to do (`round_to`).

Of float64 tensors, which the kernels do not take, all of it is float64: see `compute.doubles`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.methods.types import Float32, Float64
from fastmerge.primitives import FREQUENCY, WEIGHTED
from fastmerge.selection import (
    ALL,
    EVERY,
    MAGNITUDE,
    MIXED,
    RANDOM,
    RANKED,
    Selection,
    Sparsify,
    rank_bound,
)

Array = NDArray[Any]

_INFINITY_BITS = np.uint32(0x7F800000)
# Of float32 and float64: an integer of its size, and all bits but the sign's.
_BITS: dict[int, tuple[Any, Any]] = {
    4: (np.uint32, np.uint32((1 << 31) - 1)),
    8: (np.uint64, np.uint64((1 << 63) - 1)),
}


def bf16_to_f32(bits: NDArray[np.uint16]) -> Float32:
    """The float32 values of bfloat16 bit patterns; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: Float32) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even; a NaN keeps its sign and becomes quiet."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)
    quiet = bits | np.uint32(0x400000)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > _INFINITY_BITS
    return (np.where(is_nan, quiet, rounded) >> 16).astype(np.uint16)


def widen(tensor: Array) -> Array:
    """A tensor's values in float32; exact. float64 stays what it is."""
    if tensor.dtype == np.float64:
        return tensor
    return bf16_to_f32(tensor) if tensor.dtype == np.uint16 else tensor.astype(np.float32)


def round_to(values: Array, dtype: str) -> Array:
    """float32 or float64 values in storage type "BF16" (bits as uint16), "F16", "F32" or "F64",
    rounded once.
    """
    if dtype == "BF16":
        return f32_to_bf16(_to_odd(values) if values.dtype == np.float64 else values)
    with np.errstate(over="ignore"):
        return values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])


def _to_odd(values: Float64) -> Float32:
    """float64 values in float32, rounded to odd, after which a rounding to fewer bits cannot err
    (Boldo and Melquiond 2008).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        near = values.astype(np.float32)
        off = values - near
        even = (near.view(np.uint32) & 1) == 0
        other = np.nextafter(near, np.where(off > 0, np.inf, -np.inf).astype(np.float32))
    return np.where(even & (off != 0) & ~np.isnan(off), other, near)


def gram(inputs: Sequence[Array], base: Array | None = None, *, axis: int | None = None) -> Float64:
    """`_C.gram` of tensors of one shape."""
    vectors = [widen(x) for x in inputs]
    if base is not None:
        vectors = [widen(base), *(x - widen(base) for x in vectors)]
    stacked = np.stack(vectors).astype(np.float64)
    if axis is None:
        flat = stacked.reshape(len(vectors), -1)
        return np.asarray(flat @ flat.T)
    subscripts = "irc,jrc->rij" if axis == 1 else "irc,jrc->cij"
    return np.asarray(np.einsum(subscripts, stacked, stacked))


def fused_multiply_add(a: Float32, b: Float32, c: Float32) -> Float32:
    """a * b + c with one rounding to float32.

    The product is exact in float64; the sum is rounded to odd there, after which the second
    rounding cannot err (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    inexact = np.isfinite(total) & (error != 0)
    even = (total.view(np.int64) & 1) == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact & even, np.nextafter(total, toward), total).astype(np.float32)


def combine(
    inputs: Sequence[Array],
    coefficients: Float64,
    *,
    divisor: float | None = None,
    axis: int | None = None,
    wide: bool = False,
    arithmetic: type = np.float64,
) -> Array:
    """`_C.combine` of tensors of one shape; a wide one, as of float64, is float64 whatever the
    ``arithmetic``.
    """
    wide = wide or any(x.dtype == np.float64 for x in inputs)
    if wide:
        arithmetic = np.float64
    factors: Array = np.asarray(coefficients, np.float64)
    if not wide:
        factors = factors.astype(np.float32)
    if axis == 1:
        columns = [factors[:, i, None] for i in range(len(inputs))]
    else:
        columns = [factors[..., i] for i in range(len(inputs))]
    nonzero = sum((column != 0).astype(np.int64) for column in columns)
    # A single product keeps the sign of its zero; a sum starts from +0.
    start = np.where(nonzero == 1, np.float32(-0.0), np.float32(0.0))
    total: Array = np.broadcast_to(start, inputs[0].shape).astype(arithmetic)
    for tensor, column in zip(inputs, columns, strict=True):
        x = widen(tensor)
        each = np.broadcast_to(column, x.shape)
        added: Array
        if arithmetic is np.float32:
            added = fused_multiply_add(x, each, total)
        else:
            added = total + x.astype(np.float64, copy=False) * each
        total = np.where(each != 0, added, total)
    if divisor is None:
        return total
    return np.asarray(total / arithmetic(divisor if wide else np.float32(divisor)))


def magnitude_keys(tensor: Array, base: Array) -> Array:
    """Bits of |tensor - base|, flat, as uint32 (uint64 of float64): they order magnitudes, NaN
    above infinity.
    """
    return keys_of((widen(tensor) - widen(base)).ravel())


def keys_of(numbers: Array) -> Array:
    """Bits of the magnitudes of float32 (uint32) or float64 (uint64)."""
    unsigned, magnitude = _BITS[numbers.dtype.itemsize]
    return np.asarray(numbers.view(unsigned) & magnitude)


def mixed_indices(count: int, first: int = 0) -> NDArray[np.uint64]:
    """The 64-bit mixed indices of ``count`` flat indices from ``first`` on: murmur3's 32-bit
    finaliser over the low word.

    ``(fmix32(low ^ (high * 0x9E3779B9 mod 2**32)) << 32) | high``: a bijection on 64 bits,
    spatially even, and a plain 32-bit hash for tensors below 2**32 elements. (fmix32: Appleby,
    MurmurHash3.)
    """
    index = np.arange(first, first + count, dtype=np.uint64)
    high = index >> np.uint64(32)
    h: Array = (index ^ high * np.uint64(0x9E3779B9)).astype(np.uint32)
    h = (h ^ h >> 16) * np.uint32(0x85EBCA6B)
    h = (h ^ h >> 13) * np.uint32(0xC2B2AE35)
    h ^= h >> 16
    return h.astype(np.uint64) << np.uint64(32) | high


def philox_words(count: int, key: int, first: int = 0) -> NDArray[np.uint32]:
    """Word i % 4 of Philox4x32-10 at counter i // 4, for ``count`` elements from ``first`` on.

    (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11.)
    """
    begin, end = first // 4, -(-(first + count) // 4)
    counter = np.arange(begin, end, dtype=np.uint64)
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1 = counter & low32, counter >> shift
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low32
        c2, c3 = (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low32
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = np.stack([c0, c1, c2, c3], axis=1).ravel().astype(np.uint32)
    return words[first - 4 * begin : first - 4 * begin + count]


def order_of(tie_rule: int, count: int, first: int = 0) -> NDArray[np.uint64]:
    """By what ``count`` entries from the flat index ``first`` on count as larger where they tie."""
    if tie_rule == MIXED:
        return mixed_indices(count, first)
    return np.arange(first, first + count, dtype=np.uint64)


def survivors(selection: Selection, keys: Array, first: int = 0) -> NDArray[np.bool_]:
    """Which entries a selection keeps, given their magnitude keys; ``first``: the first one's flat
    index.
    """
    if selection.kind == MAGNITUDE:

        def above(bits: int, bound: int | None) -> NDArray[np.bool_]:
            if bound is None:
                return np.asarray(keys >= bits)
            tied = keys == bits
            if tied.any():  # of float64 few are, and their order takes longer than all else
                tied &= order_of(selection.tie_rule, len(keys), first) < bound
            return np.asarray((keys > bits) | tied)

        return above(selection.threshold_bits, selection.tie_bound) & ~above(
            selection.ceiling_bits, selection.ceiling_bound
        )
    if selection.kind == RANDOM:
        words = philox_words(len(keys), selection.key, first).astype(np.uint64)
        return np.asarray(words < np.uint64(selection.keep_below))
    if selection.kind == RANKED:
        begin, end = first // 8, -(-(first + len(keys)) // 8)
        bits = np.unpackbits(selection.mask.view(np.uint8)[begin:end], bitorder="little")
        return np.asarray(bits[first - 8 * begin :][: len(keys)] == 1)
    return np.ones(len(keys), np.bool_)


def drawn_mask(keys: Array, spec: Sparsify) -> NDArray[np.uint32]:
    """The words of a RANKED request's mask."""
    packed = np.packbits(drawn(keys, spec), bitorder="little")
    return np.pad(packed, (0, -len(packed) % 4)).view(np.uint32)


def drawn(keys: Array, spec: Sparsify, first: int = 0) -> NDArray[np.bool_]:
    """Which entries of whole vectors a RANKED request keeps: each vector sorted, each rank's bound
    beside its entry's word. ``first``: the first entry's flat index.
    """
    words = philox_words(len(keys), spec.key, first).astype(np.uint64)
    nan = keys_of(np.array(np.nan, f"f{keys.itemsize}"))
    slices = np.minimum(keys, nan).reshape(-1, spec.length, spec.stride)
    ties = np.broadcast_to(~mixed_indices(spec.length)[:, None], slices.shape)
    rising = np.lexsort((ties, slices), axis=1)  # positions, the smallest magnitude first
    bounds = np.array([rank_bound(spec, rank) for rank in range(spec.length)], dtype=np.uint64)
    of = np.empty(slices.shape, np.uint64)
    np.put_along_axis(of, rising, np.broadcast_to(bounds[:, None], of.shape), axis=1)
    return np.asarray(words < of.ravel())


def select(inputs: Sequence[Array], base: Array, specs: Sequence[Sparsify]) -> list[Selection]:
    """`_C.select`, by a sort."""
    return [_select(magnitude_keys(x, base), s) for x, s in zip(inputs, specs, strict=True)]


def _cut(keys: NDArray[np.uint32], rank: int, tie_rule: int) -> tuple[int, int | None]:
    """The threshold and the tie bound that leave the ``rank`` largest, at least one."""
    threshold = int(np.sort(keys)[len(keys) - rank])
    tied = np.flatnonzero(keys == threshold)
    wanted = rank - int(np.count_nonzero(keys > threshold))
    if wanted == len(tied) or tie_rule == EVERY:
        return threshold, None
    order = mixed_indices(len(keys))[tied] if tie_rule == MIXED else tied
    return threshold, int(np.sort(order)[wanted - 1]) + 1


def _select(keys: NDArray[np.uint32], spec: Sparsify) -> Selection:
    count = len(keys)
    largest = int(_BITS[keys.itemsize][1])
    found = Selection.asked(spec, count)._replace(ceiling_bits=largest)
    if spec.kind == MAGNITUDE and spec.keep == 0:
        found = found._replace(threshold_bits=largest, tie_bound=0, kept=0)
    elif spec.kind == MAGNITUDE:
        found = found._replace(kept=spec.keep)
        threshold, bound = _cut(keys, spec.skip + spec.keep, spec.tie_rule)
        found = found._replace(threshold_bits=threshold, tie_bound=bound)
        if spec.skip:
            ceiling, bound = _cut(keys, spec.skip, spec.tie_rule)
            found = found._replace(ceiling_bits=ceiling, ceiling_bound=bound)
    elif spec.kind == RANKED:
        found = found._replace(mask=drawn_mask(keys, spec))
    kept = survivors(found, keys)
    if spec.tie_rule != EVERY:
        found = found._replace(kept=int(np.count_nonzero(kept)))
    if spec.kind != ALL and spec.rescale and found.kept < count:
        kind = np.dtype(f"f{keys.itemsize}").type
        size = keys.view(kind).astype(np.float64)
        before, after = size.sum(), size[kept].sum()
        if not (before < 1e-7 or after < 1e-7):  # mergekit 0.1.5 leaves such deltas alone
            found = found._replace(rescale=float(kind(before / after)))
    return found


def consensus(
    inputs: Sequence[Array],
    base: Array,
    weights: Sequence[float],
    selections: Sequence[Selection],
    *,
    elect: bool,
    normalize: bool,
    scale: float = 1.0,
    votes: int = WEIGHTED,
    counted: bool = False,
    arithmetic: type = np.float64,
    first: int = 0,
) -> Array:
    """`_C.consensus`; ``first``: the flat index of the first entry."""
    origin = widen(base)
    kind = origin.dtype.type
    w = np.asarray(weights, kind)
    deltas = []
    for x, weight, selection in zip(inputs, w, selections, strict=True):
        delta = widen(x) - origin
        if selection.kind != ALL:
            kept = survivors(selection, magnitude_keys(x, base), first).reshape(delta.shape)
            delta = delta * kept.astype(np.float32)
        if selection.rescale != 1:
            delta = delta * kind(selection.rescale)
        deltas.append(delta * weight if votes == WEIGHTED or not elect else delta)
    zero = np.zeros(origin.shape, kind)
    total = zero
    for delta in deltas:
        sign = np.sign(np.where(np.isnan(delta), 0, delta))
        total = total + (sign if votes == FREQUENCY else delta)
    majority = np.where(total >= 0, np.float32(1), np.float32(-1))
    merged: Array = zero.astype(arithmetic)
    share: Array = merged
    for delta, weight in zip(deltas, w, strict=True):
        agrees = (np.sign(delta) == majority if elect else zero == 0).astype(np.float32)
        late = np.float32(1) if votes == WEIGHTED or not elect else weight
        merged = merged + delta * late * agrees
        share = share + (np.float32(1) if counted else weight) * agrees
    if normalize:
        empty = share == 0 if elect else np.abs(share) < kind(1e-8)
        merged = merged / np.where(empty, arithmetic(1), share)
    if scale != 1:
        merged = merged * arithmetic(kind(scale))
    return np.asarray(origin + merged)


def _table(exponent_bits: int, mantissa_bits: int, bias: int) -> Float32:
    """What each code of a small float stands for: sign, exponent, mantissa, with subnormals."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = codes & ((1 << mantissa_bits) - 1)
    exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    normal = exponent > 0
    size = np.ldexp(
        mantissa + normal * float(1 << mantissa_bits),
        np.maximum(exponent, 1) - bias - mantissa_bits,
    )
    negative = codes >> (exponent_bits + mantissa_bits)
    return np.asarray(np.where(negative, -size, size), np.float32)


def _codes() -> dict[str, Float32]:
    e4m3, e5m2 = _table(4, 3, 7), _table(5, 2, 15)
    e4m3[[0x7F, 0xFF]] = np.nan
    for sign in (0, 0x80):
        e5m2[sign + 0x7C] = -np.inf if sign else np.inf
        e5m2[sign + 0x7D : sign + 0x80] = np.nan
    return {"e4m3": e4m3, "e5m2": e5m2, "mxfp4": _table(2, 1, 1)}


# By coding (arXiv:2209.05433, tables 1 and 2; OCP Microscaling Formats v1.0, section 5.3).
CODES = _codes()


def dequantised(codes: Array, scales: Array, coding: str, block: tuple[int, int]) -> Float32:
    """`_C.dequantised`: codes of shape (..., rows, cols) and scales of (..., down, across); of
    mxfp4, (..., cols, rows / 32, 16) and (..., cols, rows / 32), both bytes.
    """
    if coding == "mxfp4":
        pairs = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], 32)
        with np.errstate(over="ignore"):
            powers = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None]
            made = CODES[coding][pairs] * powers
        transposed = made.reshape(*codes.shape[:-2], -1)
        return np.asarray(np.swapaxes(transposed, -1, -2), np.float32)
    rows, cols = codes.shape[-2:]
    wide = np.repeat(np.repeat(scales, block[0], axis=-2), block[1], axis=-1)
    return np.asarray(CODES[coding][codes] * wide[..., :rows, :cols], np.float32)


# --- checksums ---

_BLOCK_WORDS = 1024


def checksum(data: bytes) -> str:
    """The checksum of a tensor's bytes that fastmerge.json keeps: 32 hex digits."""
    words = np.zeros(-(-len(data) // (4 * _BLOCK_WORDS)) * _BLOCK_WORDS, "<u4")
    words.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
    # splitmix64 (Steele, Lea and Flood 2014) from state 0; integers wrap at 2^64
    z = np.arange(1, _BLOCK_WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys = z ^ (z >> np.uint64(31))
    sums = (words.reshape(-1, _BLOCK_WORDS).astype(np.uint64) * keys).sum(axis=1, dtype=np.uint64)
    text = len(data).to_bytes(8, "little") + sums.astype("<u8").tobytes()
    return hashlib.blake2b(text, digest_size=16).hexdigest()
