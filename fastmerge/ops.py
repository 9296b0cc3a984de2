"""Merges of tensors in memory: torch tensors (CPU or CUDA) and NumPy arrays, without copies.

Every function takes contiguous tensors of one shape, in float32, float16 or bfloat16 in any mix;
NumPy arrays of uint16 are taken as bfloat16 bits (ml_dtypes' bfloat16 works too). The result has
the inputs' type, float32 when they differ, and goes to ``out`` when given, which may be one of the
inputs. Arithmetic is fp32 with one rounding; CUDA tensors use the Triton kernels. Results carry no
gradient. Bad arguments raise FastmergeError. Definitions and defaults: ``fastmerge methods``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.arguments import a_list, a_text
from fastmerge.compute.arrays import Operands
from fastmerge.compute.tensor import Computation
from fastmerge.errors import FastmergeError, is_whole
from fastmerge.methods import REQUIRED, Method, Parameter, find
from fastmerge.methods.types import Float64
from fastmerge.tree.nodes import Merge, Stored

Numbers = Sequence[float] | NDArray[Any]

__all__ = [
    "combine",
    "dare_linear",
    "dare_ties",
    "gram",
    "karcher",
    "linear",
    "model_stock",
    "multislerp",
    "nuslerp",
    "passthrough",
    "slerp",
    "task_arithmetic",
    "ties",
]


def linear(
    tensors: Sequence[Any],
    weights: Numbers,
    *,
    normalize: bool = True,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """sum_i w_i x_i, divided by sum_i w_i when ``normalize`` (Wortsman et al. 2022)."""
    values = {"normalize": normalize}
    return _merge("linear", tensors, None, values, {"weight": weights}, out, threads)


def slerp(a: Any, b: Any, t: float, *, out: Any = None, threads: int | None = None) -> Any:
    """Spherical interpolation: ``t`` = 0 gives ``a``, 1 gives ``b`` (Shoemake 1985)."""
    return _merge("slerp", [a, b], None, {"t": t}, {}, out, threads)


def nuslerp(
    a: Any,
    b: Any,
    weights: Numbers,
    *,
    base: Any = None,
    flatten: bool = True,
    row_wise: bool = False,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """SLERP at w_1 / (w_0 + w_1), of the tensors or of their deltas to ``base``; whole or by
    vector.
    """
    values = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    return _merge("nuslerp", [a, b], base, values, {"weight": weights}, out, threads)


def multislerp(
    tensors: Sequence[Any],
    weights: Numbers,
    *,
    base: Any = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """Barycentric SLERP of many tensors, or of their deltas to ``base``."""
    values = {"normalize_weights": normalize_weights, "eps": eps}
    return _merge("multislerp", tensors, base, values, {"weight": weights}, out, threads)


def karcher(
    tensors: Sequence[Any],
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """Riemannian mean on the sphere (Grove and Karcher 1973)."""
    values = {"max_iter": max_iter, "tol": tol}
    return _merge("karcher", tensors, None, values, {}, out, threads)


def model_stock(
    base: Any,
    tensors: Sequence[Any],
    *,
    filter_wise: bool = False,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """The mean of ``tensors`` pulled toward ``base`` by the angle between deltas (Jang et al.
    2024).
    """
    values = {"filter_wise": filter_wise}
    return _merge("model_stock", tensors, base, values, {}, out, threads)


def task_arithmetic(
    base: Any,
    tensors: Sequence[Any],
    weights: Numbers,
    *,
    normalize: bool = False,
    lambda_: float = 1.0,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """base + lambda * sum_i w_i (x_i - base) (Ilharco et al. 2022)."""
    values = {"normalize": normalize, "lambda": lambda_}
    return _merge("task_arithmetic", tensors, base, values, {"weight": weights}, out, threads)


def ties(
    base: Any,
    tensors: Sequence[Any],
    weights: Numbers,
    *,
    density: float | Numbers = 1.0,
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: bool = False,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """Trim deltas to ``density``, elect signs, average what agrees (Yadav et al. 2023)."""
    values = {"normalize": normalize, "lambda": lambda_, "rescale": rescale}
    lists = {"weight": weights, "density": density}
    return _merge("ties", tensors, base, values, lists, out, threads)


def dare_linear(
    base: Any,
    tensors: Sequence[Any],
    weights: Numbers,
    *,
    density: float | Numbers,
    seed: int,
    name: str = "",
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = True,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """Drop delta entries at random, rescale, add (Yu et al. 2023).

    ``seed`` and the tensor's ``name`` choose what is dropped: the same pair gives what a recipe
    gives.
    """
    values = {"normalize": normalize, "lambda": lambda_, "rescale": rescale}
    lists = {"weight": weights, "density": density}
    return _merge("dare_linear", tensors, base, values, lists, out, threads, seed, name)


def dare_ties(
    base: Any,
    tensors: Sequence[Any],
    weights: Numbers,
    *,
    density: float | Numbers,
    seed: int,
    name: str = "",
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = True,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """As `dare_linear`, with a sign election (Yu et al. 2023; Yadav et al. 2023)."""
    values = {"normalize": normalize, "lambda": lambda_, "rescale": rescale}
    lists = {"weight": weights, "density": density}
    return _merge("dare_ties", tensors, base, values, lists, out, threads, seed, name)


def passthrough(
    tensor: Any, *, scale: float | None = None, out: Any = None, threads: int | None = None
) -> Any:
    """The tensor, times ``scale``."""
    return _merge("passthrough", [tensor], None, {}, {"scale": scale}, out, threads)


def gram(tensors: Sequence[Any], *, base: Any = None, threads: int | None = None) -> Float64:
    """Inner products, float64 (k, k); with ``base`` of [base, x_1 - base, ...], shape (k + 1, k +
    1).
    """
    tensors = a_list(tensors, "gram: tensors")
    if not tensors:
        raise FastmergeError("gram: no tensors")
    operands = Operands("gram", [*tensors] if base is None else [base, *tensors])
    backend = operands.backend(threads)
    views = operands.views
    split = (views, None) if base is None else (views[1:], views[0])
    return backend.gram(*split)


def combine(
    tensors: Sequence[Any],
    coefficients: Numbers,
    *,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """sum_i c_i x_i: fp32 FMA in order, one rounding; an input with coefficient 0 is not read."""
    tensors = a_list(tensors, "combine: tensors")
    coefficients = a_list(_plain(coefficients), "combine: coefficients")
    if len(coefficients) != len(tensors):
        raise FastmergeError(
            f"combine: {len(tensors)} tensors but {len(coefficients)} coefficients"
        )
    each = Parameter("coefficient", float, REQUIRED, "")
    factors = [each.check(_plain(value), "combine") for value in coefficients]
    operands = Operands("combine", tensors)
    result, sink = operands.output(out)
    operands.backend(threads).combine(operands.views, np.array(factors), sink)
    return result


def _merge(
    method_name: str,
    tensors: Sequence[Any],
    base: Any,
    values: Mapping[str, Any],
    per_model: Mapping[str, Any],
    out: Any,
    threads: int | None,
    seed: int | None = None,
    name: str = "",
) -> Any:
    method = find(method_name)
    name = a_text(name, f"{method.name}: name")
    tensors = a_list(tensors, f"{method.name}: tensors")
    count = len(tensors)
    if count < method.min_operands or (method.max_operands and count > method.max_operands):
        raise FastmergeError(f"{method.name}: got {count} tensors; {_arity(method)}")
    if method.base == "required" and base is None:
        raise FastmergeError(f"{method.name}: needs a base tensor")
    operands = Operands(method.name, [*tensors] if base is None else [*tensors, base])
    # Every tensor is its own source here: the model index is its place in the list.
    leaves = [
        Stored(index, "", operands.shape, dtype) for index, dtype in enumerate(operands.dtypes)
    ]
    root = Merge(
        method,
        tuple(leaves[:count]),
        None if base is None else leaves[count],
        {p.name: _value(method, p.name, values) for p in method.parameters if not p.per_model},
        tuple(_operand_values(method, per_model, index, count) for index in range(count)),
        _seed(method, seed),
    )
    result, sink = operands.output(out)
    views = operands.views
    backend = operands.backend(threads)
    Computation(backend, lambda source: views[source.model], name, operands.shape).run(root, sink)
    return result


def _seed(method: Method, seed: Any) -> int | None:
    if not method.random:
        return None
    if not is_whole(seed) or not 0 <= seed < 1 << 64:
        raise FastmergeError(f"{method.name}: 'seed' must be a whole number in [0, 2^64)")
    return int(seed)


def _arity(method: Method) -> str:
    if method.max_operands == method.min_operands:
        return f"it takes {method.min_operands}"
    return f"it takes at least {method.min_operands}"


def _value(method: Method, name: str, values: Mapping[str, Any]) -> Any:
    parameter = method.parameter(name)
    assert parameter is not None
    value = values.get(name, parameter.default)
    if value is REQUIRED:
        raise FastmergeError(f"{method.name}: '{name}' is required")
    if value is None and parameter.default is None:
        return None
    return parameter.check(_plain(value), method.name)


def _plain(value: Any) -> Any:
    """Numbers and arrays of NumPy's and torch's as Python's own numbers and lists of them."""
    if getattr(value, "device", None) is not None and str(value.device) == "meta":
        raise FastmergeError("a tensor on 'meta' has no numbers")
    return value.tolist() if hasattr(value, "tolist") else value


def _operand_values(
    method: Method, per_model: Mapping[str, Any], index: int, count: int
) -> dict[str, Any]:
    own: dict[str, Any] = {}
    for name, given in per_model.items():
        value = _plain(given)
        if isinstance(value, Sequence):
            if len(value) != count:
                raise FastmergeError(
                    f"{method.name}: {count} tensors but {len(value)} values for '{name}'"
                )
            own[name] = value[index]
        else:
            own[name] = value
    return {p.name: _value(method, p.name, own) for p in method.parameters if p.per_model}
