"""Random numbers with the same bits everywhere: uniform and normal ones from words of a counter.

NumPy promises the words of its bit generators, not the numbers that its distributions make of them;
libm's logarithm differs between machines in the last bit. So both are made here of operations that
IEEE 754 fixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.methods.shapes import Function
from fastmerge.methods.types import Float32, Float64, Parameter, Values

_BLOCK = 1 << 18  # numbers at a time: their float64 intermediates stay in the cache

# Wichura, Algorithm AS 241 (PPND7), Applied Statistics 37 (1988) 477: the inverse of the normal
# distribution to 1 part in 10^7, as quotients of polynomials, highest power first.
_CENTRE = (
    (5.9109374720e1, 1.5929113202e2, 5.0434271938e1, 3.3871327179e0),
    (6.7187563600e1, 7.8757757664e1, 1.7895169469e1, 1.0),
)
_TAIL = (
    (1.7023821103e-1, 1.3067284816e0, 2.7568153900e0, 1.4234372777e0),
    (1.2021132975e-1, 7.3700164250e-1, 1.0),
)
_FAR = (
    (1.7337203997e-2, 4.2868294337e-1, 3.0812263860e0, 6.6579051150e0),
    (1.2258202635e-2, 2.4197894225e-1, 1.0),
)
_LN2 = 0.6931471805599453
# Its first 32 bits, and the rest: times a whole number below 2^11 the former is exact.
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10


def words(key: int, count: int) -> NDArray[np.uint64]:
    """The first ``count`` 64-bit words of Philox4x64-10 under ``key``."""
    return np.random.Philox(key=key).random_raw(count)


def uniform(drawn: NDArray[np.uint64]) -> Float64:
    """Numbers in (0, 1), float64, of the shape of the words: 2^52 of them, at the middle of equal
    parts (of twice as many the last would round to 1, whose normal number is infinite).
    """
    return ((drawn >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def normal(drawn: NDArray[np.uint64]) -> Float32:
    """Standard normal numbers, float32, of the shape of the words."""
    out = np.empty(drawn.shape, np.float32)
    flat, source = out.reshape(-1), drawn.reshape(-1)
    for at in range(0, flat.size, _BLOCK):
        flat[at : at + _BLOCK] = _quantile(uniform(source[at : at + _BLOCK]))
    return out


def _quantile(p: Float64) -> Float64:
    q = p - 0.5
    found = q * _ratio(_CENTRE, 0.180625 - q * q)
    outside = np.abs(q) > 0.425
    if outside.any():
        r = np.sqrt(-log(np.minimum(p, 1.0 - p)[outside]))
        tail = np.where(r <= 5.0, _ratio(_TAIL, r - 1.6), _ratio(_FAR, r - 5.0))
        found[outside] = np.copysign(tail, q[outside])
    return found


def _ratio(polynomials: tuple[tuple[float, ...], ...], x: Float64) -> Float64:
    top, bottom = (_polynomial(each, x) for each in polynomials)
    return top / bottom


def _polynomial(powers: Sequence[float], x: Float64) -> Float64:
    total = np.full_like(x, powers[0])
    for factor in powers[1:]:
        total = total * x + factor
    return total


def log(x: Float64) -> Float64:
    """ln x of positive numbers to 1e-15: ln m = 2 artanh((m - 1) / (m + 1)) for the mantissa m in
    [1/2, 1), by its series; the exponent times ln 2.
    """
    mantissa, exponent = np.frexp(x)
    small = mantissa < 0.7071067811865476
    mantissa = np.where(small, 2.0 * mantissa, mantissa)
    exponent = exponent - small
    s = (mantissa - 1.0) / (mantissa + 1.0)  # up to 0.172 in size: ten terms
    series = _polynomial([1.0 / n for n in range(19, 0, -2)], s * s)
    return 2.0 * s * series + exponent * _LN2


def exp(x: Float64) -> Float64:
    """e^x of numbers up to 709 to 1e-15: the whole number of ln 2 in x apart, in two parts, and the
    series of what is left, up to 0.35 in size.
    """
    x = np.maximum(x, -750.0)  # 0
    whole = np.rint(x / _LN2)
    rest = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
    series = _polynomial([1.0 / factorial(n) for n in range(14, -1, -1)], rest)
    return np.ldexp(series, np.nan_to_num(whole).astype(np.int32))


def _add_noise(_base: Any, tensors: Sequence[NDArray[Any]], values: Values) -> NDArray[Any]:
    tensor = tensors[0]
    scale = tensor.dtype.type(values["noise_scale"][0])
    out, flat = np.empty_like(tensor), tensor.reshape(-1)
    raw = values["rng"].bit_generator
    made = out.reshape(-1)
    for at in range(0, flat.size, _BLOCK):
        part = flat[at : at + _BLOCK]
        made[at : at + _BLOCK] = part + scale * normal(raw.random_raw(part.size))
    return out


# No row of the table: a recipe of a mixture is the only one that asks for it.
NOISE = Function(
    "noise", "normal noise of standard deviation noise_scale added", "-; as mergekit-moe 0.1.5",
    (Parameter("noise_scale", float, 0.0, "standard deviation", per_model=True, low=0),),
    base="none", min_operands=1, max_operands=1, random=True, function=_add_noise,
)  # fmt: skip
