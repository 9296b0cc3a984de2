"""`compute.reference` and `compute.formulas` as a back end: what a merge means, in NumPy, with
which results are compared.

Flat arrays as tensors; fp32 arrays as outputs, still to be rounded to the output's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge import _C
from fastmerge.compute import formulas, reference
from fastmerge.compute.cpu import cpu
from fastmerge.compute.reference import Array
from fastmerge.methods import Elementwise
from fastmerge.methods.entries import Program
from fastmerge.methods.types import Float32, Float64
from fastmerge.primitives import WHOLE, Agreement, Vectors
from fastmerge.selection import Selection, Sparsify
from fastmerge.tree.nodes import Merge, Node

_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class _Memory:
    """A view's memory for NumPy, read-only."""

    def __init__(self, view: _C.View) -> None:
        self.view = view
        self.__array_interface__ = {
            "version": 3, "typestr": _TYPES[view.dtype], "shape": (view.count,),
            "data": (view.address, True),
        }  # fmt: skip


def array_of(view: _C.View) -> NDArray[Any]:
    """A view's elements: float32, float16, or bfloat16's bits in uint16."""
    if view.is_gathered:
        return cpu(1).array(view)
    return np.asarray(_Memory(view))


def view_of(array: NDArray[Any], dtype: str) -> _C.View:
    """The other way round."""
    return _C.View(array.ctypes.data, array.size, dtype, array)


def _shaped(tensor: Array, vectors: Vectors) -> Array:
    return tensor if vectors.axis is None else tensor.reshape(vectors.rows, vectors.cols)


def _put(out: Float32, made: Array) -> int:
    out[:] = made.ravel()
    return int((~np.isfinite(out)).sum())


class NumpyBackend:
    """`compute.backend.Backend`, and `methods.shapes.Primitives` but for expressions."""

    name = "numpy"
    kind = np.float32

    @staticmethod
    def takes(node: Merge, _parts: Sequence[Node], /) -> str | None:
        return "is an expression" if isinstance(node.method, Elementwise) else None

    def gram(
        self, inputs: Sequence[Array], base: Array | None = None, vectors: Vectors = WHOLE
    ) -> Float64:
        origin = None if base is None else _shaped(base, vectors)
        return reference.gram([_shaped(x, vectors) for x in inputs], origin, axis=vectors.axis)

    def combine(
        self,
        inputs: Sequence[Array],
        coefficients: Float64,
        out: Float32,
        *,
        divisor: float | None = None,
        vectors: Vectors = WHOLE,
        wide: bool = False,
    ) -> int:
        made = reference.combine(
            [_shaped(x, vectors) for x in inputs], coefficients, divisor=divisor,
            axis=vectors.axis, wide=wide, arithmetic=np.float32,
        )  # fmt: skip
        return _put(out, made)

    def select(
        self, inputs: Sequence[Array], base: Array, specs: Sequence[Sparsify]
    ) -> list[Selection]:
        return reference.select(inputs, base, specs)

    def consensus(
        self,
        inputs: Sequence[Array],
        base: Array,
        weights: Sequence[float],
        selections: Sequence[Selection],
        out: Float32,
        agreement: Agreement,
    ) -> int:
        said = {name: value for name, value in vars(agreement).items() if name != "origin"}
        made = reference.consensus(inputs, base, weights, selections, arithmetic=np.float32, **said)
        return _put(out, made)

    def pointwise(
        self,
        formula: str,
        inputs: Sequence[Array],
        base: Array,
        numbers: Sequence[float] = (),
        *,
        selection: Selection | None = None,
        factors: Float64 | None = None,
    ) -> Array:
        return formulas.pointwise(
            formula, inputs, base, numbers, selection=selection, factors=factors,
            arithmetic=np.float32,
        )  # fmt: skip

    def divergences(self, x: Array, base: Array, cols: int) -> Float64:
        return formulas.divergences(x, base, cols)

    def expression(self, program: Program, inputs: Sequence[Array], base: Any) -> Array:
        raise NotImplementedError("takes refuses it")

    @staticmethod
    def is_fp32(_out: Float32, /) -> bool:
        return True

    def scratch(self, count: int) -> tuple[Array, Float32]:
        made = np.empty(count, np.float32)
        return made, made

    def array(self, tensor: Array) -> Float32:
        return reference.widen(tensor)

    def tensor(self, array: Float32) -> Array:
        return array
