"""Merges of torch tensors that gradients flow through, to the tensors and to what weighs them.

::

    from fastmerge.integrations import torch_ops

    weights = torch.nn.Parameter(torch.tensor([0.5, 0.5], dtype=torch.float64))
    merged = torch_ops.linear([a, b], weights)
    loss(merged).backward()  # weights.grad, and a.grad where it is asked for

Values are those of `fastmerge.ops` to rounding, whose results carry no gradient. What is not
linear in its weights alone (`slerp`, `nuslerp`) has its inner products in the graph, too. All is
made of two operators, ``torch.ops.fastmerge.combine`` and ``gram``, whose gradients are made of
the same two: gradients of gradients, torch.compile and torch.export work. Tensors are float32,
float16 or bfloat16 and computed in fp32 with one rounding; weights are best float64, on the CPU (a
GPU would be waited for).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.arguments import a_flag, a_list, plain
from fastmerge.errors import FastmergeError, RecipeError, ResourceError, UnsupportedError, brief
from fastmerge.methods import REQUIRED, Parameter
from fastmerge.methods.combination import LEAST_NORM, LEAST_SINE_SQUARED, LERP_ABOVE, NORM_EPS
from fastmerge.methods.table import METHODS
from fastmerge.methods.weights import cancel, sum_to_zero

if TYPE_CHECKING:
    import torch

__all__ = ["combine", "gram", "linear", "nuslerp", "slerp", "task_arithmetic"]

Weights = Any  # a tensor, or numbers
# What numbers are called here, with their bounds.
_WEIGHTS, _COEFFICIENTS, _LAMBDA = (
    Parameter(name, float, REQUIRED, "") for name in ("weights", "coefficients", "lambda_")
)
(_T,) = METHODS["slerp"].parameters


def combine(tensors: Sequence[torch.Tensor], coefficients: Weights) -> torch.Tensor:
    """sum_i c_i x_i, by fused multiply-adds of fp32, rounded once.

    ``tensors``: k torch tensors of one shape, float32, float16 or bfloat16. ``coefficients``: k
    numbers, or a tensor of shape (k,); an input whose own is 0 is not read.

    Returns a torch tensor of their shape and type (float32 where types differ). Raises RecipeError
    for a value, UnsupportedError for a type or forward mode, FastmergeError for shapes or counts
    that do not fit.
    """
    return _combined(tensors, _numbers(coefficients, "combine", tensors), "combine")


def gram(tensors: Sequence[torch.Tensor], *, base: torch.Tensor | None = None) -> torch.Tensor:
    """Inner products <x_i, x_j>: products of fp32, summed in float64.

    ``tensors``: k torch tensors of one shape, float32, float16 or bfloat16. ``base``: of that
    shape, or None.

    Returns a float64 tensor of shape (k, k) on the CPU; with ``base`` that of [base, x_1 - base,
    ...], of shape (k + 1, k + 1). Raises UnsupportedError for a type or forward mode,
    FastmergeError for shapes that differ.
    """
    return _products(tensors, base, "gram")


def linear(
    tensors: Sequence[torch.Tensor], weights: Weights, *, normalize: bool = True
) -> torch.Tensor:
    """sum_i w_i x_i, over sum_i w_i where ``normalize`` (Wortsman et al. 2022, arXiv:2203.05482).

    ``tensors``: k torch tensors of one shape, float32, float16 or bfloat16. ``weights``: k numbers
    w_i, or a tensor of shape (k,). ``normalize``: whether to divide; numbers that sum to 0 are
    refused, of a tensor nobody looks.

    Returns a torch tensor of their shape and type (float32 where types differ). Raises RecipeError
    for a value, UnsupportedError for a type or forward mode, FastmergeError for shapes or counts
    that do not fit.
    """
    numbers = _numbers(weights, "linear", tensors, divided=a_flag(normalize, "linear: normalize"))
    return _combined(tensors, numbers, "linear")


def task_arithmetic(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    weights: Weights,
    *,
    normalize: bool = False,
    lambda_: Any = 1.0,
) -> torch.Tensor:
    """base + lambda sum_i w_i (x_i - base), over sum_i w_i where ``normalize`` (Ilharco et al.
    2022, arXiv:2212.04089).

    ``base``, ``tensors``: one and k torch tensors of one shape, float32, float16 or bfloat16.
    ``weights``: k numbers w_i, or a tensor of shape (k,). ``normalize``: whether to divide.
    ``lambda_``: any number, or a tensor of one.

    Returns a torch tensor of their shape and type (float32 where types differ). Raises RecipeError
    for a value, UnsupportedError for a type or forward mode, FastmergeError for shapes or counts
    that do not fit.
    """
    import torch

    where = "task_arithmetic"
    tensors = a_list(tensors, f"{where}: tensors")
    numbers = _numbers(weights, where, tensors, divided=a_flag(normalize, f"{where}: normalize"))
    numbers = numbers * _number(lambda_, where, _LAMBDA)
    return _combined([base, *tensors], torch.cat([1 - numbers.sum()[None], numbers]), where)


def slerp(a: torch.Tensor, b: torch.Tensor, t: Any) -> torch.Tensor:
    """sin((1 - t) v) / sin v a + sin(t v) / sin v b, v the angle between a and b (Shoemake 1985,
    doi:10.1145/325165.325242); linear where |cos v| > 0.9995, as in `fastmerge.ops.slerp`: there
    the angle has no part in the gradient.

    ``a``, ``b``: torch tensors of one shape, float32, float16 or bfloat16. ``t``: a number in [-1,
    2], or a tensor of one, at whose bounds nobody looks; 0 gives ``a``, 1 gives ``b``.

    Returns a torch tensor of their shape and type (float32 where types differ). Raises RecipeError
    for a value, UnsupportedError for a type or forward mode, FastmergeError for shapes or counts
    that do not fit.
    """
    import torch

    products = _products([a, b], None, "slerp")
    norms = products.diagonal().clamp_min(NORM_EPS**2).sqrt()
    norms = torch.where(norms > NORM_EPS, norms, 1.0)
    cosine = products[0, 1] / norms.prod()
    factors = _arc(cosine, _number(t, "slerp", _T), cosine.abs() > LERP_ABOVE)
    return _combined([a, b], factors, "slerp")


def nuslerp(
    a: torch.Tensor, b: torch.Tensor, weights: Weights, *, base: torch.Tensor | None = None
) -> torch.Tensor:
    """SLERP (Shoemake 1985, doi:10.1145/325165.325242) at t = w_1 / (w_0 + w_1), of the whole
    tensors or of their deltas to ``base``.

    ``a``, ``b``: torch tensors of one shape, float32, float16 or bfloat16. ``weights``: two
    numbers, or a tensor of shape (2,). ``base``: of that shape, or None.

    Returns a torch tensor of their shape and type (float32 where types differ). Raises RecipeError
    for a value, UnsupportedError for a type or forward mode, FastmergeError for shapes or counts
    that do not fit.
    """
    import torch

    where = "nuslerp"
    numbers = _numbers(weights, where, [a, b], divided=True)
    products = _products([a, b], base, where)
    if base is not None:
        products = products[1:, 1:]
    norms = products.diagonal().clamp_min(LEAST_NORM**2).sqrt()
    cosine = (products[0, 1] / norms.prod()).clamp(-1, 1)
    flat = 1 - cosine**2 <= LEAST_SINE_SQUARED
    factors = _arc(cosine, numbers[1], flat)
    if base is None:
        return _combined([a, b], factors, where)
    return _combined([base, a, b], torch.cat([1 - factors.sum()[None], factors]), where)


def _operators() -> Any:
    """``torch.ops.fastmerge``. Raises ResourceError where torch is not installed."""
    try:
        import torch
    except ImportError as error:
        raise ResourceError(f"torch cannot be imported ({error}); install it") from error
    from fastmerge.compute import torch_library  # registers them

    assert torch_library
    return torch.ops.fastmerge


def torch_tensors(tensors: Any, where: str) -> list[torch.Tensor]:
    """``tensors`` as a list; FastmergeError where one is no dense tensor of torch's."""
    import torch

    found = a_list(tensors, f"{where}: tensors")
    if not found:
        raise FastmergeError(f"{where}: no tensors")
    for one in found:
        if not isinstance(one, torch.Tensor):
            raise FastmergeError(f"{where}: tensors are torch's here, not {type(one).__name__}")
        if one.layout is not torch.strided or one.is_nested:
            raise UnsupportedError(f"{where}: a sparse or nested tensor; pass a dense one")
        _refuse_tangent(one, where)
    return found


