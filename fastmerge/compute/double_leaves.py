"""Leaves in float64, for `compute.doubles`: what `compute.leaves` makes of them in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fastmerge import _C
from fastmerge.compute.cpu import CpuBackend
from fastmerge.compute.doubles import DoubleBackend, Numbers, Read, parts, widened
from fastmerge.compute.leaves import lengthened, thin, view_of
from fastmerge.methods.types import Float64
from fastmerge.tree.nodes import MEAN, Leaf, LowRank, Node, Rows, Stored

Fetch = Callable[[Stored], _C.View]


def numbers_of(leaf: Leaf, backend: CpuBackend, fetch: Fetch) -> Numbers:
    """The leaf's elements; it must not be made from merges. Codes are the float32 numbers that they
    stand for.
    """
    if isinstance(leaf, LowRank):
        return _low_rank(leaf, backend, fetch)
    if isinstance(leaf, Rows):
        sources = [source for source in leaf.sources if isinstance(source, Leaf)]
        return gathered(leaf, {own: numbers_of(own, backend, fetch) for own in sources})
    return widened(view_of(leaf, backend, fetch), backend)


def _low_rank(leaf: LowRank, backend: CpuBackend, fetch: Fetch) -> Numbers:
    base = numbers_of(leaf.base, backend, fetch)
    left, right = (factor.astype(np.float64) for factor in thin(leaf, backend, fetch))
    rows, rank = left.shape[-2:]
    cols = right.shape[-1]
    left, right = left.reshape(-1, rows, rank), right.reshape(-1, rank, cols)

    def product(matrix: int, begin: int, end: int) -> Float64:
        """Rows of one, term by term: a library's product has other bits on other machines."""
        total = np.zeros((end - begin, cols))
        for k in range(rank):
            total += left[matrix, begin:end, k, None] * right[matrix, k]
        return total

    def of_rows(begin: int, end: int) -> Float64:
        made = np.empty((end - begin, cols))
        for matrix in range(begin // rows, -(-end // rows)):
            first, last = max(begin, matrix * rows), min(end, (matrix + 1) * rows)
            own = product(matrix, first - matrix * rows, last - matrix * rows)
            made[first - begin : last - begin] = own
        return base.read(begin * cols, end * cols).reshape(-1, cols) + leaf.scale * made

    summed = Numbers(base.count, _by_rows(of_rows, cols))
    if leaf.magnitude is None:
        return summed
    vectors = lengthened(leaf, rows, cols)
    squares = DoubleBackend(backend).gram([summed], None, vectors).reshape(-1)
    lengths = widened(fetch(leaf.magnitude), backend).read(0, vectors.count)
    with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros: NaN, which is counted
        factors = lengths / np.sqrt(squares)

    def of_lengths(begin: int, end: int) -> Float64:
        each = factors if leaf.transposed else factors[begin:end, None]
        return of_rows(begin, end) * each

    return Numbers(base.count, _by_rows(of_lengths, cols))


def gathered(leaf: Rows, sources: Mapping[Node, Numbers]) -> Numbers:
    """The rows of ``leaf`` from its sources."""
    views = [sources[source] for source in leaf.sources]
    cols = leaf.shape[1] if len(leaf.shape) > 1 else 1
    rows = leaf.rows

    def row(source: int, at: int) -> Float64:
        return views[source].read(at * cols, (at + 1) * cols)

    means = [sum((row(*each) for each in terms), np.zeros(cols)) / len(terms)
             for terms in rows.means]  # fmt: skip

    def real(begin: int, end: int) -> Float64:
        made = np.zeros((end - begin, cols))
        for place in range(begin, end):
            source, at = int(rows.source[place]), int(rows.row[place])
            if source >= 0:
                made[place - begin] = row(source, at)
            elif source == MEAN:
                made[place - begin] = means[at]
        return made

    padding = np.zeros(cols)
    if rows.total > rows.real:
        for begin, end in parts(rows.real * cols, cols):
            padding += real(begin // cols, end // cols).sum(axis=0)
        padding /= max(rows.real, 1)

    def of_rows(begin: int, end: int) -> Float64:
        last = min(end, rows.real)
        made = np.empty((end - begin, cols))
        made[max(0, last - begin) :] = padding
        if begin < last:
            made[: last - begin] = real(begin, last)
        return made

    return Numbers(rows.total * cols, _by_rows(of_rows, cols))


def _by_rows(of_rows: Read, cols: int) -> Read:
    """Entries of a matrix, whose rows are made whole."""

    def read(begin: int, end: int) -> Float64:
        if begin == end:
            return np.zeros(0)
        first = begin // cols
        made: Float64 = of_rows(first, -(-end // cols)).reshape(-1)
        return made[begin - first * cols : end - first * cols]

    return read
