"""How two checkpoints differ, tensor by tensor: ``fastmerge diff`` and `compare`.

Streams over memory maps in tiles, so that memory stays at a few MB a thread for any model size; of
models by URL a few tensors are in memory, those that come next are on their way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmerge import _C
from fastmerge.collector import PLANNING, rarely_collected
from fastmerge.dtypes import DType
from fastmerge.errors import ResourceError, argument
from fastmerge.models.model import ReadsAhead, as_numbers
from fastmerge.models.series import natural

if TYPE_CHECKING:
    from fastmerge.models.model import Model

Array = NDArray[Any]

# A tile's temporaries take 64 KiB each: they stay in the cache, and below 128 KiB the allocator
# reuses memory where it would map and clear new pages (4.7 against 11 ns an element).
_TILE = 1 << 14
_SPAN = 64 * _TILE  # one thread's turn
_AHEAD_BYTES = 128 << 20  # of each model by URL
_PACKED = 3 << 16  # stored entries unpacked at once: whole elements of 4 and 6 bits


@dataclass(frozen=True)
class TensorDifference:
    """One tensor in A against the same one in B. ``None`` where a figure has no meaning for the
    types.
    """

    name: str
    shape: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    count: int  # elements
    changed: int  # elements whose bits differ (whose values differ, where the types do)
    max_abs: float | None  # largest |a - b|
    mean_abs: float | None  # mean |a - b|
    # Most representable steps between a and b, where both have one 16- or 32-bit float type.
    max_ulps: int | None
    relative: float | None  # |a - b| / |a|, Euclidean norms
    cosine: float | None  # <a, b> / (|a| |b|)
    nonfinite: (
        int  # changed elements that are NaN or infinite in A or B; left out of max, mean and ulps
    )

    @property
    def counted(self) -> bool:
        """Whether ``changed`` was counted. Of two types of which one has no numbers here (8 bits
        and fewer), every element passes for changed, whatever it stands for.
        """
        return self.dtype_a == self.dtype_b or self.max_abs is not None

    @property
    def changed_fraction(self) -> float:
        return self.changed / self.count if self.count else 0.0


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; tensors in natural order: layer 2 before layer 10."""

    tensors: tuple[TensorDifference, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # name, shape in A, in B

    @property
    def same(self) -> bool:
        """Same names, shapes, types and bits."""
        return not (self.only_in_a or self.only_in_b or self.reshaped) and all(
            tensor.changed == 0 and tensor.dtype_a == tensor.dtype_b for tensor in self.tensors
        )

    def largest(self, count: int) -> tuple[TensorDifference, ...]:
        """The ``count`` tensors of largest max_abs, those with non-finite changes first."""

        def size(tensor: TensorDifference) -> tuple[bool, float, int]:
            return bool(tensor.nonfinite), tensor.max_abs or 0.0, tensor.changed

        return tuple(sorted(self.tensors, key=size, reverse=True)[:count])

    def verdict(self) -> str:
        """One line on the whole."""
        if self.same:
            return f"the same: {len(self.tensors)} tensors, every bit"
        changed = sum(tensor.changed for tensor in self.tensors)
        count = sum(tensor.count for tensor in self.tensors)
        share = f" ({changed / count:.2%})" if count else ""
        differ = sum(tensor.changed > 0 for tensor in self.tensors)
        text = (
            f"{differ} of {len(self.tensors)} shared tensors differ, "
            f"in {changed} of {count} elements{share}"
        )
        whole = sum(not tensor.counted for tensor in self.tensors)
        if whole:
            text += f"; {whole} of them, of types that are not compared, are counted whole"
        apart = len(self.only_in_a) + len(self.only_in_b) + len(self.reshaped)
        return text + (
            f"; {apart} more are in one model only or have another shape" if apart else ""
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        tensors = tuple({**vars(tensor)} for tensor in self.tensors)
        return {"same": self.same, **asdict(replace(self, tensors=())), "tensors": tensors}


class _Sums(NamedTuple):
    """What is counted over a tile, a span, a tensor."""

    changed: int = 0
    total_abs: float = 0.0
    total_square: float = 0.0
    max_abs: float = 0.0
    max_ulps: int = 0
    nonfinite: int = 0

    def added(self, other: _Sums) -> _Sums:
        return _Sums(
            self.changed + other.changed,
            self.total_abs + other.total_abs,
            self.total_square + other.total_square,
            max(self.max_abs, other.max_abs),
            max(self.max_ulps, other.max_ulps),
            self.nonfinite + other.nonfinite,
        )


def compare(a: Model, b: Model, *, threads: int) -> Comparison:
    """Compares every tensor that A and B share by name and shape; the same result for any
    ``threads``. Raises ModelError where one of them changes meanwhile.
    """
    with rarely_collected(PLANNING):
        found = differences(a, b, threads=threads)
        tensors = tuple(sorted(found, key=lambda tensor: natural(tensor.name)))
    for model in (a, b):
        model.check_unchanged()
    return Comparison(
        tensors,
        tuple(name for name in a.tensors if name not in b.tensors),
        tuple(name for name in b.tensors if name not in a.tensors),
        tuple(
            (name, entry.shape, b.tensors[name].shape)
            for name, entry in a.tensors.items()
            if name in b.tensors and entry.shape != b.tensors[name].shape
        ),
    )


def differences(a: Model, b: Model, *, threads: int) -> Iterator[TensorDifference]:
    """The shared tensors' differences, one by one in A's file order."""
    try:
        pool = _C.Pool(threads)
    except RuntimeError as error:
        raise ResourceError(
            f"{argument('threads')}: no room for {threads} threads ({error})"
        ) from error
    shapes = {name: entry.shape for name, entry in b.tensors.items()}
    shared = [name for name, entry in a.tensors.items() if shapes.get(name) == entry.shape]
    for model in (a, b):
        if isinstance(model, ReadsAhead):
            model.expect(shared, _AHEAD_BYTES)
    with ThreadPoolExecutor(threads) as workers:
        for name in shared:
            yield _difference(a, b, name, pool, workers)
            a.drop(name)
            b.drop(name)


def _difference(
    a: Model, b: Model, name: str, pool: _C.Pool, workers: ThreadPoolExecutor
) -> TensorDifference:
    entry_a, entry_b = a.tensors[name], b.tensors[name]
    types = entry_a.dtype, entry_b.dtype
    view_a, view_b = a.view(name), b.view(name)
    stored_a, stored_b = _stored(view_a, types[0]), _stored(view_b, types[1])
    has_values = all(t.numpy for t in types)
    sums = _Sums()
    if has_values and entry_a.count <= _SPAN:  # to hand it over takes longer than 10 000 elements
        sums = _span(stored_a, stored_b, 0, types)
    elif has_values:
        spans = range(0, entry_a.count, _SPAN)
        for span in workers.map(lambda i: _span(stored_a, stored_b, i, types), spans):
            sums = sums.added(span)
    elif types[0] is types[1]:  # 8-bit and smaller floats: only whether the bytes are the same
        sums = _Sums(changed=_other_bits(stored_a, stored_b, types[0]))
    else:
        sums = _Sums(changed=entry_a.count)
    gram = None
    if all(t.mergeable for t in types):
        views = zip((view_a, view_b), types, strict=True)
        gram = _C.gram(pool, [v if t.kernels else _C.narrowed(v) for v, t in views])
    return TensorDifference(
        name=name,
        shape=entry_a.shape,
        dtype_a=types[0].code,
        dtype_b=types[1].code,
        count=entry_a.count,
        changed=sums.changed,
        max_abs=sums.max_abs if has_values else None,
        mean_abs=sums.total_abs / max(entry_a.count - sums.nonfinite, 1) if has_values else None,
        max_ulps=sums.max_ulps if types[0] is types[1] and types[0].kernels else None,
        relative=None if gram is None else _relative(gram, sums),
        cosine=None if gram is None else _cosine(gram),
        nonfinite=sums.nonfinite,
    )


def _stored(view: _C.View, dtype: DType) -> Array:
    """The view's memory as stored: bfloat16 as uint16, what NumPy does not subtract as its bits,
    types of 4 and 6 bits packed. ``view`` must outlive it.
    """
    memory = np.ctypeslib.as_array((ctypes.c_ubyte * view.nbytes).from_address(view.address))
    bits = "u1" if dtype.bits % 8 else f"u{dtype.bits // 8}"
    return memory.view(dtype.numpy or bits)


def _other_bits(stored_a: Array, stored_b: Array, dtype: DType) -> int:
    """How many elements of a type that NumPy does not subtract are stored otherwise."""
    changed = 0
    for i in range(0, stored_a.size, _PACKED):
        a, b = (_elements(stored[i : i + _PACKED], dtype) for stored in (stored_a, stored_b))
        changed += int(np.count_nonzero(a != b))
    return changed


def _elements(stored: Array, dtype: DType) -> Array:
    """An entry an element, where they may be packed."""
    if dtype.bits % 8 == 0:
        return stored
    bits = np.unpackbits(stored, bitorder="little").reshape(-1, dtype.bits)
    return np.packbits(bits, axis=1, bitorder="little")[:, 0]


def _span(stored_a: Array, stored_b: Array, begin: int, types: tuple[DType, DType]) -> _Sums:
    sums = _Sums()
    for i in range(begin, min(begin + _SPAN, len(stored_a)), _TILE):
        sums = sums.added(_tile(stored_a[i : i + _TILE], stored_b[i : i + _TILE], types))
    return sums


def _tile(stored_a: Array, stored_b: Array, types: tuple[DType, DType]) -> _Sums:
    same_type = types[0] is types[1]
    bits = f"u{stored_a.itemsize}"
    if same_type and np.array_equal(stored_a.view(bits), stored_b.view(bits)):
        return _Sums()  # copied tensors, most norms of a fine-tune: 30 times as fast as the sums
    a, b = as_numbers(stored_a, types[0]), as_numbers(stored_b, types[1])
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(a - b)
        largest = float(gap.max())
    if same_type:
        differs = stored_a.view(bits) != stored_b.view(bits)
    else:
        differs = (a != b) & ~(np.isnan(a) & np.isnan(b))
    steps = _ulps(stored_a, stored_b) if same_type and types[0].kernels else None
    if np.isfinite(largest):
        total, nonfinite = float(gap.sum(dtype=np.float64)), 0
        gap = gap.astype(np.float64)
    else:
        usable = np.isfinite(a) & np.isfinite(b)
        # float64: two finite float32 values may be further apart than float32 can say.
        with np.errstate(invalid="ignore"):  # of two infinities
            gap = np.where(usable, np.abs(a.astype(np.float64) - b), 0.0)
        steps = None if steps is None else np.where(usable, steps, 0)
        nonfinite = int(np.count_nonzero(differs & ~usable))
        total, largest = float(gap.sum()), float(gap.max())
    with np.errstate(over="ignore"):  # of float64: then there is no relative difference
        total_square = float(gap @ gap)
    return _Sums(
        changed=int(np.count_nonzero(differs)),
        total_abs=total,
        total_square=total_square,
        max_abs=largest,
        max_ulps=0 if steps is None else int(steps.max()),
        nonfinite=nonfinite,
    )


def _ulps(stored_a: Array, stored_b: Array) -> Array:
    """Representable steps between a and b: float bits, read as sign and magnitude, count them in
    order.
    """
    steps = _ordered(stored_a)
    steps -= _ordered(stored_b)
    return np.abs(steps, out=steps)


def _ordered(stored: Array) -> Array:
    bits = 8 * stored.itemsize
    wide: Array = stored.view(f"i{stored.itemsize}").astype(np.int32 if bits == 16 else np.int64)
    sign = wide >> bits - 1  # -1 or 0: x ^ -1 - -1 negates. np.where would take four times as long
    wide &= (1 << bits - 1) - 1
    wide ^= sign
    wide -= sign
    return wide


def _relative(gram: NDArray[np.float64], sums: _Sums) -> float | None:
    """None where A is all zeros, or either holds NaN or infinity."""
    if not np.isfinite(gram).all() or gram[0, 0] == 0 or sums.nonfinite:
        return None
    return float(np.sqrt(sums.total_square / gram[0, 0]))


def _cosine(gram: NDArray[np.float64]) -> float | None:
    """None where either tensor is all zeros or holds NaN or infinity."""
    if not np.isfinite(gram).all():
        return None
    norm = float(np.sqrt(gram[0, 0]) * np.sqrt(gram[1, 1]))
    if norm == 0:
        return None
    return float(np.clip(gram[0, 1] / norm, -1.0, 1.0))
