"""Matrices of low rank by their factors, ``b @ a``: sums of them cut to a rank, and the nearest one
to the difference of two stored matrices.

Products with whole matrices are in float32 by NumPy's BLAS, factorisations in float64 by its
LAPACK; the bits depend on that library and on its number of threads, not on fastmerge's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastmerge import _C
from fastmerge.compute.reference import philox_words
from fastmerge.methods.types import Float32, Float64

OVERSAMPLING = 10  # Halko, Martinsson and Tropp, section 4.2: 5 or 10 directions beyond the rank
# Differences of fully tuned models have flat spectra: of 1024 x 1024 normal numbers at rank 16 the
# error is 0.6 % above the optimum without power iterations, 0.1 % with two.
POWER_ITERATIONS = 2
_TINY = 1e-13  # of squares: 3e-7 of lengths
_BLOCK_ENTRIES = 2 << 20  # 8 MiB of float32: two or three products with it while it is in cache


class Spectrum(NamedTuple):
    """``u @ diag(s) @ vt``: u (rows, k) and vt (k, cols) with orthonormal columns and rows, s (k,)
    falling; float64.
    """

    u: Float64
    s: Float64
    vt: Float64

    def cut(self, rank: int) -> Spectrum:
        """The ``rank`` largest singular values, with their vectors."""
        return Spectrum(self.u[:, :rank], self.s[:rank], self.vt[:rank])


# --- from factors ---


def spectrum_of_sum(bs: Sequence[Float64], factors_a: Sequence[Float64]) -> Spectrum:
    """The SVD of ``sum_i bs[i] @ factors_a[i]`` without forming it; exact but for rounding.

    bs: (rows, r_i); factors_a: (r_i, cols); R = sum of the r_i. The stacked factors are orthogonal
    times triangular, B = Q S and A^T = P T (QR), so that B A = Q (S T^T) P^T with a core of at most
    R x R: O((rows + cols) R^2) operations where the SVD of the sum takes O(rows cols min(rows,
    cols)). As many singular values as the core has: min(R, rows, cols).
    """
    q, s = np.linalg.qr(np.concatenate(bs, axis=1))
    p, t = np.linalg.qr(np.concatenate(factors_a, axis=0).T)
    u, values, vt = np.linalg.svd(s @ t.T, full_matrices=False)
    return Spectrum(q @ u, values, vt @ p.T)


def spectrum_of(matrix: Float64) -> Spectrum:
    """The SVD of a whole matrix (rows, cols), by LAPACK: O(rows cols min(rows, cols)) operations.
    Raises numpy.linalg.LinAlgError where it does not converge, as with NaN.
    """
    return Spectrum(*np.linalg.svd(matrix, full_matrices=False))


# --- from stored matrices ---


class Difference:
    """``tuned - base``, a matrix (rows, cols) in float32 that is made a block of rows at a time.

    The views have rows * cols elements each, of types that have kernels.
    """

    def __init__(
        self, pool: _C.Pool, tuned: _C.View, base: _C.View, shape: tuple[int, int]
    ) -> None:
        self._pool, self._tuned, self._base = pool, tuned, base
        self.shape = shape

    def blocks(self) -> Iterator[tuple[slice, Float32]]:
        """The rows of a block, and the block; its memory is the next one's too."""
        rows, cols = self.shape
        step = max(1, min(rows, _BLOCK_ENTRIES // max(1, cols)))
        memory = np.empty((step, cols), np.float32)
        for begin in range(0, rows, step):
            end = min(rows, begin + step)
            block = memory[: end - begin]
            views = [view.slice(begin * cols, end * cols) for view in (self._tuned, self._base)]
            out = _C.MemorySink(_C.View(block.ctypes.data, block.size, "F32", block))
            _C.combine(self._pool, views, np.array([1.0, -1.0]), out)
            yield slice(begin, end), block

    def times(self, x: Float32) -> Float32:
        """The product with x (cols, l): (rows, l)."""
        made = np.empty((self.shape[0], x.shape[1]), np.float32)
        for rows, block in self.blocks():
            np.matmul(block, x, out=made[rows])
        return made

    def transposed_times(self, y: Float32) -> Float32:
        """The product of the transpose with y (rows, l): (cols, l)."""
        made = np.zeros((self.shape[1], y.shape[1]), np.float32)
        for rows, block in self.blocks():
            made += block.T @ y[rows]
        return made

    def norm(self) -> float:
        """Frobenius; summed in float64."""
        gram = _C.gram(self._pool, [self._tuned], self._base)
        return float(np.sqrt(gram[1, 1]))

    def norm_without(self, b: Float32, a: Float32) -> float:
        """Of the difference less ``b @ a``, b (rows, r) and a (r, cols)."""
        total = 0.0
        for rows, block in self.blocks():
            block -= b[rows] @ a
            view = _C.View(block.ctypes.data, block.size, "F32", block)
            total += float(_C.gram(self._pool, [view])[0, 0])
        return float(np.sqrt(total))


def nearest_of_rank(
    difference: Difference,
    rank: int,
    key: int,
    *,
    power_iterations: int = POWER_ITERATIONS,
) -> Spectrum:
    """Nearly the best approximation of ``difference`` of ``rank``, by a randomised range finder.

    Halko, Martinsson and Tropp 2011 (doi:10.1137/090771806), algorithms 4.4 (subspace iteration,
    orthonormal after every product) and 5.1. The test matrix has rank + `OVERSAMPLING` columns of
    random signs, the bits of Philox under ``key``, whatever NumPy's own generators do. Exact, but
    for the rounding of float32 products, where the difference has this rank, and where the columns
    are as many as its smaller side. The difference must not be zero.
    """
    rows, cols = difference.shape
    count = min(rank + OVERSAMPLING, rows, cols)
    if count == rows:  # all there is: signs at random may be of less (a third of all 3 x 3 are)
        q = np.eye(rows)
    elif count == cols:
        q = _orthonormal(difference.times(np.eye(cols, dtype=np.float32)))
    else:
        found = _conditioned(difference.times(_signs(cols, count, key)))
        for _ in range(power_iterations):
            y = _conditioned(difference.transposed_times(found))
            found = _conditioned(difference.times(y))
        q = _orthonormal(found)
    # difference ~ q w^T, whose SVD follows from w^T w = v s^2 v^T: q v s (w v / s)^T.
    w = difference.transposed_times(q.astype(np.float32)).astype(np.float64)
    squares, v = np.linalg.eigh(w.T @ w)
    squares, v = np.maximum(squares[::-1], 0)[:rank], v[:, ::-1][:, :rank]
    s = np.sqrt(squares)
    return Spectrum(q @ v, s, (w @ (v / np.where(s > 0, s, 1))).T)


def _conditioned(matrix: Float32) -> Float32:
    """Columns of the same range, orthonormal but for what is below float32's rounding of the
    longest: y L^-T, where L L^T = y^T y + a shift (shifted Cholesky QR, Fukaya et al. 2020,
    doi:10.1137/18M1218212). A tenth of the time of LAPACK's QR, which was most of the whole.
    """
    y = matrix.astype(np.float64)
    gram = y.T @ y
    shifted = gram + np.eye(len(gram)) * (_TINY * np.trace(gram))
    return matrix @ np.linalg.inv(np.linalg.cholesky(shifted)).T.astype(np.float32)


def _orthonormal(matrix: Float32) -> Float64:
    """A basis of the range of its columns, of at most as many; what is below float32's rounding of
    the longest is left out.

    By the eigenvectors of its Gram matrix, then by Cholesky for the error of 1e-16 / _TINY that the
    first leaves: five times as fast as LAPACK's QR, which was most of the time.
    """
    y = matrix.astype(np.float64)
    values, vectors = np.linalg.eigh(y.T @ y)
    kept = values > _TINY * values[-1]
    q = y @ (vectors[:, kept] / np.sqrt(values[kept]))
    made: Float64 = q @ np.linalg.inv(np.linalg.cholesky(q.T @ q)).T
    return made


def _signs(rows: int, cols: int, key: int) -> Float32:
    """Random +1 and -1."""
    words = philox_words(-(-rows * cols // 32), key)
    bits = np.unpackbits(words.astype("<u4").view(np.uint8), count=rows * cols, bitorder="little")
    return (2.0 * bits - 1.0).astype(np.float32).reshape(rows, cols)
