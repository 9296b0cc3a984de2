"""Leaves that follow from stored tensors, as what the primitives read.

Nothing of a tensor's size is made: a leaf of rows is a table of their addresses; codes become
numbers, float64 float32, and adapted weights are computed a tile at a time. Only an adapter's
factors and rows that no file holds (means of several, padding, rows of codes and of adapted
embeddings) take the back end's bounded scratch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge import _C
from fastmerge.codings import Coding
from fastmerge.compute.cpu import CpuBackend, cpu
from fastmerge.dtypes import BY_CODE
from fastmerge.methods.types import Float32
from fastmerge.primitives import Vectors
from fastmerge.tree.nodes import (
    MEAN,
    ZERO,
    Dequantised,
    Leaf,
    LowRank,
    Made,
    Narrowed,
    Node,
    Rows,
    Stack,
    Stored,
)

_BLOCK_BYTES = 4 << 20  # of the rows that a mean of all of them decodes at a time


def view_of(leaf: Leaf, backend: CpuBackend, fetch: Callable[[Stored], _C.View]) -> _C.View:
    """The leaf's elements in row-major order, in its dtype.

    fetch: the memory of a stored tensor. The leaf must not be made from merges.
    """
    if isinstance(leaf, Stored):
        return fetch(leaf)
    if isinstance(leaf, Dequantised):
        return dequantised(leaf, fetch(leaf.codes), fetch(leaf.scales))
    if isinstance(leaf, Narrowed):
        return _C.narrowed(fetch(leaf.source))
    if isinstance(leaf, LowRank):
        return _low_rank(leaf, backend, fetch)
    if isinstance(leaf, Made):
        array = np.ascontiguousarray(leaf.make(), np.float32)
        assert array.shape == leaf.shape
        return _C.View(array.ctypes.data, array.size, leaf.dtype.code, array)
    assert isinstance(leaf, Rows)
    sources = [source for source in leaf.sources if isinstance(source, Leaf)]
    return gathered(leaf, backend, {own: view_of(own, backend, fetch) for own in sources})


def dequantised(leaf: Dequantised, codes: _C.View, scales: _C.View) -> _C.View:
    """The numbers of ``leaf`` from the memory of its codes and scales."""
    rows, cols, block = matrices(leaf.coding, leaf.shape)
    return _C.dequantised(
        leaf.coding.code,
        codes,
        scales,
        rows=rows,
        cols=cols,
        block_rows=block[0],
        block_cols=block[1],
    )


@lru_cache(maxsize=64)
def matrices(coding: Coding, shape: tuple[int, ...]) -> tuple[int, int, tuple[int, int]]:
    """Rows and columns of the matrices that a tensor of this shape is, and of their blocks."""
    rows, cols = (1, 1, *shape)[-2:]
    if coding.block is not None:
        return rows, cols, coding.block
    rows = max(1, math.prod(shape) // cols)  # one scale for all of them
    return rows, cols, (rows, cols)


def scale_fault(scales: _C.View) -> str | None:
    """What is wrong with scales: the first that is no finite number above 0."""
    bad = _C.bad_scale(scales)
    if bad is None:
        return None
    value = math.nan
    if scales.dtype != "RAW":
        value = float(cpu(1).array(scales.slice(bad, bad + 1))[0])
    return f"{value} at {bad}"


def _low_rank(leaf: LowRank, backend: CpuBackend, fetch: Callable[[Stored], _C.View]) -> _C.View:
    """The factors are widened to fp32 once, into scratch: (rows + cols) * rank numbers. DoRA takes
    a pass over the sum for its rows' lengths.
    """
    base = view_of(leaf.base, backend, fetch)
    left, right = thin(leaf, backend, fetch)
    parts = (base, backend.tensor(left), backend.tensor(right), leaf.rank, leaf.scale)
    if leaf.magnitude is None:
        return _C.low_rank(*parts, matrices=1 if left.ndim == 2 else len(left))
    vectors = lengthened(leaf, left.shape[0], right.shape[1])
    squares = backend.gram([_C.low_rank(*parts)], None, vectors).reshape(-1)
    factors = factors_of(backend.array(fetch(leaf.magnitude)), squares)
    return _C.low_rank(*parts, factors=factors, by_column=leaf.transposed)


def thin(
    leaf: LowRank, backend: CpuBackend, fetch: Callable[[Stored], _C.View]
) -> tuple[Float32, Float32]:
    """The factors whose product, times the scale, is added: fp32, (rows, rank) and (rank, cols);
    of all matrices of a stack with as many in front.
    """
    a, b = fetch(leaf.a), fetch(leaf.b)
    stack = leaf.stack
    if stack is None or stack.one is None:
        left, right = turned(leaf, backend.array(a), backend.array(b))
    else:
        size = leaf.rank * leaf.a.shape[1]
        own = a.slice(stack.one * size, (stack.one + 1) * size)
        left = backend.array(_every(b, stack, stack.one, leaf.b.shape[1])).reshape(-1, leaf.rank)
        right = backend.array(own).reshape(leaf.rank, -1)
    return np.ascontiguousarray(left), np.ascontiguousarray(right)


def turned(leaf: LowRank, a: Any, b: Any) -> tuple[Any, Any]:
    """The factors that are multiplied, of those stored: NumPy's arrays, or torch's tensors."""
    if leaf.stack is None:
        a, b = a.reshape(leaf.rank, -1), b.reshape(-1, leaf.rank)
    else:
        a = a.reshape(leaf.stack.matrices, leaf.rank, -1)
        b = b.reshape(-1, leaf.rank, leaf.stack.matrices).swapaxes(0, 2).swapaxes(1, 2)
    return (a.swapaxes(-2, -1), b.swapaxes(-2, -1)) if leaf.transposed else (b, a)


def _every(b: _C.View, stack: Stack, one: int, cols: int) -> _C.View:
    """The columns of B, as it is stored, that are of one matrix."""
    size = BY_CODE[b.dtype].bytes_for(1)
    column = np.arange(one, cols, stack.matrices, dtype=np.uint64)
    row = np.arange(stack.begin, stack.end, dtype=np.uint64)
    addresses = (b.address + size * (row[:, None] * cols + column)).ravel().astype(np.uint64)
    return _C.gathered(addresses, [b.dtype], np.zeros(addresses.size, np.uint8), 1, b.dtype, b)


def lengthened(leaf: LowRank, rows: int, cols: int) -> Vectors:
    """The rows (columns, where it is transposed) whose lengths DoRA sets."""
    return Vectors(0 if leaf.transposed else 1, rows, cols)


def factors_of(lengths: Float32, squares: NDArray[np.float64]) -> Float32:
    """What gives vectors of these squared lengths those ``lengths``; rounded once, to fp32."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros: NaN, which is counted
        found = lengths.reshape(-1).astype(np.float64) / np.sqrt(squares)
        return found.astype(np.float32)


