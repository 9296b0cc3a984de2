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

from fastmerge.arguments import a_list
from fastmerge.errors import FastmergeError, ResourceError
from fastmerge.methods.combination import LEAST_NORM, LEAST_SINE_SQUARED, LERP_ABOVE, NORM_EPS

if TYPE_CHECKING:
    import torch

Weights = Any  # a tensor, or numbers


def combine(tensors: Sequence[torch.Tensor], coefficients: Weights) -> torch.Tensor:
    """sum_i c_i x_i; an input with coefficient 0 is not read."""
    tensors = a_list(tensors, "combine: tensors")
    made: torch.Tensor = _operators().combine(tensors, _numbers(coefficients, "combine", tensors))
    return made


def gram(tensors: Sequence[torch.Tensor], *, base: torch.Tensor | None = None) -> torch.Tensor:
    """Inner products, float64 (k, k) on the CPU; with ``base`` of [base, x_1 - base, ...], shape
    (k + 1, k + 1).
    """
    made: torch.Tensor = _operators().gram(a_list(tensors, "gram: tensors"), base)
    return made


def linear(
    tensors: Sequence[torch.Tensor], weights: Weights, *, normalize: bool = True
) -> torch.Tensor:
    """sum_i w_i x_i, divided by sum_i w_i when ``normalize`` (Wortsman et al. 2022)."""
    numbers = _numbers(weights, "linear", tensors)
    return combine(tensors, numbers / numbers.sum() if normalize else numbers)


def task_arithmetic(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    weights: Weights,
    *,
    normalize: bool = False,
    lambda_: Any = 1.0,
) -> torch.Tensor:
    """base + lambda sum_i w_i (x_i - base), over sum_i w_i when ``normalize`` (Ilharco et al.
    2022).
    """
    import torch

    numbers = _numbers(weights, "task_arithmetic", tensors)
    if normalize:
        numbers = numbers / numbers.sum()
    numbers = numbers * lambda_
    return combine([base, *tensors], torch.cat([1 - numbers.sum()[None], numbers]))


def slerp(a: torch.Tensor, b: torch.Tensor, t: Any) -> torch.Tensor:
    """Spherical interpolation: ``t`` = 0 gives ``a``, 1 gives ``b`` (Shoemake 1985), linear where
    |cos| > 0.9995, as in `fastmerge.ops.slerp`; there the angle has no part in the gradient.
    """
    import torch

    products = gram([a, b])
    norms = products.diagonal().clamp_min(NORM_EPS**2).sqrt()
    norms = torch.where(norms > NORM_EPS, norms, 1.0)
    cosine = products[0, 1] / norms.prod()
    return combine([a, b], _arc(cosine, _number(t), cosine.abs() > LERP_ABOVE))


def nuslerp(
    a: torch.Tensor, b: torch.Tensor, weights: Weights, *, base: torch.Tensor | None = None
) -> torch.Tensor:
    """SLERP at w_1 / (w_0 + w_1) of the whole tensors, or of their deltas to ``base``."""
    import torch

    numbers = _numbers(weights, "nuslerp", [a, b])
    products = gram([a, b], base=base)
    if base is not None:
        products = products[1:, 1:]
    norms = products.diagonal().clamp_min(LEAST_NORM**2).sqrt()
    cosine = (products[0, 1] / norms.prod()).clamp(-1, 1)
    flat = 1 - cosine**2 <= LEAST_SINE_SQUARED
    factors = _arc(cosine, numbers[1] / numbers.sum(), flat)
    if base is None:
        return combine([a, b], factors)
    return combine([base, a, b], torch.cat([1 - factors.sum()[None], factors]))


def _operators() -> Any:
    """``torch.ops.fastmerge``. Raises ResourceError where torch is not installed."""
    try:
        import torch
    except ImportError as error:
        raise ResourceError(f"torch cannot be imported ({error}); install it") from error
    from fastmerge.compute import torch_library  # registers them

    assert torch_library
    return torch.ops.fastmerge


def _number(value: Any) -> torch.Tensor:
    import torch

    if isinstance(value, torch.Tensor):
        return value.to("cpu", torch.float64)
    return torch.full((), value, dtype=torch.float64)


def _numbers(weights: Weights, where: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One for each tensor, float64 on the CPU."""
    import torch

    if isinstance(weights, torch.Tensor):
        numbers = weights.to("cpu", torch.float64)
    else:
        numbers = torch.stack([_number(value) for value in weights])
    if numbers.shape != (len(tensors),):
        raise FastmergeError(
            f"{where}: {len(tensors)} tensors but weights of shape {list(numbers.shape)}"
        )
    return numbers


def _arc(cosine: torch.Tensor, t: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """The two coefficients of a spherical interpolation; linear where ``flat``."""
    import torch

    angle = torch.acos(torch.where(flat, 0.0, cosine))  # of 1 the derivative would be infinite
    sine = torch.sin(angle)
    first = torch.where(flat, 1 - t, torch.sin((1 - t) * angle) / sine)
    second = torch.where(flat, t, torch.sin(t * angle) / sine)
    return torch.stack([first, second])