def _refuse_tangent(tensor: torch.Tensor, where: str) -> None:
    """Raises UnsupportedError for a tensor of torch's forward mode, which asks no operator for its
    derivative that has one for backward alone: the tangent would be 0 in silence.
    """
    import torch

    forward_ad: Any = torch.autograd.forward_ad  # without types
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise UnsupportedError(
            f"{where}: forward-mode gradients (jvp, jacfwd) do not flow here; use backward() or "
            "torch.autograd.grad"
        )


def _combined(tensors: Any, coefficients: torch.Tensor, where: str) -> torch.Tensor:
    made: torch.Tensor = _operators().combine(torch_tensors(tensors, where), coefficients)
    return made


def _products(tensors: Any, base: Any, where: str) -> torch.Tensor:
    if base is not None:
        torch_tensors([base], where)
    made: torch.Tensor = _operators().gram(torch_tensors(tensors, where), base)
    return made


def _number(value: Any, where: str, bounds: Parameter) -> torch.Tensor:
    """One within ``bounds``; a tensor of one, whatever it holds: to look would break a recorded
    program.
    """
    import torch

    name = bounds.name
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex() or value.is_meta:
            raise FastmergeError(f"{where}: '{name}' must be a number, not {brief(value)}")
        _refuse_tangent(value, where)
        return value.to("cpu", torch.float64).reshape(())
    number = bounds.check(plain(value, f"{where}: {name}"), where)
    return torch.full((), number, dtype=torch.float64)