def gathered(leaf: Rows, backend: CpuBackend, sources: Mapping[Node, _C.View]) -> _C.View:
    """The rows of ``leaf`` from the memory of its sources."""
    views = [_placed(sources[source], backend) for source in leaf.sources]
    cols = leaf.shape[1] if len(leaf.shape) > 1 else 1
    table = _Table(views, cols)
    rows = leaf.rows
    addresses, kinds = table.of(rows.source, rows.row)
    keep: list[object] = [views]
    made = len(rows.means) + (rows.total > rows.real)
    if made:
        extra, _ = backend.scratch(made * cols)
        keep.append(extra)
        _average(table, rows.means, extra, backend)
        at_mean = rows.source == MEAN
        addresses[at_mean] = extra.address + 4 * cols * rows.row[at_mean].astype(np.uint64)
        kinds[at_mean] = table.types.index("F32")
    types = table.types
    at_zero = rows.source == ZERO
    if at_zero.any():
        zeros = np.zeros(4 * cols, np.uint8)
        keep.append(zeros)
        addresses[at_zero] = zeros.ctypes.data
        kinds[at_zero] = types.index(leaf.dtype.code)  # zeros in every type
    if rows.total > rows.real:
        real = _C.gathered(addresses, types, kinds, cols, "F32", keep)
        last = made - 1
        _fill_mean(real, cols, extra.slice(last * cols, made * cols), backend)
        padding = rows.total - rows.real
        where = np.uint64(extra.address + 4 * cols * last)
        addresses = np.concatenate([addresses, np.full(padding, where)])
        kinds = np.concatenate([kinds, np.full(padding, types.index("F32"), np.uint8)])
    return _C.gathered(addresses, types, kinds, cols, leaf.dtype.code, keep)


