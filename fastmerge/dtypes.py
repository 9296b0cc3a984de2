"""Element types: one table for safetensors', torch's and NumPy's names and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastmerge.errors import RecipeError, UnsupportedError, nearest


class DType(NamedTuple):
    """One element type. What is not ``mergeable`` is only ever copied; what has ``kernels`` is read
    by them, float64 is narrowed where it is read, or merged in NumPy (`compute.doubles`).
    """

    code: str  # safetensors' name: BF16
    name: str  # torch's name: bfloat16
    bits: int
    numpy: str | None = None  # NumPy's name of what holds its numbers (bfloat16: their bits)
    kernels: bool = False

    @property
    def mergeable(self) -> bool:
        """Whether a merge takes its numbers."""
        return self.kernels or self.code == "F64"

    def bytes_for(self, count: int) -> int:
        """Bytes that ``count`` elements take (a whole number for every type safetensors allows)."""
        return (count * self.bits + 7) // 8


# The types of the safetensors format (version 0.8).
_TABLE = (
    DType("BF16", "bfloat16", 16, "uint16", kernels=True),
    DType("F16", "float16", 16, "float16", kernels=True),
    DType("F32", "float32", 32, "float32", kernels=True),
    DType("F64", "float64", 64, "float64"),
    DType("F8_E4M3", "float8_e4m3fn", 8),
    DType("F8_E5M2", "float8_e5m2", 8),
    DType("F8_E8M0", "float8_e8m0fnu", 8),
    DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 8),
    DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 8),
    DType("F4", "float4_e2m1fn_x2", 4),
    DType("F6_E2M3", "float6_e2m3", 6),
    DType("F6_E3M2", "float6_e3m2", 6),
    DType("C64", "complex64", 64),
    DType("I64", "int64", 64, "int64"),
    DType("I32", "int32", 32, "int32"),
    DType("I16", "int16", 16, "int16"),
    DType("I8", "int8", 8, "int8"),
    DType("U64", "uint64", 64, "uint64"),
    DType("U32", "uint32", 32, "uint32"),
    DType("U16", "uint16", 16, "uint16"),
    DType("U8", "uint8", 8, "uint8"),
    DType("BOOL", "bool", 8, "uint8"),
)

BY_CODE = {dtype.code: dtype for dtype in _TABLE}
BY_NAME = {dtype.name: dtype for dtype in _TABLE}
BF16, F16, F32, F64 = (BY_CODE[code] for code in ("BF16", "F16", "F32", "F64"))
MERGEABLE = tuple(dtype for dtype in _TABLE if dtype.mergeable)
WITH_KERNELS = tuple(dtype for dtype in _TABLE if dtype.kernels)

_SHORT = {"bf16": BF16, "fp16": F16, "half": F16, "fp32": F32, "float": F32, "fp64": F64,
          "double": F64}  # fmt: skip


def parse(name: str, where: str = "dtype", among: Sequence[DType] = MERGEABLE) -> DType:
    """The type called ``name`` in a recipe (``bfloat16``, ``bf16``, ``BF16``, ...).

    Raises FastmergeError that names ``where`` for one that is not ``among`` these, or not known.
    """
    text = name.strip().removeprefix("torch.")
    found = BY_NAME.get(text) or BY_CODE.get(text) or _SHORT.get(text.lower())
    known = [dtype.name for dtype in among]
    if found is None:
        raise RecipeError(f"{where}: unknown dtype '{name}'; {nearest(text, known)}")
    if found not in among:
        raise UnsupportedError(f"{where}: cannot merge in '{name}'; use one of {', '.join(known)}")
    return found