def _numbers(values: Weights, where: str, tensors: Any, *, divided: bool = False) -> torch.Tensor:
    """One for each tensor, float64 on the CPU; ``divided`` by their sum, which is looked at where
    they are numbers.
    """
    import torch

    bounds = _WEIGHTS if where in METHODS else _COEFFICIENTS
    name = bounds.name
    if isinstance(values, torch.Tensor):
        if values.layout is not torch.strided or values.is_nested or values.is_meta:
            raise FastmergeError(f"{where}: {name} must be a tensor of numbers, or a list")
        _refuse_tangent(values, where)
        numbers = values.to("cpu", torch.float64)
    else:
        given = a_list(plain(values, f"{where}: {name}"), f"{where}: {name}")
        made = [_number(value, where, bounds) for value in given]
        numbers = torch.stack(made) if made else torch.empty(0)
        known = divided and not any(isinstance(value, torch.Tensor) for value in given)
        if known and cancel(np.array(given, np.float64)):
            raise RecipeError(f"{where}: {sum_to_zero(np.array(given, np.float64))}; change them")
    count = len(a_list(tensors, f"{where}: tensors"))
    if numbers.shape != (count,):
        raise FastmergeError(f"{where}: {count} tensors but {name} of shape {list(numbers.shape)}")
    return numbers / numbers.sum() if divided else numbers


def _arc(cosine: torch.Tensor, t: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """The two coefficients of a spherical interpolation; linear where ``flat``."""
    import torch

    angle = torch.acos(torch.where(flat, 0.0, cosine))  # of 1 the derivative would be infinite
    sine = torch.sin(angle)
    first = torch.where(flat, 1 - t, torch.sin((1 - t) * angle) / sine)
    second = torch.where(flat, t, torch.sin(t * angle) / sine)
    return torch.stack([first, second])