def _placed(view: _C.View, backend: CpuBackend) -> _C.View:
    """The tensor at an address."""
    if not view.is_gathered:
        return view
    made, to = backend.scratch(view.count)
    backend.combine([view], np.ones(1), to)
    return made


class _Table:
    """Where the rows of several matrices lie."""

    def __init__(self, views: Sequence[_C.View], cols: int) -> None:
        self.views, self.cols = views, cols
        self.types = sorted({"F32", *(view.dtype for view in views)})
        self._kinds = np.array([self.types.index(view.dtype) for view in views], np.uint8)
        self._base = np.array([view.address for view in views], np.uint64)
        row_bytes = [BY_CODE[view.dtype].bytes_for(cols) for view in views]
        self._row_bytes = np.array(row_bytes, np.uint64)

    def of(
        self, source: NDArray[np.int32], row: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """The rows' addresses, and which of ``types`` they are stored as; anything where the source
        is none of the matrices.
        """
        which = np.maximum(source, 0)
        addresses = self._base[which] + row.astype(np.uint64) * self._row_bytes[which]
        return addresses, self._kinds[which]


def _average(
    table: _Table,
    means: Sequence[Sequence[tuple[int, int]]],
    out: _C.View,
    backend: CpuBackend,
) -> None:
    """Each mean of rows to its row of ``out``: fp32 sums in order, one division."""
    cols = table.cols
    begin = 0
    while begin < len(means):  # runs of as many terms are one sum of gathered matrices
        end = begin
        while end < len(means) and len(means[end]) == len(means[begin]):
            end += 1
        terms = np.array(means[begin:end], np.int64)  # (means, terms, 2)
        views = []
        for each in terms.transpose(1, 2, 0):
            addresses, kinds = table.of(each[0].astype(np.int32), each[1])
            views.append(_C.gathered(addresses, table.types, kinds, cols, "F32", table.views))
        to = _C.MemorySink(out.slice(begin * cols, end * cols))
        backend.combine(views, np.ones(len(views)), to, divisor=float(len(views)))
        begin = end


def _fill_mean(matrix: _C.View, cols: int, out: _C.View, backend: CpuBackend) -> None:
    """The mean row of a matrix to ``out``: a float64 sum, rounded once."""
    count = matrix.count // cols
    height = max(1, min(count, _BLOCK_BYTES // (4 * cols)))
    block = np.empty((height, cols), np.float32)
    total = np.zeros(cols)
    for begin in range(0, count, height):
        part = block[: min(height, count - begin)]
        to = _C.View(part.ctypes.data, part.size, "F32", part)
        view = matrix.slice(begin * cols, begin * cols + part.size)
        backend.combine([view], np.ones(1), _C.MemorySink(to))
        total += part.sum(axis=0, dtype=np.float64)
    mean = (total / max(count, 1)).astype(np.float32)
    source = _C.View(mean.ctypes.data, cols, "F32", mean)
    _C.copy(backend.pool, source, _C.MemorySink(out))
